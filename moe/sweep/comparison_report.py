"""report.html of a comparison: who has the lowest loss, how sure that is, and what it costs."""

from collections.abc import Callable, Sequence
import math
from pathlib import Path

import plotly.graph_objects as go

from moe.report import figures, page
from moe.sweep import comparison_table as table
from moe.sweep.arms import Comparison
from moe.sweep.comparison_table import Row
from moe.training.workdir import git_commit

TEMPLATES = Path(__file__).parent / "templates"
ROW_PIXELS = 20  # of one arm in the figure of intervals
SYMBOLS = ("circle", "square", "diamond")  # colours repeat after seven groups

LEGEND = (
    ("speed", "tokens/s of training relative to {reference}, median over steps, mean over seeds"),
    (
        "FLOPs/token",
        "matrix products that one token's forward pass executes: choices kept in evaluation times an "
        "expert's, and all the rest; soft and merged experts by what they compute",
    ),
    ("k", "choices of a token in evaluation, mean over layers"),
    ("violation", "largest load over mean load, less 1"),
    ("dead", "experts below a tenth of a fair load, mean over layers, of {experts}"),
    ("entropy", "of the router's probabilities, nats"),
    ("drops", "share of choices dropped in the last third of training; evaluation drops none"),
    (
        "saturation",
        "share of the choices at the earliest checkpoint kept (step {early}) that the last one makes too",
    ),
    (
        "causal gap",
        "loss of the causal form of evaluation less that of the form of training, nats a token: what a "
        "C3 router gains by reading ahead",
    ),
)


def write_comparison_report(
    workdir: Path, comparison: Comparison, rows: Sequence[Row], *, command: str, workers: int
) -> Path:
    """Writes `report.html` in a comparison's workdir.

    Args:
        workdir: exists.
        comparison: names tasks and domains.
        rows: from `comparison_table.rows`, the best first.
        command: that made it.
        workers: arms that trained at once.

    Returns:
        The page's path.
    """
    text = page.render(
        "comparison.html",
        TEMPLATES,
        title=comparison.name,
        notices=_notices(rows, workers),
        headline=_headline(comparison, rows),
        sections=_sections(comparison, rows),
        unit=table.unit(comparison),
        headings=table.headings(comparison, rows),
        rows=[_pretty(table.cells(comparison, row, rows)) for row in rows if row.seeds],
        failed=[
            (row.arm.name, row.state, ", ".join(map(str, row.seeds)), row.note)
            for row in rows
            if row.state != "complete"
        ],
        legend=_legend(comparison),
        about=_about(comparison, command),
    )
    return page.write_page(workdir / "report.html", text)


def _pretty(cells: Sequence[str]) -> list[str]:
    return [cell.replace("+-", "±") for cell in cells]


def _notices(rows: Sequence[Row], workers: int) -> list[str]:
    found = []
    if not any(row.seeds for row in rows):
        found.append("No run is complete, so there is nothing to show yet.")
    if workers > 1:
        found.append(
            f"{workers} arms trained at once, each on processors of its own: speeds are relative to the "
            "reference of the same comparison, and what the arms share (memory, caches) adds noise to them."
        )
    return found


def _headline(comparison: Comparison, rows: Sequence[Row]) -> list[tuple[str, str]]:
    found = [("arms", str(len(rows))), ("seeds each", str(len(comparison.seeds)))]
    best = rows[0] if rows else None
    if best is not None and best.loss is not None:
        found += [("lowest loss", page.number(best.loss.mean)), ("of", best.arm.name)]
    return found


def _legend(comparison: Comparison) -> list[tuple[str, str]]:
    settings = comparison.arms[0].settings
    facts = {
        "reference": comparison.reference,
        "experts": settings["model"]["num_experts"],
        "early": settings["checkpoint"]["every"],
    }
    return [(name, text.format(**facts)) for name, text in LEGEND]


def _about(comparison: Comparison, command: str) -> list[tuple[str, str]]:
    settings = comparison.arms[0].settings
    data = settings["data"]
    return [
        ("command", command),
        ("commit", git_commit()),
        ("base", comparison.base),
        ("task", comparison.task),
        ("seeds", ", ".join(map(str, comparison.seeds))),
        ("steps", str(settings["steps"])),
        ("tokens a step", f"{data['batch_size']} x {data['sequence_length']}"),
        ("domains trained on", str(data["weights"] or "all, by size")),
        ("domain of the loss", comparison.in_domain or "all"),
        ("out of domain", comparison.out_of_domain or "none"),
    ]


