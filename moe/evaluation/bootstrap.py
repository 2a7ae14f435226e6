"""Percentile bootstrap intervals (Efron and Tibshirani 1993, chapter 13) over the examples of a split.

Only sums are drawn again: a statistic of a corpus is a function of sums over its examples, so each
resample is one row of a small matrix product.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Float, Int
import numpy as np

RESAMPLES = 1000
LEVEL = 0.95  # probability that an interval covers the value
SEED = 0
_CELLS = 1 << 22  # numbers of a block of resamples


class Interval(NamedTuple):
    """A value over `n` examples, with the interval that 95 of 100 such intervals cover it in."""

    value: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, float | int]:
        """As in the record of an evaluation."""
        return {
            "value": float(self.value),
            "low": float(self.low),
            "high": float(self.high),
            "n": int(self.n),
        }


Statistic = Callable[[Float[np.ndarray, "R X"]], Float[np.ndarray, " R"]]
"""From the sums of `R` resamples to one value of each."""


def mean_interval(values: Float[np.ndarray, " n"], *, seed: int = SEED) -> Interval:
    """The mean over examples.

    Args:
        values: one number an example, at least one.
        seed: of the resamples; the same gives the same interval.
    """
    values = np.asarray(values, np.float64)
    count = len(values)
    return interval(values[:, None], lambda sums: sums[:, 0] / count, seed=seed)


def ratio_interval(
    over: Float[np.ndarray, " n"], under: Float[np.ndarray, " n"], *, seed: int = SEED
) -> Interval:
    """The sum of one number an example over the sum of another, such as nats over bytes.

    Args:
        over: `[n]`.
        under: `[n]`, of a positive sum; a resample whose sum is 0 counts as 0.
        seed: of the resamples.
    """

    def ratio(sums: Float[np.ndarray, "R 2"]) -> Float[np.ndarray, " R"]:
        return sums[:, 0] / np.where(sums[:, 1] > 0, sums[:, 1], 1.0)

    stats = np.stack([np.asarray(over, np.float64), np.asarray(under, np.float64)], axis=1)
    return interval(stats, ratio, seed=seed)


def interval(
    stats: Float[np.ndarray, "n X"], statistic: Statistic, *, seed: int = SEED
) -> Interval:
    """Any function of sums over examples.

    Args:
        stats: `X` sufficient statistics of each example.
        statistic: of `[R X]` sums, for all resamples at once.
        seed: of the resamples.

    Raises:
        ValueError: no example.
    """
    count = len(stats)
    if count == 0:
        raise ValueError("an interval needs at least one example.")
    stats = np.asarray(stats, np.float64)
    value = float(statistic(stats.sum(axis=0, keepdims=True))[0])
    return percentiles(value, statistic(resampled(stats, seed)), count)


def percentiles(value: float, drawn: Float[np.ndarray, " R"], count: int) -> Interval:
    """The interval that the middle 95% of the resampled values span."""
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high), count)


def resampled(stats: Float[np.ndarray, "n X"], seed: int = SEED) -> Float[np.ndarray, "R X"]:
    """Sums of `RESAMPLES` draws of `n` examples with replacement.

    Examples are counted rather than copied: a resample is a row of counts times the statistics.
    """
    rng, count = np.random.default_rng(seed), len(stats)
    block = max(1, min(RESAMPLES, _CELLS // count))
    sums = []
    for first in range(0, RESAMPLES, block):
        rows = min(block, RESAMPLES - first)
        drawn = rng.integers(0, count, (rows, count)) + count * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        sums.append(times @ stats)
    return np.concatenate(sums)


def resampled_cells(cells: Int[np.ndarray, " C"], seed: int = SEED) -> Int[np.ndarray, "R C"]:
    """Resamples of a table of counts: those of examples that fall into one cell each.

    Drawing `n` examples with replacement and counting them is one multinomial draw.
    """
    total = int(cells.sum())
    return np.random.default_rng(seed).multinomial(total, cells / total, size=RESAMPLES)
