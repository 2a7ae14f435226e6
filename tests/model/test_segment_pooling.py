"""Pooling by segments against plain loops, and weights that find the segment that matters."""

from functools import partial

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe.errors import ConfigError
from moe.model.segment_pooling import SegmentPool
from tests.model import variants
from tests.model.variants import D, X

LENGTHS = ([13], [9], [10], [0])


@pytest.fixture(scope="module")
def rows():
    x, _, documents = variants.inputs(*LENGTHS)
    return x, documents > 0


def plain(module, x, valid, segment, pool: str) -> tuple[np.ndarray, np.ndarray]:
    """Output and weights of one size, row by row; `segment` [B S]."""
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), valid.shape)
    q, k, v = variants.plain_heads(module.encoder, x, positions)
    inner = np.zeros_like(q)
    for b, t, h in np.ndindex(q.shape[:3]):
        same = np.flatnonzero(valid[b] & (segment[b] == segment[b, t]))
        if valid[b, t]:
            inner[b, t, h] = (
                variants.plain_softmax(k[b, same, h] @ q[b, t, h] / np.sqrt(X)) @ v[b, same, h]
            )
    hidden = np.asarray(x, np.float64) + variants.plain_output(module.encoder, inner)
    wk, query = np.asarray(module.wk[...], np.float64), np.asarray(module.query[...], np.float64)
    outputs, alphas = np.zeros((len(x), D)), np.zeros((len(x), 4))
    for b in range(len(x)):
        used = sorted(set(segment[b, valid[b]].tolist()))
        members = [np.flatnonzero(valid[b] & (segment[b] == j)) for j in used]
        s = [hidden[b, m].mean(axis=0) if pool == "mean" else hidden[b, m[-1]] for m in members]
        if used:
            alpha = variants.plain_softmax(
                np.array([query @ (each @ wk) for each in s]) / np.sqrt(X)
            )
            outputs[b], alphas[b, used] = alpha @ np.array(s), alpha
    return outputs, alphas


