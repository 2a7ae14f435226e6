"""The results as text for a terminal and as the table of `benchmarks/README.md`."""

from collections.abc import Mapping
import math
from pathlib import Path

import numpy as np

from benchmarks.rows import Row, Section
from moe.errors import ConfigError

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
NOTHING = "Nothing measured yet."


def number(row: Row, value: float) -> str:
    """A value of the row in its unit."""
    if math.isnan(value):
        return "-"
    formats = {"share": "{:.1%}", "seconds": "{:.1f} s", "count": "{:.0f}"}
    return formats.get(row.kind, "{:.2f}").format(value)


def bounds(row: Row) -> str:
    """As `<= 1.15`, or `0.85 to 1.15`."""
    if row.bound is None:
        return ""
    if row.least is None:
        return f"<= {number(row, row.bound)}"
    return f"{number(row, row.least)} to {number(row, row.bound)}"


def spread(row: Row) -> str:
    """The interval; nothing where there was one round."""
    if len(row.above) < 2:
        return ""
    low, high = row.interval
    return f"{number(row, low)} to {number(row, high)}"


def sides(row: Row) -> str:
    """Milliseconds of both sides, where times were compared."""
    if row.kind != "time" or not row.above:
        return ""
    return f"{np.median(row.above):.4g} / {np.median(row.below):.4g} ms"


def cells(row: Row) -> tuple[str, ...]:
    """The cells of a row, as in HEADER."""
    told = "; ".join(filter(None, (sides(row), row.note)))
    return row.name, number(row, row.value), spread(row), bounds(row), row.verdict, told


HEADER = ("row", "value", "95%", "bound", "", "medians, notes")


def text(rows: tuple[Row, ...]) -> str:
    """For a terminal: columns of equal width."""
    lines = [HEADER, *(cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER) - 1)]
    padded = (
        [cell.ljust(width) for cell, width in zip(line, widths, strict=False)] + [line[-1]]
        for line in lines
    )
    return "\n".join("  ".join(line).rstrip() for line in padded)


def markdown(sections: Mapping[str, Section]) -> str:
    """Every section with its origin; NOTHING where there is none."""
    parts = []
    for name, section in sections.items():
        told = "; ".join(f"{key} {value}" for key, value in section.origin.items())
        lines = [" | ".join(map(_escaped, cells(row))) for row in section.rows]
        head = f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}"
        parts.append("\n".join([f"### {name}\n\n{told}\n", head, *(f"| {one} |" for one in lines)]))
    return "\n\n".join(parts) or NOTHING


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")


def write(page: Path, sections: Mapping[str, Section]) -> None:
    """Puts the table between the markers of a page.

    Raises:
        ConfigError: the page has no markers.
    """
    whole = page.read_text()
    before, begin, rest = whole.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(
            f"{page} has no lines {BEGIN!r} and {END!r}, between which the table goes: put them back."
        )
    page.write_text(f"{before}{BEGIN}\n{markdown(sections)}\n{END}{after}")
