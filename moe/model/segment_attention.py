"""Segment attention: full attention inside a segment, and to the summaries of earlier segments."""

from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from moe.errors import ConfigError
from moe.model.attention import Attention, Heads, write
from moe.model.attention_types import AttentionOutput
from moe.model.experts import fan_in_init, project
from moe.model.segment_sizes import RATIOS, check_sizes, ratio_size, size_weights
from moe.model.spans import (
    Places,
    Spans,
    best_of,
    complete_spans,
    earlier,
    places,
    same_span,
    span_means,
    visible,
)


class SegmentCache(NamedTuple):
    """Keys and values so far, and the tokens after attention inside segments of each of `R` sizes."""

    key: Float[Array, "B L Q X"]
    value: Float[Array, "B L Q X"]
    hidden: Float[Array, "B L R D"]


class SegmentAttention(nnx.Module):
    """Two levels of attention for long text, after HAN (Yang et al. 2016) and RoBERT (arXiv:1910.10781).

    Documents are cut into segments of `K` tokens. With x the normalised input, Att attention inside the
    segment, h_t = x_t + Att(x)_t and s_j the pooled h of segment j, for each head

        y_t = Att(x)_t + W_o sum_{j < seg(t)} alpha_tj W_v s_j,
        alpha_t = softmax over the null slot and j < seg(t) of (W_q h_t . W_k s_j / sqrt(X)).

    Strictly earlier segments only, so that nothing depends on later tokens (C1); the null slot has a
    learned key and the value 0, and takes all the weight in the first segment. Without a cache and with
    S > 2K, attention inside segments meets 2K keys a query; the cost is n K X + n (n/K) X for n^2 X.

    `size` says what `K` is: "fixed", `segment` tokens; "ratio", `ratio` of the context length;
    "learned", all of 1/4, 1/3 and 1/2 of it, with the outputs mixed by learned weights at the cost of
    three. The context length is a constant: the length of the text would tell where it ends.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        size: str = "fixed",
        segment: int = 64,
        ratio: float = 1 / 3,
        sequence_length: int = 0,
        mixture: str = "dense",
        pool: str = "mean",
        combine: str = "attention",
        top_k: int = 0,
        out_scale: float,
        rngs: nnx.Rngs,
        **attention: Any,
    ):
        """Arguments as for `Attention`, and these.

        Args:
            width: as for `Attention`, with the next three.
            heads: also of the attention to summaries.
            kv_heads: of the attention inside segments.
            head_dim: of both.
            size: "fixed", "ratio" or "learned".
            segment: tokens a segment for "fixed".
            ratio: share of `sequence_length` for "ratio", 1/4 to 1/2.
            sequence_length: the context length, for "ratio" and "learned".
            mixture: for "learned", "dense" or "straight_through".
            pool: summary of a segment, "mean" or "last" (token).
            combine: "attention", or "concat": segments side by side, no weights and no summaries.
            top_k: summaries a query and head, those of the largest weights; 0 is all.
            out_scale: of both output projections.
            rngs: for the parameters.
            attention: the rest of `Attention`.
        """
        check(
            size=size,
            segment=segment,
            ratio=ratio,
            sequence_length=sequence_length,
            mixture=mixture,
            pool=pool,
            combine=combine,
            top_k=top_k,
        )
        self.mixture, self.pool, self.top_k = mixture, pool, top_k
        self.sizes = segment_sizes(size, segment, ratio, sequence_length)
        self.full = Attention(
            width, heads, kv_heads, head_dim, out_scale=out_scale, rngs=rngs, **attention
        )
        if combine == "attention":
            self.cross = CrossAttention(width, heads, head_dim, out_scale=out_scale, rngs=rngs)
        if size == "learned":
            self.size_logits = nnx.Param(jnp.zeros(len(self.sizes)), axes=(None,))

    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        segments: Int[Array, "B S"],
        cache: SegmentCache | None = None,
        start: Int[Array, ""] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> AttentionOutput:
        """Attends inside segments and to earlier ones; arguments as for `Attention`.

        `key` draws noise for the mixture "straight_through"; without, the likeliest size is taken.
        """
        heads = self.full.rotated(self.full.heads(x), positions)
        if cache is None:
            queries, keys = places(positions, segments)
        else:
            assert start is not None
            filled = [write(old, new, start) for old, new in zip(cache[:2], heads[1:], strict=True)]
            cache = SegmentCache(*filled, cache.hidden)
            queries, keys = places(positions, segments, cache.key.shape[1], start)
        inner = [self._inside(heads, cache, queries, keys, size) for size in self.sizes]
        hidden = jnp.stack([x + y for y in inner], axis=2)  # [B S R D]
        if cache is not None and start is not None:
            cache = cache._replace(hidden=write(cache.hidden, hidden, start))
        seen = hidden if cache is None else cache.hidden
        outs = []
        for r, size in enumerate(self.sizes):
            outs.append(
                inner[r] + self._across(hidden[:, :, r], seen[:, :, r], queries, keys, size)
            )
        return AttentionOutput(self._mixed(outs, key), cache)

    def _inside(
        self, heads: Heads, cache: SegmentCache | None, queries: Places, keys: Places, size: int
    ) -> Float[Array, "B S D"]:
        q, k, v = heads
        if cache is None and q.shape[1] > 2 * size:
            out = local_attention(q, k, v, queries, size)
        else:
            k, v = (k, v) if cache is None else cache[:2]
            mask = visible(queries, keys) & same_span(queries, keys, size)
            out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])
        return self.full.merged(out)

    def _across(
        self, hidden: Array, seen: Array, queries: Places, keys: Places, size: int
    ) -> Float[Array, "B S D"]:
        if not hasattr(self, "cross"):
            return jnp.zeros_like(hidden)
        spans = complete_spans(keys, size, max(seen.shape[1] // size, 1))
        summaries = pooled(seen, spans, self.pool).astype(hidden.dtype)
        return self.cross(hidden, summaries, earlier(queries, spans), self.top_k)

    def _mixed(self, outs: list[Array], key: Array | None) -> Float[Array, "B S D"]:
        if len(outs) == 1:
            return outs[0]
        weights = size_weights(self.size_logits[...], self.mixture, key)
        mixed = jnp.einsum("r,rbsd->bsd", weights, jnp.stack(outs).astype(jnp.float32))
        return mixed.astype(outs[0].dtype)


class CrossAttention(nnx.Module):
    """Attention of tokens to summaries of segments, with a null slot of value 0."""

    def __init__(self, width: int, heads: int, head_dim: int, *, out_scale: float, rngs: nnx.Rngs):
        """`H` heads of width `head_dim`."""
        init, shape = fan_in_init(width), (width, heads, head_dim)
        self.wq = nnx.Param(init(rngs.params(), shape), axes=("D", "H", None))
        self.wk = nnx.Param(init(rngs.params(), shape), axes=("D", "H", None))
        self.wv = nnx.Param(init(rngs.params(), shape), axes=("D", "H", None))
        self.null = nnx.Param(jnp.zeros((heads, head_dim)), axes=("H", None))
        out_init = fan_in_init(heads * head_dim, out_scale)
        self.wo = nnx.Param(out_init(rngs.params(), shape[1:] + shape[:1]), axes=("H", None, "D"))

    def weights(
        self,
        tokens: Float[Array, "B S D"],
        summaries: Float[Array, "B M D"],
        allowed: Bool[Array, "B S M"],
        top_k: int = 0,
    ) -> Float[Array, "B S H M+1"]:
        """alpha, which sums to 1; the last slot is the null one. float32."""
        q = project(tokens, self.wq[...]).astype(jnp.float32)
        k = project(summaries, self.wk[...]).astype(jnp.float32)
        scores = jnp.einsum("bshx,bmhx->bshm", q, k, precision="highest")
        null = jnp.sum(q * self.null[...][None, None], axis=-1, keepdims=True)
        may = jnp.broadcast_to(allowed[:, :, None], scores.shape)
        if top_k:
            may = best_of(scores, may, top_k)
        always = jnp.ones((*may.shape[:3], 1), bool)
        scores = jnp.concatenate([scores, null], axis=-1) * q.shape[-1] ** -0.5
        return jax.nn.softmax(scores, where=jnp.concatenate([may, always], axis=-1), axis=-1)

    def __call__(
        self,
        tokens: Float[Array, "B S D"],
        summaries: Float[Array, "B M D"],
        allowed: Bool[Array, "B S M"],
        top_k: int = 0,
    ) -> Float[Array, "B S D"]:
        """Adds up the values of the allowed summaries; 0 where none is."""
        alpha = self.weights(tokens, summaries, allowed, top_k)[..., :-1].astype(tokens.dtype)
        out = jnp.einsum("bshm,bmhx->bshx", alpha, project(summaries, self.wv[...]))
        return project(out, self.wo[...], inputs=2)


def pooled(x: Float[Array, "B L D"], spans: Spans, pool: str) -> Float[Array, "B M D"]:
    """One vector a span: the mean of its members or its last one; means nothing in unused slots."""
    if pool == "mean":
        return span_means(x, spans)
    return jnp.take_along_axis(x, jnp.maximum(spans.end, 0)[..., None], axis=1)


def local_attention(
    q: Float[Array, "B S H X"],
    k: Float[Array, "B S Q X"],
    v: Float[Array, "B S Q X"],
    here: Places,
    size: int,
) -> Float[Array, "B S H X"]:
    """Causal attention inside spans of `size`, which may start anywhere in a row.

    The keys of a query are among the `size - 1` before it: in the chunk of `size` positions that it stands
    in, or in the one before. Equals masked attention over all pairs.
    """
    batch, length = here.index.shape
    chunks = -(-length // size)

    def chunked(a: Array, fill: int) -> Array:  # [B S ...] to [B N K ...]
        pad = [(0, 0), (0, chunks * size - length)] + [(0, 0)] * (a.ndim - 2)
        return jnp.pad(a, pad, constant_values=fill).reshape(batch, chunks, size, *a.shape[2:])

    def with_previous(a: Array, fill: int) -> Array:  # [B N K ...] to [B*N 2K ...]
        pad = [(0, 0), (1, 0)] + [(0, 0)] * (a.ndim - 2)
        before = jnp.pad(a, pad, constant_values=fill)[:, :-1]
        return jnp.concatenate([before, a], axis=2).reshape(-1, 2 * size, *a.shape[3:])

    # Padding attends to padding of its own kind, so that no row is empty.
    at = Places(*(chunked(a, -1) for a in here))
    queries = Places(*(a.reshape(-1, size) for a in at))
    keys = Places(*(with_previous(a, -2) for a in at))
    mask = visible(queries, keys) & same_span(queries, keys, size)
    k, v = (with_previous(chunked(a, 0), 0) for a in (k, v))
    q = chunked(q, 0).reshape(-1, size, *q.shape[2:])
    out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])
    return out.reshape(batch, chunks * size, *out.shape[2:])[:, :length]


def empty_cache(
    batch: int,
    length: int,
    *,
    width: int,
    kv_heads: int,
    head_dim: int,
    dtype: jnp.dtype,
    size: str,
) -> SegmentCache:
    """A cache of `length` positions."""
    zeros = jnp.zeros((batch, length, kv_heads, head_dim), dtype)
    count = len(RATIOS) if size == "learned" else 1
    return SegmentCache(zeros, zeros, jnp.zeros((batch, length, count, width), dtype))


def segment_sizes(size: str, segment: int, ratio: float, context: int) -> tuple[int, ...]:
    """Tokens a segment; several to choose from where the size is learned."""
    if size == "fixed":
        return (segment,)
    if size == "ratio":
        return (ratio_size(context, ratio),)
    return tuple(ratio_size(context, each) for each in RATIOS)


def check(
    *,
    size: str,
    segment: int,
    ratio: float,
    sequence_length: int,
    mixture: str,
    pool: str,
    combine: str,
    top_k: int,
) -> None:
    """Raises ConfigError for an unknown choice, or numbers that cannot work together."""
    check_sizes(size=size, segment=segment, ratio=ratio, mixture=mixture)
    if size == "content":
        raise ConfigError(
            "size='content' cuts a text where it changes, which needs all of it: no token could be "
            "answered before the last. Set size to fixed, ratio or learned; SegmentPool, which reads "
            "whole texts, can cut by content."
        )
    if size != "fixed" and sequence_length < 8:
        raise ConfigError(
            f"data.sequence_length={sequence_length} with size={size!r} must be at least 8: segments are "
            "a quarter to a half of it. Set a longer sequence, or size='fixed'."
        )
    if size == "fixed" and sequence_length and segment > sequence_length:
        raise ConfigError(
            f"segment={segment} is longer than data.sequence_length={sequence_length}: one segment would "
            "hold the whole sequence. Set segment to at most half of it."
        )
    if pool not in ("mean", "last"):
        raise ConfigError(f"pool={pool!r} must be 'mean' or 'last', the last token of a segment.")
    if combine not in ("attention", "concat"):
        raise ConfigError(
            f"combine={combine!r} must be 'attention', weights over earlier segments, or 'concat', "
            "segments that know nothing of each other."
        )
    if top_k < 0 or (top_k and combine == "concat"):
        raise ConfigError(
            f"top_k={top_k} with combine={combine!r}: top_k is the number of earlier segments that a "
            "query looks at, 0 for all, and 'concat' looks at none."
        )
