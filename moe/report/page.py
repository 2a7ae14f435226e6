"""One self-contained HTML page: jinja2 escapes the text, plotly.js is inlined once.

The page's content security policy forbids every request, so it shows the same with no network.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup
import plotly.graph_objects as go
import plotly.offline

from moe.training.workdir import write_atomically

TEMPLATES = Path(__file__).parent / "templates"
# Zoom is by dragging, reset by a double click; the one button left saves a picture.
PLOT_CONFIG = {"displaylogo": False, "modeBarButtons": [["toImage"]]}


class Plot(NamedTuple):
    """A figure with a heading and a sentence that says how to read it."""

    title: str
    caption: str
    figure: go.Figure
    wide: bool = False


class Marked(NamedTuple):
    """A piece of text to be set in the fixed font, and a note on it."""

    text: str
    note: str


Cell = str | Sequence[Marked]


class Table(NamedTuple):
    """Rows of cells under a header; the first column is read from the left, numbers from the right.

    Cells of pieces are set one after the other; a long table scrolls.
    """

    title: str
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]


class Section(NamedTuple):
    """A heading, a sentence, plots in two columns (`wide` plots take both) and tables below them."""

    title: str
    caption: str
    plots: Sequence[Plot]
    tables: Sequence[Table] = ()


def render(template: str, directory: Path = TEMPLATES, **values: Any) -> str:
    """The page as text.

    Args:
        template: a file name, which extends `page.html`.
        directory: where it is, besides the templates of this package.
        values: for the template; everything that is not `Markup` is escaped.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([directory, TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plot"] = _plot_html
    environment.filters["number"] = number
    page = environment.get_template(template)
    return page.render(plotly_js=Markup(plotly.offline.get_plotlyjs()), **values)


def write_page(path: Path, text: str) -> Path:
    """Writes the page in one move, so that a reader never sees half of it."""
    write_atomically(path, text)
    return path


def plots(*given: tuple[str, str, go.Figure | None]) -> list[Plot]:
    """Plots of those (title, caption, figure) that have a figure."""
    return [Plot(title, caption, fig) for title, caption, fig in given if fig is not None]


def sections(*given: tuple[str, str, Sequence[Plot]]) -> list[Section]:
    """Sections of those (title, caption, plots) that have plots."""
    return [Section(title, caption, found) for title, caption, found in given if found]


def number(value: Any, digits: int = 4) -> str:
    """A number for people: 4 significant digits, thousands apart; a dash for nothing."""
    if value is None:
        return "-"
    if not isinstance(value, int | float) or isinstance(value, bool):
        return str(value)
    if value != value or abs(value) == float("inf"):
        return str(value)
    if isinstance(value, int) or abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def _plot_html(fig: go.Figure) -> Markup:
    # plotly writes <, > and / in its JSON as \uXXXX, so that no text can end the script element.
    return Markup(fig.to_html(full_html=False, include_plotlyjs=False, config=PLOT_CONFIG))
