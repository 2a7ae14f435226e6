"""Block attention (MoBA): each query attends to its own block and to the best `top_k - 1` earlier ones."""

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.errors import ConfigError
from moe.model.attention import Attention, KeyValues, write
from moe.model.attention_types import AttentionOutput
from moe.model.spans import (
    Places,
    best_of,
    complete_spans,
    earlier,
    places,
    same_span,
    span_means,
    visible,
)


class BlockAttention(nnx.Module):
    """Causal attention to `top_k` blocks of keys for each query and head (Lu et al. 2025, arXiv:2502.13189).

    score(t, j) = q_t . mean of the keys of block j, after the rotation, for blocks before the query's
    own; the own block is always taken, with the causal mask inside, and counts as one of them.
    Blocks are cut inside documents: a block is the tokens of one document with the same
    `position // block`. No parameters beside those of full attention, which it equals where
    `top_k` is at least the number of blocks.

    A query reads `top_k * block` keys. Scores and mask are computed for all pairs all the same: this
    measures what the restriction does to the model, not the speed of a kernel that skips blocks.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        block: int = 64,
        top_k: int = 3,
        rngs: nnx.Rngs,
        **attention: Any,
    ):
        """`block`: tokens a block. `top_k`: blocks a query, its own included. Rest: see `Attention`."""
        check(block=block, top_k=top_k)
        self.block, self.top_k = block, top_k
        self.full = Attention(width, heads, kv_heads, head_dim, rngs=rngs, **attention)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        segments: Int[Array, "B S"],
        cache: KeyValues | None = None,
        start: Int[Array, ""] | None = None,
    ) -> AttentionOutput:
        """Attends to chosen blocks of the same document; arguments as for `Attention`."""
        q, k, v = self.full.rotated(self.full.heads(x), positions)
        if cache is None:
            queries, keys = places(positions, segments)
        else:
            assert start is not None
            if cache.segment is not None:
                raise ConfigError(
                    "block attention needs every position of the text: its blocks are neighbours. Where "
                    "layers leave tokens out, set attention.name='full'."
                )
            k, v = write(cache.key, k, start), write(cache.value, v, start)
            cache = KeyValues(k, v)
            queries, keys = places(positions, segments, k.shape[1], start)
        mask = block_mask(q, k, queries, keys, block=self.block, top_k=self.top_k)
        out = jax.nn.dot_product_attention(q, k, v, mask=mask)
        return AttentionOutput(self.full.merged(out), cache)


def block_mask(
    q: Float[Array, "B S H X"],
    keys: Float[Array, "B L Q X"],
    query_places: Places,
    key_places: Places,
    *,
    block: int,
    top_k: int,
) -> Bool[Array, "B H S L"]:
    """Which keys each query of each head attends to; a decision, hence without gradient."""
    batch, _, heads, _ = q.shape
    count = max(keys.shape[1] // block, 1)
    seen = visible(query_places, key_places)
    own = (seen & same_span(query_places, key_places, block))[:, None]
    own = jnp.broadcast_to(own, (batch, heads, *own.shape[2:]))
    if top_k == 1:
        return own
    spans = complete_spans(key_places, block, count)
    past = earlier(query_places, spans)[:, :, None]  # [B S 1 M]
    chosen = best_of(block_scores(q, span_means(keys, spans)), past, top_k - 1)
    member = spans.member.astype(jnp.float32)
    return own | (jnp.einsum("bshm,bml->bhsl", chosen.astype(jnp.float32), member) > 0.5)


def block_scores(
    q: Float[Array, "B S H X"], means: Float[Array, "B M Q X"]
) -> Float[Array, "B S H M"]:
    """Product of each query with the mean key of each block, in float32."""
    batch, size, heads, width = q.shape
    groups = means.shape[2]
    grouped = q.astype(jnp.float32).reshape(batch, size, groups, heads // groups, width)
    return jnp.einsum("bsgrx,bmgx->bsgrm", grouped, means, precision="highest").reshape(
        batch, size, heads, -1
    )


def check(*, block: int, top_k: int, sequence_length: int = 0) -> None:
    """Raises ConfigError for a block that is none or all of the text, or a query without blocks."""
    if block < 1:
        raise ConfigError(f"block={block} must be at least 1: it is the number of tokens a block.")
    if sequence_length and block > sequence_length:
        raise ConfigError(
            f"block={block} is longer than data.sequence_length={sequence_length}: there would be "
            "nothing to choose. Set block to a part of the sequence, or attention.name='full'."
        )
    if top_k < 1:
        raise ConfigError(
            f"top_k={top_k} must be at least 1: the query's own block is always one of them. "
            "top_k=1 attends to the own block only."
        )
