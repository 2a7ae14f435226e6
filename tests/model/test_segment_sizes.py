"""Sizes between a quarter and a half of the text, and cuts against all possible cuts."""

from itertools import combinations
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import ConfigError
from moe.model.segment_sizes import (
    RATIOS,
    check_sizes,
    content_segments,
    ratio_size,
    size_weights,
)
from moe.model.spans import Places, complete_spans

S = 13
cut = jax.jit(content_segments)


@pytest.mark.parametrize("ratio", RATIOS)
def test_two_to_four_segments_of_a_quarter_to_a_half(ratio):
    for n in range(8, 400):
        size = ratio_size(n, ratio)
        assert math.ceil(n / 4) <= size <= n // 2
        assert math.ceil(n / size) in (2, 3, 4)
    lengths = jnp.arange(1, 400)
    traced = jax.jit(lambda n: ratio_size(n, ratio))(lengths)
    np.testing.assert_array_equal(traced, [ratio_size(n, ratio) for n in range(1, 400)])
    assert ratio_size(99, 1 / 3) == 33
    assert ratio_size(1, ratio) == 1


def test_segments_partition_the_text_and_jit_compiles_once_for_all_sizes():
    traces = []

    @jax.jit
    def spans(size):
        traces.append(size)
        at = jnp.arange(S)[None]
        return complete_spans(Places(at, at, jnp.ones_like(at)), size, 4).member

    for size in range(4, 7):
        member = np.asarray(spans(jnp.int32(size)))[0]  # [M S]
        whole = S // size * size
        np.testing.assert_array_equal(member.sum(axis=0), np.arange(S) < whole)
        np.testing.assert_array_equal(member.argmax(axis=0)[:whole], np.arange(whole) // size)
    assert len(traces) == 1


def best_cuts(x: np.ndarray) -> tuple[int, ...]:
    """All ways to cut `x` [n D] with every segment in bounds, the last one perhaps shorter."""
    n = len(x)
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    distance = 1 - (unit[1:] * unit[:-1]).sum(axis=-1)
    low, high = max(math.ceil(n / 4), 1), max(n // 2, 1)
    ways = {}
    for count in (1, 2, 3):
        for cuts in combinations(range(1, n), count):
            sizes = np.diff([0, *cuts, n])
            if (sizes <= high).all() and (sizes[:-1] >= low).all():
                ways[cuts] = sum(distance[c - 1] - distance.mean() for c in cuts)
    return max(ways, key=ways.__getitem__, default=())


def test_content_cuts_are_the_best_of_all_cuts():
    rng = np.random.default_rng(0)
    lengths = [1, 2, 3, 5, 8, 9, 10, 11, 12, 13] * 6
    x = rng.normal(size=(len(lengths), S, 3)).astype(np.float32)
    valid = np.arange(S) < np.array(lengths)[:, None]
    segment = np.asarray(cut(jnp.asarray(x), jnp.asarray(valid)))
    counts = set()
    for row, n in enumerate(lengths):
        cuts = best_cuts(x[row, :n].astype(np.float64))
        expected = (np.arange(n)[:, None] >= np.array(cuts, int)).sum(axis=-1)
        np.testing.assert_array_equal(segment[row, :n], expected)
        if n >= 8:
            counts.add(len(cuts) + 1)
    assert counts >= {3, 4}


def test_content_cuts_fall_where_the_topic_changes():
    topics = np.repeat(np.eye(3), [5, 4, 3], axis=0)[None]
    noise = 0.1 * np.random.default_rng(0).normal(size=(1, 12, 3))
    valid = jnp.ones((1, 12), bool)
    found = cut(jnp.asarray(topics + noise, jnp.float32), valid)
    np.testing.assert_array_equal(found[0], np.repeat([0, 1, 2], [5, 4, 3]))
    # The same tokens in another order have their cuts elsewhere.
    order = np.random.default_rng(1).permutation(12)
    shuffled = cut(jnp.asarray((topics + noise)[:, order], jnp.float32), valid)
    assert (shuffled != found).any()


def test_padding_does_not_move_a_cut():
    x = np.random.default_rng(3).normal(size=(1, S, 3)).astype(np.float32)
    valid = jnp.arange(S)[None] < 10
    changed = np.where(valid[..., None], x, 50.0)
    some, other = (cut(jnp.asarray(a), valid) for a in (x, changed))
    np.testing.assert_array_equal(some[0, :10], other[0, :10])


def test_dense_weights_are_a_softmax_and_straight_through_has_its_gradient():
    logits = jnp.array([0.3, -0.2, 1.1])
    values = jnp.array([1.0, -2.0, 0.5])

    def mixed(logits, mixture):
        return size_weights(logits, mixture) @ values

    np.testing.assert_allclose(size_weights(logits, "dense"), jax.nn.softmax(logits))
    np.testing.assert_allclose(size_weights(logits, "straight_through"), [0, 0, 1], atol=1e-6)
    gradients = [jax.grad(mixed)(logits, m) for m in ("dense", "straight_through")]
    assert np.abs(gradients[0]).max() > 0.01
    np.testing.assert_allclose(*gradients, atol=1e-6)


def test_noise_draws_sizes_by_their_probability():
    logits = jnp.log(jnp.array([0.2, 0.3, 0.5]))
    keys = jax.random.split(jax.random.key(0), 20_000)
    draw = jax.jit(jax.vmap(lambda key: size_weights(logits, "straight_through", key)))
    counts = np.asarray(draw(keys)).round().sum(axis=0)
    expected = 20_000 * np.array([0.2, 0.3, 0.5])
    assert ((counts - expected) ** 2 / expected).sum() < 18.4  # chi-square of 2, p = 1e-4
    np.testing.assert_array_equal(
        size_weights(logits, "dense", keys[0]), size_weights(logits, "dense")
    )


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"size": "golden"}, "content"),
        ({"segment": 0}, "segment=0"),
        ({"ratio": 0.6}, "1/4 to 1/2"),
        ({"ratio": 0.2}, "1/4 to 1/2"),
        ({"mixture": "hard"}, "straight_through"),
    ],
)
def test_impossible_options_are_refused(change, name):
    good = {"size": "fixed", "segment": 4, "ratio": 0.25, "mixture": "dense"}
    check_sizes(**good)
    with pytest.raises(ConfigError, match=name):
        check_sizes(**(good | change))
