"""From the config to the shape of the model, and the model's size and cost."""

from typing import Any, NamedTuple

from flax import nnx
import numpy as np

from moe.config import ConfigDict, require
from moe.model import head
from moe.model.attention_table import check_attention, find_attention
from moe.model.depth import check as check_depth
from moe.model.layer import RouterSpec
from moe.model.mixed_experts import Kinds
from moe.model.noise import WeightNoise
from moe.model.noise import check as check_noise
from moe.model.paths import check as check_paths
from moe.model.spec import DEPTH, KINDS, ModelSpec, Named, Paths
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
    task, paths = config.task.to_dict(), Paths(**config.paths)
    head.check(task)
    check_paths(**paths._asdict())
    router = config.router.to_dict()
    if any(KINDS[kind] for kind in m["pattern"]):
        check_router(
            num_experts=sum(m[f"{kind}_experts"] for kind in ("num", *Kinds._fields)),
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
    made = ModelSpec(
        vocab_size=vocab_size,
        router=spec,
        attention=attention,
        sequence_length=config.data.sequence_length,
        causal=task["name"] == "language",
        classes=classes,
        pool=Named(task["pool"], tuple(sorted(head.pool_options(task).items()))),
        paths=paths,
        weight_noise=WeightNoise(**config.weight_noise),
        **m,
    )
    check_noise(**config.weight_noise, learned=spec.row.learned, sparse=made.sparse_layers > 0)
    _check_kinds(made)
    _check_depth(made, may_see_ahead=may_see_ahead(config))
    return made


def _check_kinds(spec: ModelSpec) -> None:
    """Experts beside the stacked ones need a router that lets tokens choose, and layers to be in."""
    if not sum(spec.expert_kinds):
        return
    said = ", ".join(
        f"model.{kind}_experts={count}"
        for kind, count in spec.expert_kinds._asdict().items()
        if count
    )
    require(
        spec.sparse_layers > 0,
        f"{said} in a model without sparse layers: set it to 0, or model.pattern with sparse layers.",
    )
    require(
        spec.router.row.plan == "choices",
        f"{said} with router.name={spec.router.name!r}, whose plan is {spec.router.row.plan}: experts of "
        "other kinds are for routers by which each token chooses its experts. Choose such a router (topk, "
        "deepseek_v3, ...), or set it to 0.",
    )


def _check_depth(spec: ModelSpec, *, may_see_ahead: bool) -> None:
    """Layers that some tokens pass by: what sees ahead, and what needs all tokens."""
    if not spec.has_depth:
        return
    check_depth(spec.depth_capacity)
    require(
        may_see_ahead,
        f"model.pattern={spec.pattern} is noncausal in training: which tokens go through a depth layer "
        "depends on later ones, so a language model sees its future. Set allow_noncausal=True (its "
        "evaluation form is causal, and with sparse layers the causal gap between the two is reported), or "
        "another pattern.",
    )
    require(
        find_attention(spec.attention.name).gaps,
        f"attention.name={spec.attention.name!r} with model.pattern={spec.pattern}: it needs every "
        "position of the text, and depth layers leave tokens out. Set attention.name='full'.",
    )
    require(
        "depth_sparse" not in spec.pattern
        or not (spec.looks_back or spec.router.row.causality == "C2"),
        f"model.pattern={spec.pattern} with router.name={spec.router.name!r} and "
        f"model.conv_experts={spec.conv_experts}: a router or an expert that reads earlier tokens needs "
        "all of them, and depth layers leave tokens out. Use 'depth' and 'sparse' layers, or a router "
        "whose choices are each token's own.",
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
    total = active = 0.0
    for path, variable in _parameters(spec):
        size = float(np.prod(variable.get_value().shape))
        chosen = spec.router.k / spec.all_experts if "mixed" in path else 1.0  # run for all tokens
        total += size
        active += size * _share(spec, path) * chosen
    attention = 2 * attention_layers(spec) * spec.heads * spec.head_dim * (sequence_length + 1) / 2
    multiplied = sum(matrices(spec).values())
    return ModelSize(round(total), round(active), 2.0 * (multiplied + attention))


def attention_layers(spec: ModelSpec) -> float:
    """Layers of attention by the pairs of tokens compared; a depth layer counts in part.

    Of the tokens that go through one, each meets the same share of keys.
    """
    depth = spec.depth_capacity**2 - 1
    return spec.num_layers + depth * spec.repeats * sum(k in DEPTH for k in spec.pattern)


def matrices(spec: ModelSpec) -> dict[tuple, float]:
    """Numbers of every matrix that one token is multiplied with on average, by the path of the parameter.

    All but look-ups and sizes of noise; an expert counts by the share of tokens that choose it.
    """
    found = {}
    for path, variable in _parameters(spec):
        is_lookup = path[-1] == "embedding" and not spec.tie_embeddings
        is_matrix = len(variable.get_metadata().get("axes", ())) >= 2
        if is_matrix and not is_lookup and "sigmas" not in path:
            found[tuple(path)] = float(np.prod(variable.get_value().shape)) * _share(spec, path)
    return found


def _parameters(spec: ModelSpec) -> list[tuple[tuple, nnx.Variable]]:
    model = nnx.eval_shape(lambda: Transformer(spec, rngs=nnx.Rngs(params=0)))
    return list(nnx.to_flat_state(nnx.state(model, nnx.Param)))


def _share(spec: ModelSpec, path: tuple) -> float:
    """The share of tokens that meet a parameter, if experts are chosen evenly."""
    share = 1.0
    if "experts" in path or "noisy_experts" in path:
        share = spec.router.k / spec.all_experts
    if path[0] == "blocks" and "depth" not in path:
        kind = spec.pattern[int(path[1].removeprefix("layer"))]
        share *= spec.depth_capacity if kind in DEPTH else 1.0
    return share
