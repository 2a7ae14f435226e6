"""Paths through the depth: fingerprints against tuples of sets, and the cost of what ran."""

from collections import Counter
import math

import numpy as np
import pytest

from moe.evaluation import routing_paths as rp

L, B, S, K, E = 3, 2, 50, 2, 4


def draw(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    choices = rng.random((L, B, S, E)).argsort(axis=-1)[..., :K].astype(np.int32)
    choices = np.where(rng.random(choices.shape) < 0.1, -1, choices)
    return choices, rng.random((B, S)) < 0.8


def test_paths_equal_a_loop_over_sets():
    choices, valid = draw(0)
    expected = Counter(
        tuple(frozenset(int(e) for e in choices[layer, b, s] if e >= 0) for layer in range(L))
        for b, s in zip(*np.nonzero(valid), strict=True)
    )
    paths = rp.path_counts(choices, valid, E)
    assert sorted(paths.tokens) == sorted(expected.values())
    share = np.array(list(expected.values())) / valid.sum()
    metrics = rp.path_metrics(paths)
    assert metrics["path_entropy"] == pytest.approx(-(share * np.log(share)).sum())
    assert metrics["unique_paths"] == pytest.approx(1000 * len(expected) / valid.sum())
    reversed_paths = rp.path_counts(choices[..., ::-1], valid, E)
    np.testing.assert_array_equal(reversed_paths.path, paths.path)


def test_the_same_expert_in_another_layer_is_another_path():
    one, two = np.array([[[[0]]], [[[1]]]]), np.array([[[[1]]], [[[0]]]])
    valid = np.ones((1, 1), bool)
    assert rp.path_counts(one, valid, 2).path != rp.path_counts(two, valid, 2).path


def test_paths_of_batches_add_up():
    choices, valid = draw(1)
    parts = [rp.path_counts(choices[:, b : b + 1], valid[b : b + 1], E) for b in range(B)]
    added, whole = rp.add(*parts), rp.path_counts(choices, valid, E)
    for a, b in zip(added, whole, strict=True):
        np.testing.assert_array_equal(a, b)
    nothing = rp.path_counts(choices, np.zeros_like(valid), E)
    for a, b in zip(rp.add(nothing, whole), whole, strict=True):
        np.testing.assert_array_equal(a, b)
    assert rp.path_metrics(nothing) == {"path_entropy": 0.0, "unique_paths": 0.0}


def test_uniform_paths_have_full_entropy():
    grid = np.stack(np.meshgrid(*[np.arange(E)] * 2, indexing="ij")).reshape(2, 1, E * E, 1)
    metrics = rp.path_metrics(rp.path_counts(grid, np.ones((1, E * E), bool), E))
    assert metrics["path_entropy"] == pytest.approx(2 * math.log(E))
    assert metrics["unique_paths"] == pytest.approx(1000)


def test_executed_flops_count_what_ran():
    kept, tokens = np.array([[3, 1], [2, 0]]), 4.0
    assert rp.executed_flops(kept, tokens, expert_flops=10.0, other_flops=5.0) == 5 + 60 / 4
    free = np.array([10.0, 0.0])  # the second expert copies its input
    assert rp.executed_flops(kept, tokens, expert_flops=free, other_flops=5.0) == 5 + 50 / 4
    np.testing.assert_array_equal(rp.mean_k(kept, np.array([4, 4])), [1, 0.5])
    np.testing.assert_array_equal(rp.mean_k(kept, np.array([4, 0])), [1, 2])
    np.testing.assert_array_equal(rp.skip_rate(np.array([1, 0]), np.array([4, 0])), [0.75, 0])


def test_prior_entropy():
    priors = np.array([[0.25] * 4, [1, 0, 0, 0]])
    np.testing.assert_allclose(rp.prior_entropy(priors), [math.log(4), 0], atol=1e-12)