def _sections(comparison: Comparison, rows: Sequence[Row]) -> list[page.Section]:
    rows = [row for row in rows if row.loss is not None]
    if not rows:
        return []
    unit = table.unit(comparison)
    loss = page.plots(
        ("Loss", "Means and 95% intervals over seeds; the dotted line is the reference's mean.",
         _intervals(comparison, rows, unit)),
    )  # fmt: skip
    trade = page.plots(
        ("Out of domain", f"Loss on {comparison.out_of_domain}, which nobody was trained on.",
         _scatter(rows, lambda r: r.out_of_domain.mean if r.out_of_domain else None, "out of domain", unit)),
        ("Compute", "Executed FLOPs a token of the forward pass.",
         _scatter(rows, lambda r: r.means["executed_flops"], "FLOPs a token", unit)),
        ("Speed", f"Tokens/s of training relative to {comparison.reference}.",
         _scatter(rows, lambda r: r.means["relative_speed"], "relative speed", unit)),
        ("Balance", "Largest load over mean load, less 1.",
         _scatter(rows, lambda r: r.means["load_violation"], "load violation", unit)),
        ("Saturation", "Share of early choices that the last checkpoint still makes.",
         _scatter(rows, lambda r: r.means["saturation"], "saturation", unit)),
        ("Parameters", "Total parameters.",
         _scatter(rows, lambda r: r.means["parameters_total"], "parameters", unit)),
    )  # fmt: skip
    return page.sections(
        ("Quality", "Intervals that overlap widely are not told apart by these seeds.",
         [plot._replace(wide=True) for plot in loss]),
        ("Trade-offs", "A dot is an arm; its name shows when pointed at.", trade),
    )  # fmt: skip


def _groups(rows: Sequence[Row]) -> dict[str, dict[str, str]]:
    names = sorted({row.arm.group for row in rows})
    count = len(figures.COLORS)
    return {
        name: {"color": figures.COLORS[i % count], "symbol": SYMBOLS[i // count % len(SYMBOLS)]}
        for i, name in enumerate(names)
    }


def _intervals(comparison: Comparison, rows: Sequence[Row], unit: str) -> go.Figure:
    fig = figures.figure(140 + ROW_PIXELS * len(rows))
    for group, marker in _groups(rows).items():
        members = [row for row in rows if row.arm.group == group]
        known = [row.loss for row in members if row.loss is not None]
        halves = [0.0 if math.isnan(one.half_width) else one.half_width for one in known]
        fig.add_scatter(
            x=[one.mean for one in known],
            y=[figures.label(row.arm.name) for row in members],
            error_x={"array": halves, "thickness": 1.2},
            mode="markers",
            marker=marker,
            name=figures.label(group),
        )
    reference = next((r for r in rows if r.arm.name == comparison.reference), None)
    if reference is not None and reference.loss is not None:
        fig.add_vline(x=reference.loss.mean, line={"dash": "dot", "color": figures.INK})
    order = [figures.label(row.arm.name) for row in reversed(rows)]
    fig.update_yaxes(categoryorder="array", categoryarray=order, dtick=1)
    fig.update_xaxes(title_text=figures.label(unit))
    return fig


def _scatter(
    rows: Sequence[Row], x: Callable[[Row], float | None], name: str, unit: str
) -> go.Figure | None:
    """Loss against one number; None where fewer than two arms have it."""
    known = [row for row in rows if x(row) is not None]
    if len(known) < 2:
        return None
    fig = figures.figure(360, showlegend=False)
    for group, marker in _groups(rows).items():
        members = [row for row in known if row.arm.group == group]
        fig.add_scatter(
            x=[x(row) for row in members],
            y=[row.loss.mean for row in members if row.loss is not None],
            text=[figures.label(row.arm.name) for row in members],
            mode="markers",
            marker=marker,
            name=figures.label(group),
        )
    fig.update_xaxes(title_text=figures.label(name))
    fig.update_yaxes(title_text=figures.label(unit))
    return fig
