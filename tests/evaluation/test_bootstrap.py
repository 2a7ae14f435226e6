"""Bootstrap intervals: known distributions, coverage, determinism."""

import numpy as np
import pytest

from moe.evaluation import bootstrap


def test_interval_of_a_mean_is_that_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(2.0, 3.0, 400)
    found = bootstrap.mean_interval(values)
    half = 1.96 * values.std() / np.sqrt(400)
    assert found.value == pytest.approx(values.mean())
    assert found.n == 400
    np.testing.assert_allclose(
        [found.low, found.high], [values.mean() - half, values.mean() + half], atol=0.1 * half
    )


def test_covers_the_true_mean_as_often_as_it_says():
    rng, hits = np.random.default_rng(1), 0
    for _ in range(300):
        found = bootstrap.mean_interval(rng.exponential(1.0, 100))
        hits += found.low <= 1.0 <= found.high
    assert 0.90 <= hits / 300 <= 0.98


def test_ratio_weighs_examples_by_their_size():
    over, under = np.array([1.0, 8.0]), np.array([1.0, 4.0])
    found = bootstrap.ratio_interval(over, under)
    assert found == (1.8, 1.0, 2.0, 2)


def test_same_numbers_whatever_the_blocks(monkeypatch):
    stats = np.random.default_rng(2).normal(size=(50, 2))
    whole = bootstrap.resampled(stats)
    assert whole.shape == (bootstrap.RESAMPLES, 2)
    np.testing.assert_array_equal(whole, bootstrap.resampled(stats))
    assert not np.array_equal(whole, bootstrap.resampled(stats, seed=1))
    monkeypatch.setattr(bootstrap, "_CELLS", 50 * 7)
    np.testing.assert_allclose(bootstrap.resampled(stats), whole)


def test_resamples_are_draws_with_replacement():
    stats = np.eye(5)
    times = bootstrap.resampled(stats)  # how often each example was drawn
    np.testing.assert_array_equal(times.sum(axis=1), 5)
    assert (times == 2).any()
    np.testing.assert_allclose(times.mean(axis=0), 1.0, atol=0.15)


def test_cells_resample_like_the_examples_that_are_in_them():
    cells = np.array([30, 0, 70])
    drawn = bootstrap.resampled_cells(cells)
    by_example = bootstrap.resampled(np.repeat(np.eye(3), cells, axis=0))
    np.testing.assert_allclose(drawn.mean(axis=0), cells, atol=0.6)
    np.testing.assert_allclose(drawn.std(axis=0), by_example.std(axis=0), rtol=0.1, atol=1e-9)


def test_nothing_has_no_interval():
    with pytest.raises(ValueError, match="at least one example"):
        bootstrap.mean_interval(np.zeros(0))


def test_as_json():
    found = bootstrap.mean_interval(np.ones(3))
    assert found.to_json() == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 3}
