"""One vector for a long text: segments are encoded apart, weighed by a learned query and added up."""

from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from moe.errors import ConfigError
from moe.model.attention import Attention
from moe.model.experts import fan_in_init, project
from moe.model.segment_sizes import (
    MAX_SEGMENTS,
    RATIOS,
    check_sizes,
    content_segments,
    ratio_size,
    size_weights,
)


class Pooled(NamedTuple):
    """The text's vector, and how it came about for each of `R` segment sizes (1 unless learned)."""

    output: Float[Array, "B D"]  # float32; 0 for a row without tokens
    alpha: Float[Array, "B R M"]  # weights of segments; 0 for one without tokens
    segment: Int[Array, "B R S"]  # of each token; means nothing at padding
    size_weights: Float[Array, " R"]  # sum to 1


class SegmentPool(nnx.Module):
    """Weights over segments, as in hierarchical attention networks (Yang et al. 2016, NAACL).

    Segments are encoded apart with shared weights, H_j = x + Att(x) inside segment j, in both directions,
    and pooled to s_j. With a learned query q

        output = sum_j alpha_j s_j,  alpha = softmax_j(q . W_k s_j / sqrt(X)).

    Segments are cut by place in the row; attention inside a segment never crosses a document. For
    `size` other than "fixed" a segment is a quarter to a half of the tokens of its own row: a
    classifier reads the whole text (C3).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        size: str = "ratio",
        segment: int = 64,
        ratio: float = 1 / 3,
        mixture: str = "dense",
        pool: str = "mean",
        rngs: nnx.Rngs,
        **attention: Any,
    ):
        """Arguments as for `SegmentAttention`; `size` may be "content" too."""
        check(size=size, segment=segment, ratio=ratio, mixture=mixture, pool=pool)
        self.size, self.segment, self.mixture, self.pool = size, segment, mixture, pool
        self.ratios = RATIOS if size == "learned" else (ratio,)
        self.encoder = Attention(width, heads, kv_heads, head_dim, rngs=rngs, **attention)
        self.wk = nnx.Param(fan_in_init(width)(rngs.params(), (width, head_dim)), axes=("D", None))
        self.query = nnx.Param(fan_in_init(1)(rngs.params(), (head_dim,)), axes=(None,))
        if size == "learned":
            self.size_logits = nnx.Param(jnp.zeros(len(RATIOS)), axes=(None,))

    def __call__(
        self,
        x: Float[Array, "B S D"],
        valid: Bool[Array, "B S"],
        documents: Int[Array, "B S"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Pooled:
        """Pools each row to one vector.

        Args:
            x: tokens, from position 0 of each row on.
            valid: False for padding, which stands at the end and changes nothing.
            documents: document of each token; None where a row is one document.
            key: noise of the mixture "straight_through"; None takes the likeliest size.
        """
        documents = valid.astype(jnp.int32) if documents is None else documents
        segments = self._segments(x, valid)
        parts = [self._pool(x, valid, documents, *each) for each in segments]
        outputs, alphas = (jnp.stack(part, axis=1) for part in zip(*parts, strict=True))
        weights = jnp.ones(1)
        if self.size == "learned":
            weights = size_weights(self.size_logits[...], self.mixture, key)
        mixed = jnp.einsum("r,brd->bd", weights, outputs)
        most = max(count for _, count in segments)
        alphas = jnp.pad(alphas, ((0, 0), (0, 0), (0, most - alphas.shape[-1])))
        return Pooled(mixed, alphas, jnp.stack([s for s, _ in segments], axis=1), weights)

    def _segments(self, x: Array, valid: Array) -> list[tuple[Int[Array, "B S"], int]]:
        """The segment of each token and the number of segments, for each size."""
        if self.size == "content":
            return [(content_segments(x, valid), MAX_SEGMENTS)]
        at = jnp.broadcast_to(jnp.arange(x.shape[1]), valid.shape)
        if self.size == "fixed":
            return [(at // self.segment, -(-x.shape[1] // self.segment))]
        length = valid.sum(axis=-1, keepdims=True)
        return [(at // ratio_size(length, ratio), MAX_SEGMENTS) for ratio in self.ratios]

    def _pool(
        self, x: Array, valid: Array, documents: Array, segment: Array, count: int
    ) -> tuple[Float[Array, "B D"], Float[Array, "B M"]]:
        hidden = x + self._encoded(x, valid, documents, segment)
        member = (segment[:, None, :] == jnp.arange(count)[None, :, None]) & valid[:, None, :]
        summaries = summarise(hidden, member, self.pool)
        keys = project(summaries, self.wk[...])
        scores = jnp.einsum("bmx,x->bm", keys, self.query[...], precision="highest")
        used = member.any(axis=-1)
        alpha = jax.nn.softmax(scores * keys.shape[-1] ** -0.5, where=used, axis=-1)
        alpha = jnp.where(used, alpha, 0.0)
        return jnp.einsum("bm,bmd->bd", alpha, summaries), alpha

    def _encoded(
        self, x: Array, valid: Array, documents: Array, segment: Array
    ) -> Float[Array, "B S D"]:
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), valid.shape)
        q, k, v = self.encoder.rotated(self.encoder.heads(x), positions)
        of = jnp.stack([segment, documents, valid.astype(jnp.int32)])
        mask = jnp.all(of[:, :, :, None] == of[:, :, None, :], axis=0)
        out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])
        return self.encoder.merged(out)


def summarise(
    hidden: Float[Array, "B S D"], member: Bool[Array, "B M S"], pool: str
) -> Float[Array, "B M D"]:
    """Mean of the members, or the last of them, in float32; 0 where there is none."""
    if pool == "last":
        size = member.shape[-1]
        last = size - 1 - jnp.argmax(member[..., ::-1], axis=-1)
        member = member & jax.nn.one_hot(last, size, dtype=bool)
    share = member / jnp.maximum(member.sum(axis=-1, keepdims=True), 1)
    # Padding may hold anything, and 0 times infinity is no number.
    hidden = jnp.where(member.any(axis=1)[..., None], hidden.astype(jnp.float32), 0.0)
    return jnp.einsum("bms,bsd->bmd", share, hidden, precision="highest")


def check(*, size: str, segment: int, ratio: float, mixture: str, pool: str) -> None:
    """Raises ConfigError for an unknown choice or an impossible length."""
    check_sizes(size=size, segment=segment, ratio=ratio, mixture=mixture)
    if pool not in ("mean", "last"):
        raise ConfigError(f"pool={pool!r} must be 'mean' or 'last', the last token of a segment.")
