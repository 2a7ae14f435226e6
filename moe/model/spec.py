"""The shape of a model, as plain hashable numbers."""

from typing import Any, NamedTuple

from moe.model.layer import RouterSpec

# kind of block -> how many sparse layers it holds
KINDS = {"dense": 0, "sparse": 1, "double": 2}


class Named(NamedTuple):
    """One of several ways to do a thing: its name in a table, and its options; hashable."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()


class ModelSpec(NamedTuple):
    """Shape of the model: the section `model` of the config, with what it takes from others."""

    vocab_size: int
    num_layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    expert_width: int
    num_experts: int
    shared_experts: int
    pattern: tuple[str, ...]
    first_dense: int
    activation: str
    qk_norm: str
    tie_embeddings: bool
    dropout: float
    logit_softcap: float | None
    rope_base: float
    norm_eps: float
    remat: str
    dtype: str
    router: RouterSpec
    attention: Named = Named("full")
    sequence_length: int = 0  # of training, for attentions that cut it into parts
    causal: bool = True  # whether a position sees earlier ones only
    classes: int = 0  # of a classifier of whole rows; 0 predicts the next token

    @property
    def repeats(self) -> int:
        """How often the pattern is repeated after the first dense layers."""
        return (self.num_layers - self.first_dense) // len(self.pattern)

    @property
    def sparse_names(self) -> tuple[tuple[str, str], ...]:
        """Of one turn of the pattern: (block, module) of each sparse layer, in the order of reports."""
        modules = ("mlp", "second")
        return tuple(
            (f"layer{i}", module)
            for i, kind in enumerate(self.pattern)
            for module in modules[: KINDS[kind]]
        )

    @property
    def sparse_layers(self) -> int:
        """`L`: layers with experts."""
        return self.repeats * len(self.sparse_names)

    @property
    def learns_routing(self) -> bool:
        """Whether there is a gate to lose anything on."""
        return self.sparse_layers > 0 and self.router.row.learned
