"""K-means attention against plain loops in both modes, its centroids, and what it may never see."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import ConfigError
from moe.model.kmeans_attention import ClusterCache, KMeansAttention, members, normalised
from tests.model import variants
from tests.model.variants import H, Q, X

PACKED = ([13], [5, 7], [2, 1, 6])


@pytest.fixture(scope="module")
def packed():
    return variants.inputs(*PACKED)


def plain_near(module, x) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of queries and keys, both [B S H C], keys repeated for every query head."""
    heads = module.full.heads(x)
    centroids = np.asarray(module.centroids[...], np.float64)
    centroids /= np.linalg.norm(centroids, axis=-1, keepdims=True)
    near = []
    for each in (heads.query, heads.key):
        each = np.asarray(each, np.float64).repeat(H // each.shape[2], axis=2)
        each = each - each.mean(axis=-1, keepdims=True)
        each /= np.linalg.norm(each, axis=-1, keepdims=True)
        near.append(np.einsum("bshx,hcx->bshc", each, centroids.repeat(H // Q, axis=0)))
    return near[0], near[1]


def plain_row(q, k, v, rows, t, h) -> np.ndarray:
    weights = variants.plain_softmax(k[rows, h] @ q[t, h] / np.sqrt(X))
    return weights @ v[rows, h]


def plain_causal(module, x, positions, documents) -> np.ndarray:
    q, k, v = variants.plain_heads(module.full, x, positions)
    documents = np.asarray(documents)
    of_q, of_k = (near.argmax(axis=-1) for near in plain_near(module, x))
    out = np.zeros_like(q)
    for b, t, h in np.ndindex(q.shape[:3]):
        rows = [s for s in range(t + 1) if documents[b, s] == documents[b, t]]
        rows = [s for s in rows if s == t or of_k[b, s, h] == of_q[b, t, h]]
        out[b, t, h] = plain_row(q[b], k[b], v[b], rows, t, h)
    return variants.plain_output(module.full, out)


def plain_top_w(module, x, positions, documents, window: int) -> np.ndarray:
    q, k, v = variants.plain_heads(module.full, x, positions)
    documents = np.asarray(documents)
    near_q, near_k = plain_near(module, x)
    out, count = np.zeros_like(q), np.zeros(q.shape[:3])
    for b, h, c in np.ndindex(q.shape[0], H, near_q.shape[-1]):
        valid = np.flatnonzero(documents[b] > 0)
        of_q = valid[np.argsort(-near_q[b, valid, h, c])][:window]
        of_k = valid[np.argsort(-near_k[b, valid, h, c])][:window]
        for t in of_q:
            rows = [s for s in of_k if s <= t and documents[b, s] == documents[b, t]]
            if rows:
                out[b, t, h] += plain_row(q[b], k[b], v[b], rows, t, h)
                count[b, t, h] += 1
    return variants.plain_output(module.full, out / np.maximum(count, 1)[..., None])


def test_causal_mode_equals_plain_loops(packed):
    module = variants.attention(KMeansAttention, clusters=3)
    valid = np.asarray(packed[2]) > 0
    result = jax.jit(module)(*packed).output
    assert jnp.isfinite(result).all()
    expected = plain_causal(module, *packed)
    np.testing.assert_allclose(result[valid], expected[valid], atol=1e-5)


@pytest.mark.parametrize(("clusters", "window"), [(3, 0), (2, 9), (4, 2)])
def test_top_w_mode_equals_plain_loops(packed, clusters, window):
    module = variants.attention(KMeansAttention, clusters=clusters, mode="top_w", window=window)
    result = jax.jit(module)(*packed).output
    expected = plain_top_w(module, *packed, window or -(-13 // clusters))
    np.testing.assert_allclose(result, expected, atol=1e-5)


@pytest.mark.parametrize("mode", ["causal", "top_w"])
def test_one_cluster_is_full_attention_in_output_and_gradient(packed, mode):
    module = variants.attention(KMeansAttention, clusters=1, mode=mode)
    x, positions, documents = packed
    valid = (documents > 0)[..., None]

    def routed(x):
        return jnp.where(valid, module(x, positions, documents).output, 0.0)

    def full(x):
        return jnp.where(valid, module.full(x, positions, documents)[0], 0.0)

    @jax.jit
    def both(x):
        pairs = [
            jax.value_and_grad(lambda x, f=f: jnp.sum(jnp.sin(f(x))))(x) for f in (routed, full)
        ]
        return routed(x) - full(x), pairs[0][1] - pairs[1][1]

    for difference in both(x):
        assert np.abs(difference).max() < 1e-5


@pytest.mark.parametrize("at", [3, 8])
def test_causal_mode_never_sees_later_tokens(packed, at):
    module = variants.attention(KMeansAttention, clusters=3)
    before, after = variants.future_leaks(module, *packed, at)
    assert before < 1e-6
    assert after > 0.01


def test_top_w_mode_leaks_through_membership(packed):
    """Its mask is causal, its choice of members is not: declared C3."""
    module = variants.attention(KMeansAttention, clusters=3, mode="top_w")
    before, _ = variants.future_leaks(module, *packed, 8)
    assert before > 0.01


def test_documents_do_not_see_each_other(packed):
    x, positions, documents = packed
    module = variants.attention(KMeansAttention, clusters=2)
    call = jax.jit(lambda x: module(x, positions, documents).output)
    moved = np.abs(call(x) - call(x.at[1, :5].add(1.0))).max(axis=-1)
    assert moved[1, :5].max() > 0.01
    assert moved[1, 5:12].max() < 1e-6


def test_padding_takes_no_place_in_a_cluster(packed):
    near = jnp.broadcast_to(jnp.arange(13.0)[None, :, None, None], (3, 13, 1, 1))
    chosen = members(near, packed[2] > 0, 4)  # the nearest tokens are the last ones
    np.testing.assert_array_equal(chosen[2, 0, 0], [8, 7, 6, 5])


def test_cached_steps_equal_teacher_forcing():
    module = variants.attention(KMeansAttention, clusters=3)
    zeros = jnp.zeros((2, 14, Q, X))
    cache = ClusterCache(zeros, zeros, jnp.zeros((2, 14, Q), jnp.int32))
    variants.cached_equals_full(module, cache, length=12, prompt=4)


def test_generation_with_top_w_is_refused():
    module = variants.attention(KMeansAttention, clusters=2, mode="top_w")
    zeros = jnp.zeros((1, 4, Q, X))
    cache = ClusterCache(zeros, zeros, jnp.zeros((1, 4, Q), jnp.int32))
    x, positions, documents = variants.inputs([2])
    with pytest.raises(ConfigError, match="later ones included"):
        jax.eval_shape(module, x, positions, documents, cache, jnp.int32(0))


def test_a_gradient_step_on_the_centroids_is_a_moving_average(packed):
    module = variants.attention(KMeansAttention, clusters=3)
    x, _, documents = packed
    graph, params = nnx.split(module)
    valid, rate = documents > 0, 0.1

    @jax.jit
    @jax.grad
    def gradient(params):
        merged = nnx.merge(graph, params)
        terms = merged(x, *packed[1:]).terms["commitment"]
        return terms.sum() / valid.sum()

    stepped = module.centroids[...] - rate * gradient(params)["centroids"][...]
    heads, expected = module.full.heads(x), np.array(module.centroids[...], np.float64)
    near_q, near_k = (near[np.asarray(valid)].argmax(-1) for near in plain_near(module, x))  # [N H]
    unit_q = np.asarray(normalised(heads.query))[np.asarray(valid)]
    unit_k = np.asarray(normalised(heads.key))[np.asarray(valid)].repeat(H // Q, axis=1)
    total = len(near_q) * H  # queries; keys count once for each query head that shares them
    for g, c in np.ndindex(Q, 3):
        of = slice(g * (H // Q), (g + 1) * (H // Q))
        for near, unit in ((near_q, unit_q), (near_k, unit_k)):
            mine = unit[:, of][near[:, of] == c]
            expected[g, c] += (
                rate / total * (mine.sum(0) - len(mine) * np.asarray(module.centroids[g, c]))
            )
    np.testing.assert_allclose(stepped, expected, atol=1e-5)


def test_commitment_is_zero_on_centroids_and_pulls_the_queries(packed):
    x, positions, documents = packed
    module = variants.attention(KMeansAttention, clusters=3)
    out = jax.jit(lambda x: module(x, positions, documents).terms["commitment"])
    term = out(x)
    assert term.shape == x.shape[:2]
    np.testing.assert_array_equal(term == 0.0, documents == 0)
    gradient = jax.jit(jax.grad(lambda x: out(x).sum()))(x)
    assert np.abs(gradient).max() > 0.01
    np.testing.assert_array_less(out(x - 0.01 * gradient).sum(), term.sum())
    # One cluster whose centroid is the only token: nothing left to shrink.
    one = variants.attention(KMeansAttention, clusters=1)
    heads = one.full.heads(x[:1, :1])
    one.centroids[...] = normalised(heads.key)[0, 0, :, None]
    assert one._distance(heads.key).max() < 1e-6


def test_fresh_centroids_are_unit_vectors_and_their_length_routes_nothing(packed):
    rngs = nnx.Rngs(params=0)
    module = KMeansAttention(8, H, Q, X, rngs=rngs, **variants.COMMON)
    np.testing.assert_allclose(jnp.linalg.norm(module.centroids[...], axis=-1), 1.0, rtol=1e-5)
    similarities = jax.jit(lambda module, x: module.similarities(module.full.heads(x).key))
    before = similarities(module, packed[0])
    module.centroids[...] = 7.0 * module.centroids[...]
    np.testing.assert_allclose(similarities(module, packed[0]), before, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"clusters": 0}, "clusters"),
        ({"mode": "nearest"}, "top_w"),
        ({"window": -1}, "window"),
        ({"window": 4}, "mode='causal'"),
    ],
)
def test_impossible_options_are_refused(options, name):
    with pytest.raises(ConfigError, match=name):
        variants.attention(KMeansAttention, **options)
