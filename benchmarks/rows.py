"""A row of the results: what was measured in each round, its bound, and when it got worse.

Everything is such that less is better. The value of a row is the median of one side over the median of
the other. What it would be in another run is estimated from the rounds: their pairs are drawn again
with replacement, and the interval holds 95% of the values so obtained (bootstrap: Efron 1979).
"""

from collections.abc import Mapping, Sequence
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe.errors import ConfigError

KINDS = ("time", "size", "share", "count", "seconds")
DRAWS, COVERED = 2000, (2.5, 97.5)  # of the bootstrap; percent
# Rounds of one process share its memory layout and its machine's mood: their spread does not show what
# another process would differ by.
RELATIVE, ABSOLUTE = 0.03, 0.01


class Row(NamedTuple):
    """One line of the table."""

    name: str
    above: tuple[float, ...] = ()  # a round each; milliseconds of "time", seconds, bytes, counts
    below: tuple[float, ...] = ()  # as many, what `above` is relative to
    bound: float | None = None  # the most it may be
    least: float | None = None  # the least, where less is suspicious
    kind: str = "time"  # one of KINDS
    note: str = ""

    @property
    def value(self) -> float:
        """Ratio of the medians; NaN where nothing was measured."""
        if not self.above:
            return math.nan
        return float(np.median(self.above) / np.median(self.below))

    @property
    def interval(self) -> tuple[float, float]:
        """Where the value of another run is expected; a point where there was one round."""
        above, below = np.asarray(self.above), np.asarray(self.below)
        if above.size < 2:
            return self.value, self.value
        drawn = np.random.default_rng(0).integers(0, above.size, (DRAWS, above.size))
        values = np.median(above[drawn], axis=1) / np.median(below[drawn], axis=1)
        low, high = np.percentile(values, COVERED)
        return float(low), float(high)

    @property
    def verdict(self) -> str:
        """`pass`, `miss`, or nothing where there is no bound or no number."""
        if math.isnan(self.value) or (self.bound is None and self.least is None):
            return ""
        below = self.bound is None or self.value <= self.bound
        above = self.least is None or self.value >= self.least
        return "pass" if below and above else "miss"


def times(
    name: str,
    above: Sequence[float],
    below: Sequence[float],
    bound: float | None = None,
    *,
    least: float | None = None,
    note: str = "",
) -> Row:
    """A ratio of times, given in seconds round by round."""
    sides = (tuple(1e3 * second for second in side) for side in (above, below))
    return Row(name, *sides, bound=bound, least=least, note=note)


def single(name: str, value: float, bound: float | None, kind: str, note: str = "") -> Row:
    """A number that has no noise or no second side."""
    return Row(name, (float(value),), (1.0,), bound, kind=kind, note=note)


def regression(new: Row, old: Row) -> str | None:
    """Says how `new` is worse than `old` beyond noise; None where it is not.

    It is, where the lower end of the new interval lies above the upper end of the old one by more than
    3% of the old value, and by more than 0.01. Seconds are not compared: they are another machine's.
    """
    if not new.above or not old.above or "seconds" in (new.kind, old.kind):
        return None
    margin = max(RELATIVE * abs(old.value), ABSOLUTE)
    if new.interval[0] <= old.interval[1] + margin:
        return None
    return (
        f"{new.name}: {new.value:.3f} ({new.interval[0]:.3f} to {new.interval[1]:.3f}), was "
        f"{old.value:.3f} ({old.interval[0]:.3f} to {old.interval[1]:.3f})"
    )


class Section(NamedTuple):
    """The rows of one section, and where they come from."""

    rows: tuple[Row, ...]
    origin: dict[str, Any]  # machine, versions, commit, command, repeats


def pairs(new: Mapping[str, Section], old: Mapping[str, Section]) -> list[tuple[Row, Row]]:
    """Rows that both have, by section and name: `(new, old)`."""
    stored = {(name, row.name): row for name, section in old.items() for row in section.rows}
    return [
        (row, stored[name, row.name])
        for name, section in new.items()
        for row in section.rows
        if (name, row.name) in stored
    ]


def save(path: Path, sections: Mapping[str, Section]) -> None:
    """Writes JSON; rows of sections that are in the file and not in `sections` stay."""
    kept = dict(load(path)) if path.exists() else {}
    whole = kept | dict(sections)
    told = {
        name: {"origin": section.origin, "rows": [row._asdict() for row in section.rows]}
        for name, section in whole.items()
    }
    path.write_text(json.dumps(told, indent=1) + "\n")


def load(path: Path) -> dict[str, Section]:
    """What `save` wrote.

    Raises:
        ConfigError: there is no such file, or it holds something else.
    """
    try:
        told = json.loads(path.read_text())
        return {name: _section(values) for name, values in told.items()}
    except FileNotFoundError:
        raise ConfigError(
            f"there are no stored results {path}: make them with "
            f"`python3 benchmarks/run.py --json={path}` on a quiet machine."
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{path} holds no results of benchmarks/run.py ({type(error).__name__}: {error}): delete it "
            f"and make it anew with `python3 benchmarks/run.py --json={path}`."
        ) from error


def _section(values: Mapping[str, Any]) -> Section:
    rows = []
    for fields in values["rows"]:
        row = Row(**fields)
        rows.append(row._replace(above=tuple(row.above), below=tuple(row.below)))
    return Section(tuple(rows), values["origin"])
