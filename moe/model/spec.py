"""The shape of a model, as plain hashable numbers."""

from typing import Any, NamedTuple

from moe.model.layer import RouterSpec
from moe.model.mixed_experts import Kinds
from moe.model.noise import WeightNoise

# kind of block -> how many sparse layers it holds
KINDS = {"dense": 0, "sparse": 1, "double": 2, "depth": 0, "depth_sparse": 1}
DEPTH = ("depth", "depth_sparse")  # those that only some tokens go through


class Named(NamedTuple):
    """One of several ways to do a thing: its name in a table, and its options; hashable."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()


class Stem(NamedTuple):
    """What turns frames of a row, patches of a picture or parts of a sound, into its first positions."""

    kind: str  # a key of `moe.model.stems.STEMS`
    frames: int  # `N` of a row
    size: int  # `F`, numbers of a frame
    hidden: int = 0  # width of a layer between, of "patches"; 0: one linear map


class Paths(NamedTuple):
    """The section `paths` of the config: layers left out, and jumps from earlier layers."""

    survival: float = 1.0
    schedule: str = "linear"
    scope: str = "batch"
    rescale: bool = True
    jump: float = 0.0
    jump_mode: str = "bernoulli"
    jump_temperature: float = 1.0


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
    num_experts: int  # feed-forward ones, stacked
    conv_experts: int
    zero_experts: int
    copy_experts: int
    constant_experts: int
    conv_kernel: int
    shared_experts: int
    pattern: tuple[str, ...]
    first_dense: int
    depth_capacity: float
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
    output: str = "tokens"  # logits at every position; or classes, pair: of whole rows
    classes: int = 0  # of a classifier
    stem: Stem | None = None  # of models whose rows hold frames
    blank: int | None = None  # the id of CTC that stands for nothing; None predicts no alignments
    pool: Named = Named("mean")  # how a classifier makes one vector of a row
    paths: Paths = Paths()
    weight_noise: WeightNoise = WeightNoise()

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

    @property
    def expert_kinds(self) -> Kinds:
        """Experts beside the stacked ones."""
        return Kinds(self.conv_experts, self.zero_experts, self.copy_experts, self.constant_experts)

    @property
    def all_experts(self) -> int:
        """`E`: what the router chooses from."""
        return self.num_experts + sum(self.expert_kinds)

    @property
    def free_experts(self) -> tuple[bool, ...]:
        """Which experts have no network, `[E]`."""
        computing = self.num_experts + self.conv_experts
        return (False,) * computing + (True,) * (self.all_experts - computing)

    @property
    def router_looks_back(self) -> bool:
        """Whether a choice depends on earlier tokens, which generation must then keep."""
        return self.router.row.causality == "C1"

    @property
    def looks_back(self) -> bool:
        """Whether a sparse layer reads inputs of earlier positions, through its router or an expert."""
        return self.router_looks_back or (self.conv_experts > 0 and self.conv_kernel > 1)

    @property
    def has_depth(self) -> bool:
        """Whether tokens pass some layers by (Mixture-of-Depths)."""
        return any(kind in DEPTH for kind in self.pattern)
