"""report.html of a sweep: which points were good, how sure that is, and how they learned."""

from collections.abc import Sequence
import math
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from moe.report import figures, page
from moe.sweep.space import Sweep
from moe.sweep.table import Row, interval_text

TEMPLATES = Path(__file__).parent / "templates"
CURVES = 40  # points whose learning curves are drawn, the best first


def write_sweep_report(workdir: Path, sweep: Sweep, rows: Sequence[Row]) -> Path:
    """Writes `report.html` in a sweep's workdir.

    Args:
        workdir: exists.
        sweep: names the keys and the metric.
        rows: from `table.rows`, the best first.

    Returns:
        The page's path.
    """
    complete = [row for row in rows if row.interval is not None]
    text = page.render(
        "sweep.html",
        TEMPLATES,
        title=sweep.name,
        notices=[] if complete else ["No point is complete, so there is nothing to plot yet."],
        headline=_headline(sweep, rows, complete),
        sections=_sections(sweep, rows, complete),
        keys=list(sweep.space),
        metric=sweep.metric,
        rows=[_cells(sweep, row) for row in rows],
        about=[
            ("base", sweep.base),
            *(("fixed " + key, value) for key, value in sweep.overrides.items()),
            ("sampler", sweep.sampler),
            ("pruner", sweep.pruner),
            ("seeds", ", ".join(map(str, sweep.seeds))),
            ("metric", f"{sweep.metric}, split {sweep.split}, {sweep.direction}"),
        ],
    )
    return page.write_page(workdir / "report.html", text)


def _headline(sweep: Sweep, rows: Sequence[Row], complete: Sequence[Row]) -> list[tuple[str, str]]:
    found = [("points", str(len(rows)))]
    for state in ("complete", "pruned", "failed", "running", "waiting"):
        count = sum(row.state == state for row in rows)
        if count:
            found.append((state, str(count)))
    if complete and complete[0].interval is not None:
        found.append((f"best {sweep.metric}", page.number(complete[0].interval.mean)))
        found.append(
            ("95% interval of the best", interval_text(complete[0].interval).replace("+-", "±"))
        )
    return found


def _cells(sweep: Sweep, row: Row) -> dict[str, Any]:
    mean = None if row.interval is None else row.interval.mean
    return {
        "trial": row.trial,
        "state": row.state,
        "params": [page.number(row.params.get(key, "")) for key in sweep.space],
        "seeds": [f"{seed}: {page.number(v)}" for seed, v in row.seeds.items()],
        "mean": page.number(mean),
        "interval": interval_text(row.interval).replace("+-", "±"),
        "note": row.note,
    }


def _sections(sweep: Sweep, rows: Sequence[Row], complete: Sequence[Row]) -> list[page.Section]:
    if not complete:
        return []
    better = "lower" if sweep.direction == "minimize" else "higher"
    parameters = [
        page.Plot(
            key,
            "A dot is a point, its bar the 95% interval over seeds; colour is the trial's number.",
            _parameter(sweep, key, complete),
        )
        for key in sweep.space
    ]
    search = [
        page.Plot(
            "History",
            "Means by trial number; the line is the best so far.",
            _history(sweep, complete),
        ),
        page.Plot(
            "Learning curves",
            f"Mean over seeds of {sweep.metric} as evaluated; colour is the rank, dark is best.",
            _curves(sweep, rows),
        ),
    ]
    return page.sections(
        ("Parameters", f"{sweep.metric} against each key; {better} is better.", parameters),
        ("Search", "How the search went, and how its points learned.", search),
    )


def _is_numeric(values: Sequence[Any]) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def _point(row: Row) -> str:
    return "<br>".join(figures.label(f"{key} = {value}") for key, value in row.params.items())


def _parameter(sweep: Sweep, key: str, complete: Sequence[Row]) -> go.Figure:
    values = [row.params[key] for row in complete]
    intervals = [row.interval for row in complete if row.interval is not None]
    numeric = _is_numeric(values)
    fig = figures.figure(320, showlegend=False)
    fig.add_scatter(
        x=values if numeric else [figures.label(v) for v in values],
        y=[interval.mean for interval in intervals],
        error_y={
            "array": [0.0 if math.isnan(i.half_width) else i.half_width for i in intervals],
            "thickness": 1.2,
            "width": 4,
            "color": "#9aa5b1",
        },
        mode="markers",
        marker={"size": 9, "color": [row.trial for row in complete], "colorscale": "Viridis"},
        text=[f"trial {row.trial}<br>{_point(row)}" for row in complete],
        hovertemplate="%{text}<br>%{y:.4f} ± %{error_y.array:.4f}<extra></extra>",
    )
    fig.update_xaxes(title=figures.label(key), type="category" if not numeric else _axis(values))
    fig.update_yaxes(title=figures.label(sweep.metric))
    return fig


def _axis(values: Sequence[int | float]) -> str:
    """Logarithmic where the values span two decades and none is 0 or less."""
    return "log" if min(values) > 0 and max(values) / min(values) >= 100 else "linear"


def _history(sweep: Sweep, complete: Sequence[Row]) -> go.Figure:
    ordered = sorted(complete, key=lambda row: row.trial)
    means = [row.interval.mean for row in ordered if row.interval is not None]
    best = np.minimum if sweep.direction == "minimize" else np.maximum
    fig = figures.figure(320)
    fig.add_scatter(
        x=[row.trial for row in ordered],
        y=means,
        mode="markers",
        marker={"size": 8},
        name="point",
        text=[_point(row) for row in ordered],
        hovertemplate="trial %{x}: %{y:.4f}<br>%{text}<extra></extra>",
    )
    fig.add_scatter(
        x=[row.trial for row in ordered],
        y=best.accumulate(means),
        mode="lines",
        line={"shape": "hv", "width": 2},
        name="best so far",
        hoverinfo="skip",
    )
    fig.update_xaxes(title="trial")
    fig.update_yaxes(title=figures.label(sweep.metric))
    return fig


def _curves(sweep: Sweep, rows: Sequence[Row]) -> go.Figure:
    """The best complete points in rank colours over pruned and failed ones in grey."""
    drawn = [row for row in rows if row.curves][:CURVES]
    ranked = [row for row in drawn if row.interval is not None]
    colors = dict(zip((row.trial for row in ranked), figures.shades(len(ranked)), strict=True))
    fig = figures.figure(320, showlegend=False)
    for row in reversed(drawn):
        steps, values = _mean_curve(list(row.curves.values()))
        fig.add_scatter(
            x=steps,
            y=values,
            mode="lines+markers",
            marker={"size": 4},
            line={"color": colors.get(row.trial, "#c3cad1"), "width": 1.6},
            name=f"trial {row.trial}",
            text=[f"trial {row.trial}, {row.state}<br>{_point(row)}"] * len(steps),
            hovertemplate="step %{x}: %{y:.4f}<br>%{text}<extra></extra>",
        )
    fig.update_xaxes(title="step")
    fig.update_yaxes(title=figures.label(sweep.metric))
    return fig


def _mean_curve(curves: Sequence[Sequence[Sequence[int | float]]]) -> tuple[list[int], list[float]]:
    """Mean over the seeds at the steps that every seed has."""
    by_seed = [{int(step): value for step, value in curve} for curve in curves]
    steps = sorted(set.intersection(*(set(values) for values in by_seed)))
    return steps, [math.fsum(v[step] for v in by_seed) / len(by_seed) for step in steps]
