"""A figure with its interval, and the tables it is printed in."""

from collections.abc import Sequence
import math
from typing import NamedTuple

import numpy as np

from moe.evaluation.bootstrap import Interval, mean_interval

HEADER = ("data", "split", "method", "metric", "value", "95%", "n")
_OF_100 = ("BLEU", "chrF")  # metrics that go from 0 to 100


class Floor(NamedTuple):
    """What one method reaches on one split, or one domain of it."""

    data: str
    split: str
    method: str
    metric: str
    interval: Interval


def exact(value: float, n: int) -> Interval:
    """A value without an interval: it is no function of sums over examples, or needs none."""
    return Interval(value, math.nan, math.nan, n)


def accuracy(data: str, split: str, method: str, right: np.ndarray) -> Floor:
    """The mean of `right` [n], True or a probability where the method leaves it to chance."""
    return Floor(data, split, method, "accuracy", mean_interval(np.asarray(right, np.float64)))


def cells(floor: Floor) -> tuple[str, ...]:
    """The cells of a row, as in HEADER."""
    digits = 1 if floor.metric in _OF_100 else 3
    value, low, high = (f"{number:.{digits}f}" for number in floor.interval[:3])
    ends = "-" if math.isnan(floor.interval.low) else f"{low} to {high}"
    return floor.data, floor.split, floor.method, floor.metric, value, ends, f"{floor.interval.n:,}"


def text(floors: Sequence[Floor]) -> str:
    """For a terminal: columns of equal width."""
    lines = [HEADER, *map(cells, floors)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    padded = ([cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in padded)


def markdown(floors: Sequence[Floor], commit: str) -> str:
    """The same as a table of a page, with the commit that was measured."""
    head = (*HEADER, "commit")
    lines = [head, ("---",) * len(head), *((*cells(floor), commit) for floor in floors)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