@pytest.mark.parametrize(
    "options",
    [
        {"size": "fixed", "segment": 4},
        {"size": "ratio", "ratio": 1 / 3, "pool": "last"},
        {"size": "learned"},
        {"size": "content"},
    ],
)
def test_equals_plain_loops(rows, options):
    module = variants.attention(SegmentPool, **options)
    x, valid = rows
    out = jax.jit(module)(x, valid)
    pool = options.get("pool", "mean")
    parts = [
        plain(module, x, np.asarray(valid), np.asarray(s), pool) for s in out.segment.swapaxes(0, 1)
    ]
    expected = sum(w * part[0] for w, part in zip(out.size_weights, parts, strict=True))
    np.testing.assert_allclose(out.output, expected, atol=1e-5)
    for r, (_, alpha) in enumerate(parts):
        np.testing.assert_allclose(out.alpha[:, r], alpha, atol=1e-5)
    np.testing.assert_allclose(out.alpha[:3].sum(axis=-1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(out.alpha[3], 0.0)
    np.testing.assert_allclose(out.size_weights.sum(), 1.0, rtol=1e-6)


def test_a_row_is_cut_by_its_own_length(rows):
    out = jax.jit(variants.attention(SegmentPool, size="ratio", ratio=0.5))(*rows)
    np.testing.assert_array_equal(out.segment[0, 0], np.arange(13) // 6)
    np.testing.assert_array_equal(out.segment[1, 0, :9], np.arange(9) // 4)
    np.testing.assert_array_equal(out.segment[2, 0, :10], np.arange(10) // 5)


def test_whatever_stands_in_padding_changes_nothing(rows):
    module = variants.attention(SegmentPool, size="ratio")
    x, valid = rows
    call = jax.jit(lambda x: module(x, valid).output)
    gradient = jax.jit(jax.grad(lambda x: call(x).sum()))(x)
    np.testing.assert_array_equal(np.abs(gradient).max(axis=-1) > 0, valid)
    np.testing.assert_allclose(call(x), call(jnp.where(valid[..., None], x, 1e3)), atol=1e-6)


def test_a_query_of_zeros_gives_the_mean_of_the_segments(rows):
    module = variants.attention(SegmentPool, size="fixed", segment=3)
    module.query[...] = jnp.zeros(X)
    out = jax.jit(module)(*rows)
    np.testing.assert_allclose(out.alpha[0, 0], 1 / 5, rtol=1e-5)
    np.testing.assert_allclose(out.alpha[1, 0], [1 / 3, 1 / 3, 1 / 3, 0, 0], rtol=1e-5)


def test_copies_of_a_segment_share_its_weight():
    module = variants.attention(SegmentPool, size="fixed", segment=3)
    x, _, documents = variants.inputs([6])
    call = jax.jit(module)
    twice = call(jnp.concatenate([x, x[:, :3]], axis=1), jnp.ones((1, 9), bool)).alpha[0, 0]
    once = call(x, documents > 0).alpha[0, 0]
    np.testing.assert_allclose(twice[0], twice[2], rtol=1e-4)
    np.testing.assert_allclose(twice[0] / twice[1], once[0] / once[1], rtol=1e-4)


def test_attention_in_a_segment_does_not_cross_documents():
    module = variants.attention(SegmentPool, size="fixed", segment=6)
    x, _, documents = variants.inputs([2, 4])
    valid = documents > 0
    encode = jax.jit(partial(module._encoded, segment=jnp.zeros_like(documents)))
    moved = np.abs(encode(x, valid, documents) - encode(x.at[0, 0].add(1.0), valid, documents))
    assert moved[0, :2].max() > 0.01
    assert moved[0, 2:].max() < 1e-6
    together = encode(x.at[0, 0].add(1.0), valid, valid.astype(jnp.int32))
    assert np.abs(together - encode(x, valid, valid.astype(jnp.int32)))[0, 2:].max() > 1e-4


def found_segments(shuffled: bool) -> float:
    """Trains a classifier of texts in which one segment of four holds the label, and a mark.

    The others hold other labels without the mark. `shuffled` gives each text the label of another.
    Returns how often the largest weight is on the marked segment.
    """
    rng, rows, classes = np.random.default_rng(0), 256, 6
    every, at = np.arange(rows), rng.integers(0, 4, rows)
    labels = rng.integers(0, classes, (rows, 4))
    x = 0.1 * rng.normal(size=(rows, 8, D))
    for j in range(4):
        x[every, 2 * j, 1 + labels[:, j]] += 2.0
    x[every, 2 * at + 1, 0] += 2.0
    label = labels[every, at]
    label = jnp.asarray(rng.permutation(label) if shuffled else label)
    x, valid = jnp.asarray(x, jnp.float32), jnp.ones((rows, 8), bool)
    graph, params = nnx.split(variants.attention(SegmentPool, size="ratio", ratio=0.25))
    optimizer = optax.adam(0.03)

    def loss(params):
        logits = nnx.merge(graph, params)(x, valid).output[:, 1 : 1 + classes]
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

    @jax.jit
    def trained_alpha(params):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        trained = jax.lax.scan(step, (params, optimizer.init(params)), length=80)[0][0]
        return nnx.merge(graph, trained)(x, valid).alpha[:, 0]

    return float((trained_alpha(params).argmax(axis=-1) == at).mean())


def test_weights_learn_to_find_the_segment_with_the_label():
    assert found_segments(shuffled=False) > 0.95
    assert found_segments(shuffled=True) < 0.6


@pytest.mark.parametrize(
    ("options", "name"),
    [({"size": "half"}, "size"), ({"ratio": 0.9}, "1/4 to 1/2"), ({"pool": "max"}, "last")],
)
def test_impossible_options_are_refused(options, name):
    with pytest.raises(ConfigError, match=name):
        variants.attention(SegmentPool, **options)
