"""Self-attention with grouped queries, rotary positions and a key/value cache."""

from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from moe.errors import ConfigError
from moe.model.experts import fan_in_init, project
from moe.parallel.rules import cut_positions, gather_positions, sequence_shards


class KeyValues(NamedTuple):
    """Keys and values of `S` positions; `Q` heads of width `X`."""

    key: Float[Array, "B S Q X"]
    value: Float[Array, "B S Q X"]
    # Document of each position: queries see keys of their own only. None: all are of one document.
    segment: Int[Array, "B S"] | None = None


class Heads(NamedTuple):
    """Queries of `H` heads, keys and values of the `Q` heads that they share."""

    query: Float[Array, "B S H X"]
    key: Float[Array, "B S Q X"]
    value: Float[Array, "B S Q X"]


class RMSNorm(nnx.Module):
    """Zhang and Sennrich 2019, arXiv:1910.07467. Statistics in float32, output in the input's dtype."""

    def __init__(self, size: int, eps: float):
        """`size` is the last axis of what is normalised."""
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((size,)), axes=(None,))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Scales the last axis to unit root mean square."""
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
        scale = jnp.expand_dims(self.scale[...], range(x.ndim - 1))
        return (x32 * jax.lax.rsqrt(mean_square + self.eps) * scale).astype(x.dtype)


def rotary(
    x: Float[Array, "B S H X"], positions: Int[Array, "B S"], base: float
) -> Float[Array, "B S H X"]:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864): rotates halves of each head by position."""
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency[None, None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head attention with `H` query heads that share `kv_heads` keys and values."""

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        qk_norm: str,
        rope_base: float,
        norm_eps: float,
        out_scale: float,
        causal: bool = True,
        query_block: int | None = None,
        rngs: nnx.Rngs,
    ):
        """`qk_norm`: "none", "head" (each head, as in Qwen3) or "full" (all heads at once, as in OLMoE).

        `causal`: False attends to the whole document, later tokens too. `query_block`: queries that are
        compared with all keys at a time, which bounds memory (`attend_by_block`); None: all of them.
        """
        init = fan_in_init(width)
        self.rope_base, self.qk_norm, self.causal = rope_base, qk_norm, causal
        self.query_block = query_block
        kv = "H" if kv_heads > 1 else None  # one head for all cannot be spread
        self.wq = nnx.Param(init(rngs.params(), (width, heads, head_dim)), axes=("D", "H", None))
        self.wk = nnx.Param(init(rngs.params(), (width, kv_heads, head_dim)), axes=("D", kv, None))
        self.wv = nnx.Param(init(rngs.params(), (width, kv_heads, head_dim)), axes=("D", kv, None))
        self.wo = nnx.Param(
            fan_in_init(heads * head_dim, out_scale)(rngs.params(), (heads, head_dim, width)),
            axes=("H", None, "D"),
        )
        if qk_norm != "none":
            sizes = (
                (head_dim, head_dim)
                if qk_norm == "head"
                else (heads * head_dim, kv_heads * head_dim)
            )
            self.q_norm = RMSNorm(sizes[0], norm_eps)
            self.k_norm = RMSNorm(sizes[1], norm_eps)

    def _normalise(self, q: Array, k: Array) -> tuple[Array, Array]:
        if self.qk_norm == "none":
            return q, k
        if self.qk_norm == "head":
            return self.q_norm(q), self.k_norm(k)
        flat = [x.reshape(*x.shape[:2], -1) for x in (q, k)]
        return self.q_norm(flat[0]).reshape(q.shape), self.k_norm(flat[1]).reshape(k.shape)

    def heads(self, x: Float[Array, "B S D"]) -> Heads:
        """Projects and normalises; nothing is rotated yet."""
        q, k = self._normalise(project(x, self.wq[...]), project(x, self.wk[...]))
        return Heads(q, k, project(x, self.wv[...]))

    def rotated(self, heads: Heads, positions: Int[Array, "B S"]) -> Heads:
        """Turns queries and keys to their positions."""
        q, k = (rotary(a, positions, self.rope_base) for a in (heads.query, heads.key))
        return Heads(q, k, heads.value)

    def merged(self, out: Float[Array, "B S H X"]) -> Float[Array, "B S D"]:
        """The output projection of all heads."""
        return project(out, self.wo[...], inputs=2)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        segments: Int[Array, "B S"],
        cache: KeyValues | None = None,
        start: Int[Array, ""] | None = None,
        prefix: Bool[Array, "B S"] | None = None,
    ) -> tuple[Float[Array, "B S D"], KeyValues | None]:
        """Attends to earlier positions of the same document, or to all of them.

        Args:
            x: inputs in the compute dtype.
            positions: for the rotation.
            segments: document of each position; 0 is padding and attends to padding only.
            cache: keys and values so far; with it, `x` stands at `start, start + 1, ...` of one
                document, or of those that its `segment` keeps apart.
            start: how many positions of the cache are filled.
            prefix: positions that all of their document see, earlier ones too: a prefix language
                model (Raffel et al. 2020, arXiv:1910.10683, figure 4). In generation the whole
                prefix is in one call: what is in the cache saw nothing of it.

        Returns:
            The output (before the residual) and the cache with these positions in it.
        """
        heads = self.rotated(self.heads(x), positions)
        out, cache = attend(
            heads,
            segments,
            cache,
            start,
            causal=self.causal,
            query_block=self.query_block,
            prefix=prefix,
        )
        return self.merged(out), cache


def attend(
    heads: Heads,
    segments: Int[Array, "B S"],
    cache: KeyValues | None,
    start: Int[Array, ""] | None,
    *,
    causal: bool = True,
    query_block: int | None = None,
    prefix: Bool[Array, "B S"] | None = None,
) -> tuple[Float[Array, "B S H X"], KeyValues | None]:
    """What each query head finds in its document; arguments as for `Attention`.

    Where positions are sharded, each device compares its own queries with the keys of all.
    """
    if cache is None:
        heads = Heads(
            cut_positions(heads.query), gather_positions(heads.key), gather_positions(heads.value)
        )
        if query_block is not None:
            out = attend_by_block(heads, segments, query_block, causal=causal, prefix=prefix)
            return out, None
        mask = segments[:, None, :, None] == gather_positions(segments)[:, None, None, :]
        if causal and prefix is not None:
            before = jnp.tri(segments.shape[1], dtype=bool)[None, None]
            mask, causal = mask & (before | gather_positions(prefix)[:, None, None, :]), False
        return jax.nn.dot_product_attention(*heads, mask=mask, is_causal=causal), None
    q, k, v = heads
    assert start is not None
    at = jnp.arange(cache.key.shape[1])
    if prefix is not None:
        prefix = write(jnp.zeros(cache.key.shape[:2], bool), prefix, start)
    mask = _at_or_before(start + jnp.arange(q.shape[1]), at, prefix)
    segment = cache.segment
    if segment is not None:
        segment = write(segment, segments, start)
        mask = mask & (segments[:, None, :, None] == segment[:, None, None, :])
    cache = KeyValues(write(cache.key, k, start), write(cache.value, v, start), segment)
    return jax.nn.dot_product_attention(q, cache.key, cache.value, mask=mask), cache


def attend_by_block(
    heads: Heads,
    segments: Int[Array, "B S"],
    block: int,
    *,
    causal: bool = True,
    prefix: Bool[Array, "B S"] | None = None,
) -> Float[Array, "B S H X"]:
    """`attend` with `[B H block S]` weights at a time instead of `[B H S S]`.

    The backward pass computes the weights of a block again, so that no block's are kept. Where
    positions are sharded, every device works on `block` queries of its own share at a time.

    Args:
        heads: rotated; keys and values of all positions.
        segments: document of each position.
        block: queries at a time, at least 1; a shorter last block is filled up.
        causal: whether queries see no later keys.
        prefix: keys that they see nevertheless.
    """
    B, S = segments.shape
    shards = sequence_shards(S)
    count = -(-S // (shards * block))
    key_segments, key_at = gather_positions(segments)[:, None, None, :], jnp.arange(S)
    prefix = None if prefix is None else gather_positions(prefix)

    def cut(a: Shaped[Array, "B S ..."]) -> Shaped[Array, "count B Q ..."]:
        a, rest = a.reshape(a.shape[0], shards, S // shards, *a.shape[2:]), a.shape[2:]
        fill = [(0, 0), (0, 0), (0, count * block - S // shards), *[(0, 0)] * len(rest)]
        a = jnp.pad(a, fill).reshape(a.shape[0], shards, count, block, *rest)
        return jnp.moveaxis(a, 2, 0).reshape(count, a.shape[0], shards * block, *rest)

    def one(part: tuple[Array, Array, Array]) -> Float[Array, "B Q H X"]:
        query, segment, at = part
        mask = segment[:, None, :, None] == key_segments
        if causal:
            mask = mask & _at_or_before(at, key_at, prefix)
        return jax.nn.dot_product_attention(query, heads.key, heads.value, mask=mask)

    parts = cut(heads.query), cut(segments), cut(key_at[None])
    out = jax.lax.map(jax.checkpoint(one, prevent_cse=False), parts)
    out = out.reshape(count, B, shards, block, *out.shape[3:])
    out = jnp.moveaxis(out, 0, 2).reshape(B, shards, count * block, *out.shape[4:])
    return out[:, :, : S // shards].reshape(heads.query.shape)


def check(*, query_block: int | None) -> None:
    """Checks the options of full attention.

    Raises:
        ConfigError: a block without a query.
    """
    if query_block is not None and query_block < 1:
        raise ConfigError(
            f"attention.query_block={query_block} must be at least 1 query at a time, or none for all of "
            "them at once."
        )


def write(
    cache: Shaped[Array, "B L ..."], new: Shaped[Array, "B S ..."], start: Int[Array, ""]
) -> Shaped[Array, "B L ..."]:
    """The cache with `new` at positions `start, start + 1, ...`."""
    return jax.lax.dynamic_update_slice_in_dim(cache, new.astype(cache.dtype), start, axis=1)


def _at_or_before(
    queries: Int[Array, "... S"], keys: Int[Array, " K"], prefix: Bool[Array, "B K"] | None
) -> Bool[Array, "B 1 S K"]:
    """Which places each query sees: those up to its own, and those of the prefix; `B` may be 1."""
    seen = jnp.atleast_2d(queries)[:, None, :, None] >= keys[None, None, None]
    return seen if prefix is None else seen | prefix[:, None, None, :]
