"""Segment attention against plain loops, its limits, and what it may never see."""

from functools import partial

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe.errors import ConfigError
from moe.model.segment_attention import (
    CrossAttention,
    SegmentAttention,
    SegmentCache,
    local_attention,
)
from moe.model.segment_sizes import size_weights
from moe.model.spans import places, same_span, visible
from tests.model import variants
from tests.model.variants import D, H, Q, X

PACKED = ([13], [5, 7], [2, 1, 6])


@pytest.fixture(scope="module")
def packed():
    return variants.inputs(*PACKED)


def plain_cross(cross, hidden, members: list[list[int]], t: int, top_k: int) -> np.ndarray:
    """What token `t` of one row takes from the segments `members`, of mean summaries."""
    wq, wk, wv, wo, null = (
        np.asarray(w[...], np.float64) for w in (cross.wq, cross.wk, cross.wv, cross.wo, cross.null)
    )
    out = np.zeros(D)
    for h in range(H):
        q = hidden[t] @ wq[:, h] / np.sqrt(X)
        means = [hidden[rows].mean(axis=0) for rows in members]
        means.sort(key=lambda s: -(q @ (s @ wk[:, h])))
        means = means[: top_k or None]
        alpha = variants.plain_softmax(
            np.array([q @ null[h], *(q @ (s @ wk[:, h]) for s in means)])
        )
        out += (
            sum((a * s @ wv[:, h] for a, s in zip(alpha[1:], means, strict=True)), np.zeros(X))
            @ wo[h]
        )
    return out


def plain(module, x, positions, documents, size: int, top_k: int) -> np.ndarray:
    q, k, v = variants.plain_heads(module.full, x, positions)
    inner = np.zeros_like(q)
    for b, t, h in np.ndindex(q.shape[:3]):
        rows = [s for s in range(t + 1) if documents[b, s] == documents[b, t]]
        rows = [s for s in rows if positions[b, s] // size == positions[b, t] // size]
        inner[b, t, h] = (
            variants.plain_softmax(k[b, rows, h] @ q[b, t, h] / np.sqrt(X)) @ v[b, rows, h]
        )
    y = variants.plain_output(module.full, inner)
    hidden = np.asarray(x, np.float64) + y
    for b, t in np.ndindex(*documents.shape):
        segments: dict[int, list[int]] = {}
        for s in range(t + 1):
            if documents[b, s] == documents[b, t] > 0:
                segments.setdefault(int(positions[b, s]) // size, []).append(s)
        segments.pop(int(positions[b, t]) // size, None)
        y[b, t] += plain_cross(module.cross, hidden[b], list(segments.values()), t, top_k)
    return y


@pytest.mark.parametrize(("segment", "top_k"), [(3, 0), (2, 1), (2, 2), (1, 0)])
def test_equals_plain_loops(packed, segment, top_k):
    module = variants.attention(SegmentAttention, segment=segment, top_k=top_k)
    x, positions, documents = packed
    expected = plain(module, x, positions, np.asarray(documents), segment, top_k)
    result = jax.jit(module)(*packed).output
    assert jnp.isfinite(result).all()
    valid = np.asarray(documents) > 0
    np.testing.assert_allclose(result[valid], expected[valid], atol=2e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_local_attention_equals_masked_attention_and_gradient(packed, size):
    _, positions, documents = packed
    here, _ = places(positions, documents)
    valid = (documents > 0)[..., None, None]
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(3, 13, n, X)), jnp.float32) for n in (H, Q, Q))
    mask = (visible(here, here) & same_span(here, here, size))[:, None]

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def local(q, k, v):
        out = jnp.where(valid, local_attention(q, k, v, here, size), 0.0)
        return jnp.sum(jnp.sin(out)), out

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def masked(q, k, v):
        out = jnp.where(valid, jax.nn.dot_product_attention(q, k, v, mask=mask), 0.0)
        return jnp.sum(jnp.sin(out)), out

    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), local(q, k, v), masked(q, k, v))


@pytest.mark.parametrize("combine", ["attention", "concat"])
def test_one_segment_is_full_attention(packed, combine):
    module = variants.attention(SegmentAttention, segment=13, combine=combine)
    valid = packed[2] > 0
    full = jax.jit(lambda x: module.full(x, *packed[1:])[0])(packed[0])
    np.testing.assert_allclose(jax.jit(module)(*packed).output[valid], full[valid], atol=1e-6)


def test_concat_is_segments_as_documents_of_their_own(packed):
    module = variants.attention(SegmentAttention, segment=4, combine="concat")
    x, positions, documents = packed
    of = documents * 100 + positions // 4
    alone = jax.jit(lambda x: module.full(x, positions, of)[0])(x)
    valid = documents > 0
    np.testing.assert_allclose(jax.jit(module)(*packed).output[valid], alone[valid], atol=1e-6)
    assert not hasattr(module, "cross")


