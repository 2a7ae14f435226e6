"""Segment routing: all tokens of a segment go to the same experts, chosen from a pooled input.

Lory, Zhong et al. 2024 (arXiv:2405.03133); Seg-MoE, Ortigossa and Segal 2026 (arXiv:2601.21641).
Segments are `segment_size` tokens long and restart with every packed document; the last one of a
document may be shorter, and pools the tokens it has.

| `mode` | a segment is routed by | causality |
|---|---|---|
| `shift` | the segment before | C1 |
| `prefix` | all segments before | C1 |
| `first_token` | its own first token | C1 |
| `self` | itself | C3 |

`shift` and `prefix` give the first segment of a document learned logits. Lory routes it by its own
mean without gradient, through which its tokens see their future; this does not.
"""

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.errors import ConfigError
from moe.routing import topk
from moe.routing.gates import Gated, project
from moe.routing.router import Router

MODES = ("shift", "prefix", "first_token")
POOLS = ("mean", "first", "last")


class SegmentGate(nnx.Module):
    """A linear gate on pooled tokens.

    It pools logits, which is the same as the logits of pooled tokens, and cheaper by D / E.

    Args:
        width: model width `D`.
        num_experts: `E`.
        rngs: its `params` stream draws the parameters.
        segment_size: tokens a segment.
        pool: `mean`, `first` or `last`: which tokens stand for their segment.
        mode: see the table above.

    Attributes:
        kernel: float32 `[D E]`.
        first: float32 `[E]`, logits where there is no earlier segment; of unit scale, because
            zeros would send every first segment to experts 0 to K-1. Only of `shift` and `prefix`.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        rngs: nnx.Rngs,
        segment_size: int = 16,
        pool: str = "mean",
        mode: str = "shift",
    ):
        self.segment_size, self.pool, self.mode = segment_size, pool, mode
        normal = nnx.initializers.normal
        kernel = normal(width**-0.5)(rngs.params(), (width, num_experts), jnp.float32)
        self.kernel = nnx.Param(kernel, axes=("D", "E"))
        if mode in ("shift", "prefix"):
            first = normal(1.0)(rngs.params(), (num_experts,), jnp.float32)
            self.first = nnx.Param(first, axes=("E",))

    def __call__(
        self,
        tokens: Float[Array, "B S D"],
        *,
        valid: Bool[Array, "B S"],
        positions: Int[Array, "B S"],
        documents: Int[Array, "B S"],
    ) -> Gated:
        """Scores every expert for every segment, repeated for its tokens."""
        index = positions // self.segment_size
        pooled = pooled_tokens(valid, index, documents, pool=self.pool, mode=self.mode)
        logits = average(project(tokens, self.kernel[...]), pooled)
        if hasattr(self, "first"):
            earlier = pooled.any(axis=-1, keepdims=True)
            logits = jnp.where(earlier, logits, self.first[...][None, None])
        return Gated(logits)


def self_gate(
    width: int, num_experts: int, *, rngs: nnx.Rngs, segment_size: int = 16, pool: str = "mean"
) -> SegmentGate:
    """A `SegmentGate` that routes each segment by itself."""
    return SegmentGate(
        width, num_experts, rngs=rngs, segment_size=segment_size, pool=pool, mode="self"
    )


def pooled_tokens(
    valid: Bool[Array, "B S"],
    index: Int[Array, "B S"],
    documents: Int[Array, "B S"],
    *,
    pool: str,
    mode: str,
) -> Bool[Array, "B S S"]:
    """Which tokens `u` the segment of token `t` is routed by: True at `[b, t, u]`.

    Args:
        valid: `[B S]`, True for a real token; padding is never pooled.
        index: number of each token's segment in its document.
        documents: document of each token.
        pool: which tokens stand for their segment.
        mode: which segments are looked at.
    """
    older = index[:, :, None] - index[:, None]  # segments that u is behind t
    seen = {"shift": older == 1, "prefix": older > 0}.get(mode, older == 0)
    chosen = representatives(valid, index, documents, "first" if mode == "first_token" else pool)
    return seen & same_document(documents) & chosen[:, None]


def representatives(
    valid: Bool[Array, "B S"], index: Int[Array, "B S"], documents: Int[Array, "B S"], pool: str
) -> Bool[Array, "B S"]:
    """Which tokens stand for their segment: all of it, its first or its last valid one."""
    if pool == "mean":
        return valid
    joined = (index[:, :-1] == index[:, 1:]) & (documents[:, :-1] == documents[:, 1:])
    joined &= valid[:, :-1] & valid[:, 1:]  # [B S-1]: neighbours that share a segment
    edge = ((0, 0), (1, 0)) if pool == "first" else ((0, 0), (0, 1))
    return valid & ~jnp.pad(joined, edge)


def same_document(documents: Int[Array, "B S"]) -> Bool[Array, "B S S"]:
    """Whether two tokens of a row belong to one document."""
    return documents[:, :, None] == documents[:, None]


def average(values: Float[Array, "B S X"], chosen: Bool[Array, "B S S"]) -> Float[Array, "B S X"]:
    """For each token the mean of the `values` of the tokens chosen for it; 0 where there is none."""
    weight = chosen / jnp.maximum(chosen.sum(axis=-1, keepdims=True), 1)
    return jnp.einsum(
        "btu,bux->btx", weight.astype(values.dtype), values, precision=jax.lax.Precision.HIGHEST
    )


def check(
    num_experts: int,
    *,
    k: int,
    sequence_length: int | None = None,
    normalize: str = "renormalize",
    score: str = "softmax",
    segment_size: int = 16,
    pool: str = "mean",
    mode: str = "shift",
) -> None:
    """Refuses unknown names, segments that do not fit, and a look at the future.

    Raises:
        ConfigError: see above, and what `topk.check` refuses.
    """
    if mode == "self":
        raise ConfigError(
            "router.mode='self' with router.name='segment': a segment routed by itself lets its "
            "tokens see later ones (C3). Set router.name='segment_self', which says so, or "
            f"router.mode to one of {', '.join(MODES)}."
        )
    if mode not in MODES:
        raise ConfigError(f"router.mode={mode!r} is not one of {', '.join(MODES)}; choose one.")
    check_self(
        num_experts,
        k=k,
        sequence_length=sequence_length,
        normalize=normalize,
        score=score,
        segment_size=segment_size,
        pool=pool,
    )


def check_self(
    num_experts: int,
    *,
    k: int,
    sequence_length: int | None = None,
    normalize: str = "renormalize",
    score: str = "softmax",
    segment_size: int = 16,
    pool: str = "mean",
) -> None:
    """Refuses unknown names and segments that do not fit.

    Raises:
        ConfigError: see above, and what `topk.check` refuses.
    """
    if pool not in POOLS:
        raise ConfigError(f"router.pool={pool!r} is not one of {', '.join(POOLS)}; choose one.")
    check_segment(segment_size, sequence_length)
    topk.check(num_experts, k=k, normalize=normalize, score=score)


def check_segment(segment_size: int, sequence_length: int | None) -> None:
    """Refuses an empty segment, or one longer than the sequence.

    Raises:
        ConfigError: see above.
    """
    if segment_size < 1:
        raise ConfigError(f"router.segment_size={segment_size} must be at least 1 token.")
    if sequence_length is not None and segment_size > sequence_length:
        raise ConfigError(
            f"router.segment_size={segment_size} is longer than data.sequence_length="
            f"{sequence_length}: the only segment would have none before it. Set it to at most "
            f"{sequence_length}."
        )


_COMMON: dict[str, Any] = {
    "paper": "Zhong et al. 2024, arXiv:2405.03133; Ortigossa and Segal 2026, arXiv:2601.21641",
    "cost": "D E + S E + k experts",
    "traced": ("scale",),
}

ROUTER = Router(
    topk.route,
    equation="l_t = W . pool(x of the segment before t's; or all before; or its first token)",
    use="Text whose topic changes slowly: neighbours share experts, so few are loaded at a time.",
    check=check,
    gate=SegmentGate,
    causality="C1",
    **_COMMON,
)

SELF_ROUTER = Router(
    topk.route,
    equation="l_t = W . pool(x of t's own segment)",
    use="Encoders and classification, where a segment may be read before it is routed.",
    check=check_self,
    gate=self_gate,
    causality="C3",
    causal_in_eval=False,
    **_COMMON,
)
