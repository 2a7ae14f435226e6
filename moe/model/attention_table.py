"""The table of attentions: a new one is a file, a row here, and nothing else.

| name | a query attends to |
|---|---|
| `full` | every earlier token of its document |
| `block` | its own block of tokens and the best earlier ones |
| `kmeans` | the tokens of its cluster |
| `segment` | its own segment, and one summary of each earlier one |
| `projection_experts` | every earlier token, with the heads that it chose (MoA) |
| `routed_heads` | every earlier token, with heads weighted by its choice (MoH) |

In a model that need not be causal (a classifier) `full`, `projection_experts` and `routed_heads` attend to
the whole document. The others stay causal: blocks and segments are ranked or summed up by what came
before, which is no mistake where later tokens may be seen, and the classifier reads all outputs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import nnx
import jax.numpy as jnp

from moe.errors import ConfigError, did_you_mean, find_row
from moe.model import attention, block_attention, head_experts, kmeans_attention, segment_attention
from moe.model.attention import Attention, KeyValues
from moe.model.block_attention import BlockAttention
from moe.model.head_experts import HEAD_BALANCE
from moe.model.kmeans_attention import KMeansAttention
from moe.model.segment_attention import SegmentAttention
from moe.routing.router import options_of, pick_inputs


def key_values(
    batch: int, length: int, *, kv_heads: int, head_dim: int, dtype: jnp.dtype
) -> KeyValues:
    """An empty cache of keys and values."""
    zeros = jnp.zeros((batch, length, kv_heads, head_dim), dtype)
    return KeyValues(zeros, zeros)


def no_check() -> None:
    """The check of an attention without options."""


class AttentionKind(NamedTuple):
    """One way to attend.

    * `module(width, heads, kv_heads, head_dim, *, qk_norm, rope_base, norm_eps, out_scale, rngs,
      <options>)`; called with `(x, positions, segments, cache, start)`, and with `key` where it names
      it. Where `bidirectional`, it takes `causal` too.
    * `check(**options)` raises `ConfigError`; it may name `sequence_length`, `heads` and `qk_norm`.
    * `empty_cache(batch, length, ...)` names what it needs of `width`, `kv_heads`, `head_dim`, `dtype`
      and its options.
    """

    module: Callable[..., nnx.Module]
    paper: str
    check: Callable[..., None] = no_check
    empty_cache: Callable[..., Any] = key_values
    causality: str = (
        "C1"  # C1: an output depends on earlier tokens of its document; C3: on any of the row
    )
    noncausal: tuple[tuple[str, Any], ...] = ()  # (option, value) that make it C3
    terms: tuple[str, ...] = ()  # losses that it offers, one value a token
    bidirectional: bool = False  # whether it can attend to the whole document
    gaps: bool = False  # whether its cache tells apart positions that are left out
    prefix: bool = False  # whether it takes `prefix`, positions that all of their document see

    @property
    def options(self) -> dict[str, Any]:
        """Every option with its default."""
        return {n: v for n, v in options_of(self.module).items() if n != "causal"}


ATTENTION: dict[str, AttentionKind] = {
    "full": AttentionKind(
        Attention,
        "Vaswani et al. 2017, arXiv:1706.03762; arXiv:2305.13245",
        attention.check,
        bidirectional=True,
        gaps=True,
        prefix=True,
    ),
    "block": AttentionKind(
        BlockAttention, "Lu et al. 2025, arXiv:2502.13189", block_attention.check
    ),
    "kmeans": AttentionKind(
        KMeansAttention,
        "Roy et al. 2021, arXiv:2003.05997",
        kmeans_attention.check,
        kmeans_attention.empty_cache,
        noncausal=(("mode", "top_w"),),
        terms=("commitment",),
    ),
    "segment": AttentionKind(
        SegmentAttention,
        "Yang et al. 2016 (HAN); Pappagari et al. 2019, arXiv:1910.10781",
        segment_attention.check,
        segment_attention.empty_cache,
    ),
    "projection_experts": AttentionKind(
        head_experts.projection_experts,
        "Zhang et al. 2022 (MoA), arXiv:2210.05144",
        head_experts.check_projections,
        head_experts.one_head_cache,
        terms=(HEAD_BALANCE,),
        bidirectional=True,
        gaps=True,
    ),
    "routed_heads": AttentionKind(
        head_experts.routed_heads,
        "Jin et al. 2024 (MoH), arXiv:2410.11842",
        head_experts.check_routed,
        terms=(HEAD_BALANCE,),
        bidirectional=True,
        gaps=True,
    ),
}


def find_attention(name: str) -> AttentionKind:
    """Returns a row of the table.

    Raises:
        ConfigError: no such attention; names the nearest.
    """
    return find_row(ATTENTION, "attention.name", name, "not an attention")


def causality_of(name: str, options: dict[str, Any]) -> str:
    """C1 or C3, by the options; those that are missing have their defaults."""
    kind = find_attention(name)
    options = kind.options | options
    return "C3" if any(options[n] == value for n, value in kind.noncausal) else kind.causality


def check_attention(
    name: str,
    *,
    sequence_length: int,
    heads: int = 4,
    qk_norm: str = "none",
    allow_noncausal: bool = False,
    **options: Any,
) -> None:
    """Checks the section `attention` of the config, before anything compiles.

    Args:
        name: a key of `ATTENTION`.
        sequence_length: `data.sequence_length`.
        heads: `model.heads`.
        qk_norm: `model.qk_norm`.
        allow_noncausal: whether outputs may depend on later tokens, which leak into a language model.
        options: of this attention; those that are missing have their defaults.

    Raises:
        ConfigError: an unknown name or option, or values that cannot work together.
    """
    kind = find_attention(name)
    for option in options:
        if option not in kind.options:
            raise ConfigError(
                f"attention.{option} is not an option of attention.name={name!r}"
                f"{did_you_mean(option, kind.options)}; it takes {', '.join(kind.options)}."
            )
    given = kind.options | options
    sizes = {"sequence_length": sequence_length, "heads": heads, "qk_norm": qk_norm}
    kind.check(**given, **pick_inputs(kind.check, sizes))
    if causality_of(name, given) == "C3" and not allow_noncausal:
        said = " and ".join(f"attention.{n}={given[n]!r}" for n, value in kind.noncausal)
        raise ConfigError(
            f"{said} lets later tokens decide what earlier ones see: a language model would be trained "
            "on its own targets and could not generate. Choose another value, or allow_noncausal=True to "
            "train with the leak and report the causal gap."
        )


def make_attention(
    name: str,
    options: dict[str, Any],
    *sizes: int,
    sequence_length: int,
    causal: bool = True,
    **common: Any,
) -> nnx.Module:
    """Builds the module.

    Args:
        name: a key of `ATTENTION`.
        options: of this attention, checked.
        sizes: width, heads, kv_heads, head_dim.
        sequence_length: `data.sequence_length`, for those that name it.
        causal: False in a model that may see later tokens; see the top of this file.
        common: `qk_norm`, `rope_base`, `norm_eps`, `out_scale`, `rngs`.
    """
    kind = find_attention(name)
    module, inputs = kind.module, pick_inputs(kind.module, {"sequence_length": sequence_length})
    if kind.bidirectional:
        inputs["causal"] = causal
    return module(*sizes, **inputs, **options, **common)


def empty_cache(name: str, options: dict[str, Any], batch: int, length: int, **sizes: Any) -> Any:
    """The cache of one layer before the first token; a NamedTuple of arrays with leading axis B.

    Args:
        name: a key of `ATTENTION`.
        options: of this attention, checked.
        batch: `B`.
        length: positions that it holds.
        sizes: `width`, `kv_heads`, `head_dim`, `dtype`.
    """
    kind = find_attention(name)
    return kind.empty_cache(
        batch, length, **pick_inputs(kind.empty_cache, kind.options | options | sizes)
    )