def cross(seed: int = 0) -> CrossAttention:
    return variants.drawn(lambda rngs: CrossAttention(D, H, X, out_scale=1.0, rngs=rngs), seed)


def test_weights_sum_to_one_and_leave_nothing_for_what_is_not_allowed():
    module, rng = cross(), np.random.default_rng(0)
    weights = jax.jit(module.weights)
    tokens = jnp.asarray(rng.normal(size=(2, 5, D)), jnp.float32)
    summaries = jnp.asarray(rng.normal(size=(2, 3, D)), jnp.float32)
    allowed = jnp.asarray(rng.random((2, 5, 3)) < 0.5).at[0, 0].set(False)
    alpha = weights(tokens, summaries, allowed)
    np.testing.assert_allclose(alpha.sum(axis=-1), 1.0, rtol=1e-5)
    assert (alpha[..., :-1] > 0.0).any(axis=2)[allowed].all()
    np.testing.assert_array_equal(alpha[0, 0, :, -1], 1.0)
    assert (
        np.asarray(alpha[..., :-1])[~np.broadcast_to(allowed[:, :, None], (2, 5, H, 3))] == 0
    ).all()
    np.testing.assert_array_equal(module(tokens, summaries, allowed)[0, 0], 0.0)
    # Copies of one segment share alike, and a query of zeros has no preference.
    copies = weights(tokens, summaries.at[:, 2].set(summaries[:, 0]), jnp.ones_like(allowed))
    np.testing.assert_allclose(copies[..., 0], copies[..., 2], rtol=1e-5)
    even = weights(0.0 * tokens, summaries, jnp.ones_like(allowed))
    np.testing.assert_allclose(even, 0.25, rtol=1e-6)


def test_sparse_weights_keep_the_largest_and_learn_through_them():
    module, rng = cross(), np.random.default_rng(0)
    tokens = jnp.asarray(rng.normal(size=(1, 4, D)), jnp.float32)
    summaries = jnp.asarray(rng.normal(size=(1, 5, D)), jnp.float32)
    allowed = jnp.ones((1, 4, 5), bool)
    weights = jax.jit(module.weights, static_argnums=3)
    dense, sparse = (weights(tokens, summaries, allowed, k) for k in (0, 2))
    kept = np.asarray(sparse[..., :-1]) > 0
    assert (kept.sum(axis=-1) == 2).all()
    largest = np.argsort(-np.asarray(dense[..., :-1]), axis=-1)[..., :2]
    assert np.take_along_axis(kept, largest, axis=-1).all()
    np.testing.assert_allclose(sparse.sum(axis=-1), 1.0, rtol=1e-5)
    learned = jax.jit(jax.grad(lambda s: jnp.sum(jnp.sin(module(tokens, s, allowed, 2)))))
    gradient = learned(summaries)
    assert np.abs(gradient).max() > 0.01
    np.testing.assert_allclose(weights(tokens, summaries, allowed, 5), dense, rtol=1e-6)


def test_last_token_pooling_sees_the_whole_earlier_segment_through_it(packed):
    module = variants.attention(SegmentAttention, segment=4, pool="last")
    x, positions, documents = packed
    call = jax.jit(lambda x: module(x, positions, documents).output[0])
    moved = np.abs(call(x) - call(x.at[0, 1].add(1.0))).max(axis=-1)
    assert (moved[[1, 2, 3, 4, 8, 12]] > 1e-4).all()
    mean = jax.jit(variants.attention(SegmentAttention, segment=4))(*packed).output
    assert np.abs(call(x)[4:] - mean[0, 4:]).max() > 0.01


@pytest.mark.parametrize(
    "options",
    [
        {"segment": 3},
        {"segment": 2, "top_k": 1, "pool": "last"},
        {"size": "learned", "sequence_length": 13},
    ],
)
def test_no_output_depends_on_later_tokens(packed, options):
    module = variants.attention(SegmentAttention, **options)
    before, after = variants.future_leaks(module, *packed, 8)
    assert before < 1e-6
    assert after > 0.01


