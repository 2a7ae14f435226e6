"""From the config to the shape of the model, and the model's size and cost."""

from typing import Any, NamedTuple

from flax import nnx
import numpy as np

from moe.config import ConfigDict, require
from moe.config_rules import CAUSAL_TASKS
from moe.model import head
from moe.model.attention_table import check_attention, find_attention
from moe.model.depth import check as check_depth
from moe.model.layer import RouterSpec
from moe.model.mixed_experts import Kinds
from moe.model.noise import WeightNoise
from moe.model.noise import check as check_noise
from moe.model.paths import check as check_paths
from moe.model.spec import DEPTH, KINDS, ModelSpec, Named, Paths, Stem
from moe.model.stems import STRIDE, stem_positions
from moe.model.stems import check as check_stem
from moe.model.transformer import Transformer
from moe.routing.table import check_router


def model_spec(
    config: ConfigDict,
    vocab_size: int,
    token_counts: np.ndarray | None = None,
    *,
    classes: int = 0,
    stem: Stem | None = None,
    training: bool = True,
) -> ModelSpec:
    """The model that `config.model` and `config.router` describe.

    Args:
        config: complete config.
        vocab_size: of the tokenizer.
        token_counts: `[V]` how often each id occurs in the training text, for balanced hash tables.
        classes: of a classifier of rows; 0 for other tasks.
        stem: what makes positions of frames; None where rows hold tokens alone.
        training: whether to refuse a router that could run but not learn.

    Raises:
        ConfigError: parts that cannot work together, or not for this task.
    """
    m: dict[str, Any] = config.model.to_dict()
    m["pattern"] = tuple(m["pattern"])
    attention = _check_attention(config)
    task, paths = config.task.to_dict(), Paths(**config.paths)
    head.check(task)
    _check_prefix(task, attention.name)
    if stem is not None:
        check_stem(stem, config.data.sequence_length)
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
        causal=task["name"] in CAUSAL_TASKS,
        output=head.OUTPUTS[task["name"]],
        classes=classes,
        stem=stem,
        pool=Named(task["pool"], tuple(sorted(head.pool_options(task).items()))),
        paths=paths,
        weight_noise=WeightNoise(**config.weight_noise),
        **m,
    )
    check_noise(**config.weight_noise, learned=spec.row.learned, sparse=made.sparse_layers > 0)
    _check_kinds(made)
    _check_depth(made, may_see_ahead=may_see_ahead(config))
    return made


def _check_prefix(task: dict[str, Any], attention: str) -> None:
    """A prefix that sees itself both ways needs an attention that can."""
    both_ways = task["name"] == "seq2seq" and task.get("prefix", "bidirectional") == "bidirectional"
    require(
        not both_ways or find_attention(attention).prefix,
        f"attention.name={attention!r} with task.name='seq2seq' and task.prefix='bidirectional': only full "
        "attention lets the source see itself both ways and the target earlier positions alone. Set "
        "attention.name='full', or task.prefix='causal'.",
    )


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
    """Whether a token may depend on later ones: what generates nothing reads whole rows."""
    return config.allow_noncausal or config.task.name not in CAUSAL_TASKS


def takes_padding(spec: ModelSpec) -> bool:
    """Whether prompts of different lengths can share a batch of generation, padded on the right.

    Not where attention, a router or an expert goes by places in the row: a padded row would have other
    neighbours there than it has alone.
    """
    return find_attention(spec.attention.name).gaps and not spec.looks_back


class ModelSize(NamedTuple):
    """Counts of the model."""

    parameters_total: int
    parameters_active: int  # that one token meets: all but the experts it does not choose
    flops_per_token: float  # forward, `2` a multiply-add, at the config's sequence length


def model_size(spec: ModelSpec, sequence_length: int) -> ModelSize:
    """Parameters, and the FLOPs of one token's forward pass (a training step takes 3 times that).

    Matrix products only: every active matrix but look-ups, the stem's and those of whole rows by their
    share of the positions, and attention: causal over half of the sequence, in both directions over all of
    it. A prefix that sees itself both ways counts as causal: its length is the data's. Padding, drops and
    recomputation do not count.
    """
    total = active = 0.0
    for path, variable in _parameters(spec):
        size = float(np.prod(variable.get_value().shape))
        chosen = spec.router.k / spec.all_experts if "mixed" in path else 1.0  # run for all tokens
        total += size
        active += size * _share(spec, path) * chosen
    both_ways = not spec.causal and find_attention(spec.attention.name).bidirectional
    keys = sequence_length if both_ways else (sequence_length + 1) / 2
    attention = 2 * attention_layers(spec) * spec.heads * spec.head_dim * keys
    multiplied = sum(matrices(spec, sequence_length).values())
    return ModelSize(round(total), round(active), 2.0 * (multiplied + attention))


def attention_layers(spec: ModelSpec) -> float:
    """Layers of attention by the pairs of tokens compared; a depth layer counts in part.

    Of the tokens that go through one, each meets the same share of keys.
    """
    depth = spec.depth_capacity**2 - 1
    return spec.num_layers + depth * spec.repeats * sum(k in DEPTH for k in spec.pattern)


def matrices(spec: ModelSpec, sequence_length: int) -> dict[tuple, float]:
    """Numbers of every matrix that one token is multiplied with on average, by the path of the parameter.

    All but look-ups and sizes of noise; an expert counts by the share of tokens that choose it, what
    runs for some positions of a row only by their share of `sequence_length`.
    """
    found = {}
    for path, variable in _parameters(spec):
        is_lookup = path[-1] == "embedding" and not (
            spec.tie_embeddings and spec.output == "tokens"
        )
        is_lookup |= tuple(path) == ("stem", "position")
        is_matrix = len(variable.get_metadata().get("axes", ())) >= 2
        if is_matrix and not is_lookup and "sigmas" not in path:
            runs = _share(spec, path) * _runs(spec, path, sequence_length) / sequence_length
            found[tuple(path)] = float(np.prod(variable.get_value().shape)) * runs
    return found


def _runs(spec: ModelSpec, path: tuple, sequence_length: int) -> int:
    """How many products with a matrix a row takes, if all of its positions go through every layer."""
    if path[0] == "stem" and spec.stem is not None:
        return stem_positions(spec.stem) * (STRIDE if path[1] == "first" else 1)
    if path[0] == "pair":
        return 2
    return 1 if path[0] == "head" and spec.output == "classes" else sequence_length


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
