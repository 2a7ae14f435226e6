"""A figure with its interval, and the tables it is printed in."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 1000  # resamplings of the examples
INTERVAL = (2.5, 97.5)  # percentiles


class Floor(NamedTuple):
    """What one method reaches on one split."""

    data: str
    split: str
    method: str
    metric: str
    value: float
    low: float  # 95% bootstrap interval over examples; nan where the metric is no sum over them
    high: float
    n: int  # examples (documents, pairs) of the split


HEADER = ("data", "split", "method", "metric", "value", "95%", "n")


def ratio(above: np.ndarray, below: np.ndarray | None = None, seed: int = 0) -> tuple[float, ...]:
    """A quotient of sums over examples with its percentile bootstrap interval.

    Args:
        above: one number an example [n].
        below: its weight [n]; None: 1 each, and the quotient is the mean.
        seed: of the resampling.

    Returns:
        The value, the lower end and the upper end (Efron and Tibshirani 1993, section 13.3).

    Raises:
        ValueError: no examples.
    """
    above = np.asarray(above, np.float64)
    below = np.ones_like(above) if below is None else np.asarray(below, np.float64)
    if not len(above):
        raise ValueError("No examples: there is nothing to average.")
    rng, n, drawn = np.random.default_rng(seed), len(above), []
    for _ in range(DRAWS):
        picks = rng.integers(n, size=n)
        drawn.append(above[picks].sum() / below[picks].sum())
    low, high = np.percentile(drawn, INTERVAL)
    return float(above.sum() / below.sum()), float(low), float(high)


def accuracy(data: str, split: str, method: str, right: np.ndarray) -> Floor:
    """The share of True in `right` [n]."""
    return Floor(data, split, method, "accuracy", *ratio(right), len(right))


def cells(floor: Floor) -> tuple[str, ...]:
    """The cells of a row, as in HEADER."""
    digits = 1 if floor.metric in ("BLEU", "chrF") else 3
    low, high = (f"{end:.{digits}f}" for end in (floor.low, floor.high))
    interval = "-" if np.isnan(floor.low) else f"{low} to {high}"
    value = f"{floor.value:.{digits}f}"
    return floor.data, floor.split, floor.method, floor.metric, value, interval, str(floor.n)


def text(floors: Sequence[Floor]) -> str:
    """For a terminal: columns of equal width."""
    lines = [HEADER, *map(cells, floors)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    padded = ([cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in padded)


def markdown(floors: Sequence[Floor]) -> str:
    """The same as a table of a page."""
    head = f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}"
    return "\n".join([head, *(f"| {' | '.join(cells(floor))} |" for floor in floors)])