def test_documents_do_not_see_each_other(packed):
    x, positions, documents = packed
    module = variants.attention(SegmentAttention, segment=2)
    call = jax.jit(module)
    moved = np.abs(call(*packed).output - call(x.at[1, :5].add(1.0), *packed[1:]).output).max(-1)
    assert moved[1, 4] > 0.01
    assert moved[1, 5:12].max() < 1e-6
    alone = call(x[1:2, 5:12], positions[1:2, 5:12], documents[1:2, 5:12]).output
    np.testing.assert_allclose(call(*packed).output[1:2, 5:12], alone, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"segment": 3},
        {"segment": 2, "top_k": 2, "pool": "last"},
        {"size": "learned", "sequence_length": 12},
    ],
)
def test_cached_steps_equal_teacher_forcing(options):
    module = variants.attention(SegmentAttention, **options)
    zeros = jnp.zeros((2, 14, Q, X))
    cache = SegmentCache(zeros, zeros, jnp.zeros((2, 14, len(module.sizes), D)))
    variants.cached_equals_full(module, cache, length=12, prompt=4)


def test_a_learned_size_is_the_mixture_of_its_ratios(packed):
    learned = variants.attention(SegmentAttention, size="learned", sequence_length=13)
    fixed = []
    for ratio in (1 / 4, 1 / 3, 1 / 2):
        module = variants.attention(SegmentAttention, size="ratio", ratio=ratio, sequence_length=13)
        module.full, module.cross = learned.full, learned.cross
        fixed.append(module)
    assert [module.sizes for module in fixed] == [(4,), (5,), (6,)]
    weights = jax.nn.softmax(learned.size_logits[...])

    @jax.jit
    def outputs(x):
        return [module(x, *packed[1:]).output for module in (learned, *fixed)]

    mixed, *each = outputs(packed[0])
    np.testing.assert_allclose(mixed, sum(map(jnp.multiply, weights, each)), atol=1e-5)
    assert np.abs(each[0] - each[2])[np.asarray(packed[2]) > 0].max() > 0.01


def test_straight_through_takes_one_size_and_still_learns_which(packed):
    module = variants.attention(
        SegmentAttention,
        size="learned",
        sequence_length=13,
        mixture="straight_through",
        combine="concat",
    )
    graph, params = nnx.split(module)

    @jax.jit
    @jax.value_and_grad
    def loss(params, key):
        return jnp.sum(jnp.sin(nnx.merge(graph, params)(*packed, key=key).output))

    values = {}
    for seed in range(8):
        key = jax.random.key(seed)
        value, gradient = loss(params, key)
        size = int(size_weights(module.size_logits[...], "straight_through", key).argmax())
        np.testing.assert_allclose(values.setdefault(size, value), value, rtol=1e-6)
        assert np.abs(gradient["size_logits"][...]).max() > 0.0
    assert len({round(float(value), 3) for value in values.values()}) == len(values) > 1


def found_segments(shuffled: bool) -> float:
    """Trains the weights to recall what one marked earlier segment holds, and reads where they look.

    Rows of four segments of two tokens. One of the first three holds a mark and a value, the others
    other values without a mark; the last token is asked for the value. `shuffled` asks each row for
    the value of another row. Returns how often the largest weight, over heads, is on the marked one.
    """
    rng, rows = np.random.default_rng(0), 256
    at, every = rng.integers(0, 3, rows), np.arange(rows)
    values = rng.integers(0, 6, (rows, 3))
    x = 0.1 * rng.normal(size=(rows, 8, D))
    for j in range(3):
        x[every, 2 * j + 1, 1 + values[:, j]] += 2.0
    x[every, 2 * at + 1, 0] += 2.0
    asked = values[every, at]
    asked = jnp.asarray(rng.permutation(asked) if shuffled else asked)
    summaries = jnp.asarray(x, jnp.float32).reshape(rows, 4, 2, D).sum(axis=2)[:, :3]
    tokens = jnp.ones((rows, 1, D))
    allowed = jnp.ones((rows, 1, 3), bool)
    graph, params = nnx.split(cross())
    optimizer = optax.adam(0.03)

    def loss(params):
        y = nnx.merge(graph, params)(tokens, summaries, allowed)[:, 0]
        return optax.softmax_cross_entropy_with_integer_labels(y[:, :6], asked).mean()

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        trained = jax.lax.scan(step, (params, optimizer.init(params)), length=100)[0][0]
        return nnx.merge(graph, trained).weights(tokens, summaries, allowed)[:, 0, :, :3]

    return float((train(params).mean(axis=1).argmax(axis=-1) == at).mean())


def test_weights_learn_to_find_the_marked_segment():
    assert found_segments(shuffled=False) > 0.95
    assert found_segments(shuffled=True) < 0.6


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"size": "content"}, "SegmentPool"),
        ({"size": "ratio"}, "sequence_length=0"),
        ({"segment": 9, "sequence_length": 8}, "segment=9"),
        ({"pool": "max"}, "pool"),
        ({"combine": "sum"}, "combine"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1, "combine": "concat"}, "top_k"),
    ],
)
def test_impossible_options_are_refused(options, name):
    with pytest.raises(ConfigError, match=name):
        variants.attention(SegmentAttention, **options)
