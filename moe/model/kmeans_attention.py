"""K-means attention (Routing Transformer): queries meet the keys of their own cluster only."""

from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.errors import ConfigError
from moe.model.attention import Attention, Heads, write
from moe.model.attention_types import AttentionOutput
from moe.model.spans import Places, places, visible
from moe.routing.selection import select

MODES = ("causal", "top_w")


class ClusterCache(NamedTuple):
    """Keys and values so far, and the cluster of each key."""

    key: Float[Array, "B L Q X"]
    value: Float[Array, "B L Q X"]
    cluster: Int[Array, "B L Q"]


class KMeansAttention(nnx.Module):
    """Attention inside clusters of queries and keys (Roy et al. 2021, arXiv:2003.05997).

    Queries and keys, layer-normalised to unit length and not yet rotated, are compared with the unit
    vectors of the centroids of their key/value head: clusters are about content, not place. What
    attends is the query and the key of full attention. Two modes:

    - "top_w": each cluster takes the `window` queries and the `window` keys nearest to its centroid and
      attends inside, with the causal mask; a token in several clusters gets the mean of those where it
      saw anything, a token in none gets 0. Cost `clusters * window^2`, n^1.5 for window = clusters =
      sqrt(n). Who is a member depends on the whole row: causality C3, no cached generation.
    - "causal": each query and key belongs to its nearest centroid alone; a query sees the earlier keys
      of its cluster and itself. C1. Clusters have no bound, so all pairs are computed and masked.

    Differs from the paper: queries and keys do not share their projection, and the centroids are
    parameters that follow the gradient of the term "commitment", so that a step stays a pure function
    of parameters and batch. One step of gradient descent on it is the paper's moving average: with
    rate r a centroid with n of all N queries and keys moves to (1 - 2rn/N) mu + (2r/N) (sum of its members).
    Without a weight on that term the clusters are fixed random ones.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        clusters: int = 8,
        mode: str = "causal",
        window: int = 0,
        rngs: nnx.Rngs,
        **attention: Any,
    ):
        """`window`: members a cluster in mode "top_w", 0 for ceil(S / clusters). Rest: see `Attention`."""
        check(clusters=clusters, mode=mode, window=window)
        self.mode, self.window = mode, window
        self.full = Attention(width, heads, kv_heads, head_dim, rngs=rngs, **attention)
        drawn = jax.random.normal(rngs.params(), (kv_heads, clusters, head_dim))
        self.centroids = nnx.Param(_unit(drawn), axes=("H", None, None))

    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        segments: Int[Array, "B S"],
        cache: ClusterCache | None = None,
        start: Int[Array, ""] | None = None,
    ) -> AttentionOutput:
        """Attends inside clusters; arguments as for `Attention`.

        Returns:
            The output, with the term "commitment" [B S]: for each token the mean over heads, queries and
            keys, of the squared distance to the nearest centroid, once for each of the two to move.

        Raises:
            ConfigError: a cache in mode "top_w".
        """
        heads = self.full.heads(x)
        near_q, near_k = self.similarities(heads.query), self.similarities(heads.key)
        turned = self.full.rotated(heads, positions)
        if self.mode == "top_w":
            if cache is not None:
                raise ConfigError(
                    "attention.mode='top_w' cannot generate: members of a cluster are chosen among all "
                    "positions, later ones included. Set attention.mode='causal'."
                )
            here, _ = places(positions, segments)
            size = x.shape[1]
            window = min(self.window or -(-size // near_k.shape[-1]), size)
            out = attend_windows(turned, near_q, near_k, here, window)
        else:
            out, cache = self._attend_causal(
                turned, near_q, near_k, positions, segments, cache, start
            )
        terms = {} if cache is not None else {"commitment": self.commitment(heads, segments > 0)}
        return AttentionOutput(self.full.merged(out), cache, terms=terms)

    def similarities(self, x: Float[Array, "B S N X"]) -> Float[Array, "B S N C"]:
        """Cosine of each query or key (centred) with each centroid of its key/value head."""
        centroids = _unit(self.centroids[...])
        grouped = _grouped(normalised(x), centroids.shape[0])
        near = jnp.einsum("bsgrx,gcx->bsgrc", grouped, centroids, precision="highest")
        return near.reshape(*x.shape[:3], -1)

    def _attend_causal(
        self,
        heads: Heads,
        near_q: Array,
        near_k: Array,
        positions: Array,
        documents: Array,
        cache: ClusterCache | None,
        start: Array | None,
    ) -> tuple[Float[Array, "B S H X"], ClusterCache | None]:
        q, k, v = heads
        of_q, of_k = jnp.argmax(near_q, axis=-1), jnp.argmax(near_k, axis=-1)
        if cache is None:
            queries, keys = places(positions, documents)
        else:
            assert start is not None
            new = zip(cache, (k, v, of_k), strict=True)
            cache = ClusterCache(*(write(old, now, start) for old, now in new))
            k, v, of_k = cache
            queries, keys = places(positions, documents, k.shape[1], start)
        mask = cluster_mask(of_q, of_k, queries, keys)
        return jax.nn.dot_product_attention(q, k, v, mask=mask), cache

    def commitment(self, heads: Heads, valid: Bool[Array, "B S"]) -> Float[Array, "B S"]:
        """Distance to the nearest centroid, for what is assigned and for the centroid to shrink."""
        parts = [self._distance(x) for x in (heads.query, heads.key)]
        return jnp.where(valid, 0.5 * (parts[0] + parts[1]), 0.0)

    def _distance(self, x: Float[Array, "B S N X"]) -> Float[Array, "B S"]:
        centroids = self.centroids[...]
        nearest = jnp.argmax(self.similarities(x), axis=-1)
        chosen = jax.nn.one_hot(nearest, centroids.shape[1])  # [B S N C]
        grouped = _grouped(chosen, centroids.shape[0])
        mine = jnp.einsum("bsgrc,gcx->bsgrx", grouped, centroids, precision="highest")
        mine = mine.reshape(x.shape)  # its centroid, of any length: the mean of unit vectors
        unit, stop = normalised(x), jax.lax.stop_gradient
        each = jnp.square(unit - stop(_unit(mine))) + jnp.square(stop(unit) - mine)
        return each.sum(axis=-1).mean(axis=-1)


def _grouped(x: Float[Array, "B S N Y"], groups: int) -> Float[Array, "B S Q R Y"]:
    return x.reshape(*x.shape[:2], groups, x.shape[2] // groups, x.shape[3])


def _unit(x: Float[Array, "... X"]) -> Float[Array, "... X"]:
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)


def normalised(x: Float[Array, "... X"]) -> Float[Array, "... X"]:
    """Layer normalisation without scale, of unit length, in float32."""
    x = x.astype(jnp.float32)
    return _unit(x - x.mean(axis=-1, keepdims=True))


def cluster_mask(
    of_q: Int[Array, "B S H"], of_k: Int[Array, "B L Q"], queries: Places, keys: Places
) -> Bool[Array, "B H S L"]:
    """Earlier keys of the query's cluster, and the query's own place whatever its key's cluster."""
    of_k = jnp.repeat(of_k, of_q.shape[2] // of_k.shape[2], axis=2)
    same = jnp.swapaxes(of_q, 1, 2)[..., :, None] == jnp.swapaxes(of_k, 1, 2)[..., None, :]
    itself = queries.index[:, :, None] == keys.index[:, None, :]
    return visible(queries, keys)[:, None] & (same | itself[:, None])


def attend_windows(
    heads: Heads,
    near_q: Float[Array, "B S H C"],
    near_k: Float[Array, "B S Q C"],
    here: Places,
    window: int,
) -> Float[Array, "B S H X"]:
    """Attention of each cluster's `window` nearest queries to its `window` nearest keys, averaged.

    Padding is in no cluster.
    """
    q, k, v = heads
    batch, size, groups, width = k.shape
    at_q, at_k = (members(near, here.document > 0, window) for near in (near_q, near_k))
    q, k, v = _pick(q, at_q), _pick(k, at_k), _pick(v, at_k)  # [B H C W X], [B Q C W X]
    row = jnp.where(here.document > 0, here.index, -1)  # [B S]
    place_q, place_k = (_pick_row(row, at) for at in (at_q, at_k))
    doc_q, doc_k = (_pick_row(here.document, at) for at in (at_q, at_k))

    def grouped(a: Array) -> Array:  # [B H ...] to [B Q R ...]
        return a.reshape(batch, groups, -1, *a.shape[2:])

    seen = grouped(place_q)[..., :, None] >= place_k[:, :, None, :, None, :]
    seen &= grouped(doc_q)[..., :, None] == doc_k[:, :, None, :, None, :]
    seen &= (place_k >= 0)[:, :, None, :, None, :]  # [B Q R C W W]
    scores = jnp.einsum("bgrcwx,bgcyx->bgrcwy", grouped(q), k) * width**-0.5
    weights = jax.nn.softmax(scores.astype(jnp.float32), where=seen, axis=-1)
    any_seen = jnp.any(seen, axis=-1)
    weights = jnp.where(any_seen[..., None], weights, 0.0)
    out = jnp.einsum("bgrcwy,bgcyx->bgrcwx", weights, v.astype(jnp.float32))
    out = out.reshape(*at_q.shape, width)
    return _average(out, any_seen.reshape(at_q.shape), at_q, size).astype(heads.value.dtype)


def members(
    near: Float[Array, "B S N C"], valid: Bool[Array, "B S"], window: int
) -> Int[Array, "B N C W"]:
    """The tokens nearest to each centroid; padding comes last."""
    near = jnp.where(valid[:, :, None, None], near, -jnp.inf)
    batch, size, heads, clusters = near.shape
    rows = jnp.moveaxis(near, 1, -1).reshape(batch, heads * clusters, size)
    return select(rows, window).reshape(batch, heads, clusters, window)


def _pick(x: Float[Array, "B S N X"], at: Int[Array, "B N C W"]) -> Float[Array, "B N C W X"]:
    """x[b, at[b, n, c, w], n]."""
    per_head = jax.vmap(lambda x, at: x[at])  # [N S X], [N C W]
    return jax.vmap(per_head)(jnp.swapaxes(x, 1, 2), at)


def _pick_row(x: Int[Array, "B S"], at: Int[Array, "B N C W"]) -> Int[Array, "B N C W"]:
    return jax.vmap(lambda x, at: x[at])(x, at)


def _average(
    out: Float[Array, "B H C W X"],
    counted: Bool[Array, "B H C W"],
    at: Int[Array, "B H C W"],
    size: int,
) -> Float[Array, "B S H X"]:
    """Mean, for each token, of its outputs in the clusters where it saw a key; 0 where there are none."""

    def scatter(out: Array, counted: Array, at: Array) -> Array:  # of one head
        flat = at.reshape(-1)
        total = jnp.zeros((size, out.shape[-1])).at[flat].add(out.reshape(len(flat), -1))
        count = jnp.zeros(size).at[flat].add(counted.reshape(-1).astype(jnp.float32))
        return total / jnp.maximum(count, 1.0)[:, None]

    return jnp.swapaxes(jax.vmap(jax.vmap(scatter))(out, counted, at), 1, 2)


def empty_cache(
    batch: int, length: int, *, kv_heads: int, head_dim: int, dtype: jnp.dtype
) -> ClusterCache:
    """A cache of `length` positions."""
    zeros = jnp.zeros((batch, length, kv_heads, head_dim), dtype)
    return ClusterCache(zeros, zeros, jnp.zeros((batch, length, kv_heads), jnp.int32))


def check(*, clusters: int, mode: str, window: int, sequence_length: int = 0) -> None:
    """Raises ConfigError for an unknown mode or numbers that make no clusters."""
    if mode not in MODES:
        raise ConfigError(
            f"mode={mode!r} is not a mode of k-means attention; there are {', '.join(MODES)}. Use "
            "'causal' for a language model: 'top_w' chooses members among later tokens too."
        )
    if clusters < 1:
        raise ConfigError(f"clusters={clusters} must be at least 1; 1 is full attention.")
    if window < 0:
        raise ConfigError(
            f"window={window} must not be negative: it is the number of members a cluster, 0 for "
            "the sequence length divided by attention.clusters."
        )
    if sequence_length and max(window, clusters) > sequence_length:
        raise ConfigError(
            f"window={window} and clusters={clusters} must be at most data.sequence_length="
            f"{sequence_length}: a cluster has no more members, and there are no more clusters, than "
            "tokens. sqrt(data.sequence_length) for both is the usual choice."
        )
    if window and mode == "causal":
        raise ConfigError(
            f"window={window} with mode='causal': clusters of that mode have no fixed size. Set "
            "window=0, or mode='top_w' in a model that need not be causal."
        )
