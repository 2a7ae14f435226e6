"""From the config to the shape of the model, and the model's size and cost."""

from typing import Any, NamedTuple

from flax import nnx
import numpy as np

from moe.config import ConfigDict
from moe.model.attention_table import check_attention
from moe.model.layer import RouterSpec
from moe.model.spec import KINDS, ModelSpec, Named
from moe.model.transformer import Transformer
from moe.routing.table import check_router


def model_spec(
    config: ConfigDict,
    vocab_size: int,
    token_counts: np.ndarray | None = None,
    *,
    classes: int = 0,
    training: bool = True,
) -> ModelSpec:
    """The model that `config.model` and `config.router` describe.

    Args:
        config: complete config.
        vocab_size: of the tokenizer.
        token_counts: `[V]` how often each id occurs in the training text, for balanced hash tables.
        classes: of a classifier of rows; 0 for a language model.
        training: whether to refuse a router that could run but not learn.

    Raises:
        ConfigError: the router cannot work with this number of experts.
    """
    m: dict[str, Any] = config.model.to_dict()
    m["pattern"] = tuple(m["pattern"])
    attention = _check_attention(config)
    router = config.router.to_dict()
    if any(KINDS[kind] for kind in m["pattern"]):
        check_router(
            num_experts=m["num_experts"],
            training=training,
            sequence_length=config.data.sequence_length,
            batch_size=config.data.batch_size,
            **router,
        )
    spec = RouterSpec(
        name=router["name"],
        k=router["k"],
        options=tuple(
            sorted((n, v) for n, v in router.items() if n not in ("name", "k", "jitter"))
        ),
        token_counts=None if token_counts is None else tuple(int(c) for c in token_counts),
    )
    return ModelSpec(
        vocab_size=vocab_size,
        router=spec,
        attention=attention,
        sequence_length=config.data.sequence_length,
        causal=config.task.name == "language",
        classes=classes,
        **m,
    )


def _check_attention(config: ConfigDict) -> Named:
    """The attention that the config describes."""
    options = config.attention.to_dict()
    check_attention(
        sequence_length=config.data.sequence_length,
        heads=config.model.heads,
        qk_norm=config.model.qk_norm,
        allow_noncausal=may_see_ahead(config),
        **options,
    )
    name = options.pop("name")
    return Named(name, tuple(sorted(options.items())))


def may_see_ahead(config: ConfigDict) -> bool:
    """Whether a token may depend on later ones: a classifier reads whole rows."""
    return config.allow_noncausal or config.task.name != "language"


class ModelSize(NamedTuple):
    """Counts of the model."""

    parameters_total: int
    parameters_active: int  # that one token meets: all but the experts it does not choose
    flops_per_token: float  # forward, `2` a multiply-add, at the config's sequence length


def model_size(spec: ModelSpec, sequence_length: int) -> ModelSize:
    """Parameters, and the FLOPs of one token's forward pass (a training step takes 3 times that).

    Matrix products only: every active matrix but the embedding look-up, and causal attention over
    half of the sequence. Padding, drops and recomputation do not count.
    """
    model = nnx.eval_shape(lambda: Transformer(spec, rngs=nnx.Rngs(params=0)))
    total = active = matrices = 0.0
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        size = float(np.prod(variable.get_value().shape))
        share = spec.router.k / spec.num_experts if "experts" in path else 1.0
        total += size
        active += size * share
        is_lookup = path[-1] == "embedding" and not spec.tie_embeddings
        if len(variable.get_metadata().get("axes", ())) >= 2 and not is_lookup:
            matrices += size * share
    attention = 2 * spec.num_layers * spec.heads * spec.head_dim * (sequence_length + 1) / 2
    return ModelSize(round(total), round(active), 2.0 * (matrices + attention))
