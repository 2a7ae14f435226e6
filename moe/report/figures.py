"""Plotly figures that the run page and the sweep page share, in one visual language."""

from collections.abc import Mapping, Sequence
import html
import itertools
from typing import Any

from jaxtyping import Float
import numpy as np
import plotly.graph_objects as go
import plotly.io as pio

from moe.report.records import Series

FONT = "Inter, system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
INK = "#1f2933"
GRID = "#e4e9ee"
# Okabe and Ito's colours, told apart with every kind of colour blindness.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
SHADES = "Viridis"
DIVERGING = "RdBu_r"

LINE_POINTS = 600  # of one line; longer series are averaged in bins
LAYER_POINTS = 200  # of one line of many
LOAD_CELLS = 40_000  # of a step x layer x expert cube, a quarter of a megabyte on the page

AXIS = {
    "gridcolor": GRID,
    "zeroline": False,
    "automargin": True,
    "title": {"font": {"size": 13}, "standoff": 8},
}
pio.templates["moe"] = go.layout.Template(
    layout={
        "font": {"family": FONT, "size": 13, "color": INK},
        "colorway": COLORS,
        "margin": {"l": 56, "r": 20, "t": 28, "b": 40},
        "xaxis": AXIS,
        "yaxis": AXIS,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "hoverlabel": {"font": {"family": FONT}},
    }
)
TEMPLATE = "plotly_white+moe"


def label(text: Any) -> str:
    """Text for plotly, which reads a small subset of HTML in every label."""
    return html.escape(str(text), quote=False)


def figure(height: int, **layout: Any) -> go.Figure:
    """An empty figure in the pages' style."""
    return go.Figure(layout={"template": TEMPLATE, "height": height, **layout})


def thin(found: Series, points: int) -> Series:
    """At most so many points: means of neighbouring bins, placed at each bin's last step."""
    count = len(found.steps)
    if count <= points:
        return found
    edges = np.linspace(0, count, points + 1).astype(int)
    values = np.stack([found.values[a:b].mean(axis=0) for a, b in itertools.pairwise(edges)])
    return Series(found.steps[edges[1:] - 1], values)


def pick(found: Series, points: int) -> Series:
    """At most so many of the points themselves, evenly spread, first and last among them."""
    count = len(found.steps)
    if count <= points:
        return found
    chosen = np.unique(np.linspace(0, count - 1, points).round().astype(int))
    return Series(found.steps[chosen], found.values[chosen])


def lines(named: Mapping[str, Series | None], unit: str, *, log: bool = False) -> go.Figure | None:
    """Lines over steps, one a name; None where no series has anything."""
    fig = figure(320, yaxis={"title": unit, "type": "log" if log else "linear"})
    fig.update_xaxes(title="step")
    for name, found in named.items():
        if found is None:
            continue
        shown = thin(found, LINE_POINTS)
        fig.add_scatter(
            x=shown.steps.astype(np.int32),
            y=shown.values.astype(np.float32),
            name=label(name),
            mode="lines+markers" if len(shown.steps) < 25 else "lines",
            marker={"size": 6},
        )
    fig.update_layout(showlegend=len(fig.data) > 1)
    return fig if fig.data else None


def layer_lines(mean: Series | None, layers: Series | None, unit: str) -> go.Figure | None:
    """The mean over layers in black, and a line a layer, from dark (first) to light (last).

    Args:
        mean: a scalar a step.
        layers: `L` values a step.
        unit: of the vertical axis.
    """
    fig = figure(300, yaxis={"title": unit, "rangemode": "tozero"})
    fig.update_xaxes(title="step")
    if layers is not None:
        shown = thin(layers, LAYER_POINTS)
        count = shown.values.shape[1]
        for layer, color in enumerate(shades(count)):
            fig.add_scatter(
                x=shown.steps.astype(np.int32),
                y=shown.values[:, layer].astype(np.float32),
                name=f"layer {layer}",
                mode=_mode(shown),
                line={"color": color, "width": 1.3},
                showlegend=count <= 6,
            )
    if mean is not None:
        shown = thin(mean, LAYER_POINTS)
        fig.add_scatter(
            x=shown.steps.astype(np.int32),
            y=shown.values.astype(np.float32),
            name="mean",
            mode=_mode(shown),
            line={"color": INK, "width": 2.6},
        )
    return fig if fig.data else None


def _mode(shown: Series) -> str:
    return "lines" if len(shown.steps) > 1 else "markers"


def shades(count: int) -> list[str]:
    """Colours for an ordered set, from dark to light, none too pale to see on white."""
    import plotly.colors as colors

    at = np.linspace(0.0, 0.85, max(count, 2))[:count]
    return colors.sample_colorscale(SHADES, list(at))


def load_over_layers(load: Series) -> go.Figure:
    """Layer by expert, a slider over steps; 1 is the balanced share.

    Args:
        load: fractions `[N L E]` that sum to 1 over experts.
    """
    relative, top = _relative_load(load)
    count, layers, _ = relative.shape
    fig = figure(150 + max(150, min(26 * layers, 620)))
    for n in range(count):
        fig.add_heatmap(
            z=relative[n], visible=n == count - 1, hovertemplate=LOAD_HOVER, **_load_colors(top)
        )
    steps = [
        {
            "label": str(step),
            "method": "restyle",
            "args": [{"visible": [i == n for i in range(count)]}],
        }
        for n, step in enumerate(load.steps)
    ]
    fig.update_layout(
        sliders=[
            {
                "active": count - 1,
                "currentvalue": {"prefix": "step "},
                "pad": {"t": 46},
                "steps": steps,
            }
        ]
    )
    integer_axes(fig, "expert", "layer", relative.shape[2], layers)
    fig.update_yaxes(autorange="reversed")
    return fig


def load_over_steps(load: Series) -> go.Figure:
    """Expert by step for one layer, chosen in a menu; 1 is the balanced share.

    Args:
        load: fractions `[N L E]` that sum to 1 over experts.
    """
    relative, top = _relative_load(load)
    layers = relative.shape[1]
    fig = figure(120 + max(220, min(9 * relative.shape[2], 620)), margin={"t": 64})
    for layer in range(layers):
        fig.add_heatmap(
            x=load.steps,
            z=np.ascontiguousarray(relative[:, layer].T),
            visible=layer == 0,
            hovertemplate="step %{x}, expert %{y}: %{z:.2f} of the balanced share<extra></extra>",
            **_load_colors(top),
        )
    menu(fig, [f"layer {layer}" for layer in range(layers)])
    integer_axes(fig, "step", "expert", 99, relative.shape[2])
    return fig


LOAD_HOVER = "layer %{y}, expert %{x}: %{z:.2f} of the balanced share<extra></extra>"


def load_points(layers: int, experts: int) -> int:
    """How many steps of a load record fit the page."""
    return int(np.clip(LOAD_CELLS // (layers * experts), 8, 40))


def _relative_load(load: Series) -> tuple[np.ndarray, float]:
    relative = (load.values * load.values.shape[-1]).astype(np.float32)
    finite = relative[np.isfinite(relative)]
    # The scale ends at the 99.5th percentile: one hot expert would leave every other cell white.
    return relative, max(2.0, float(np.percentile(finite, 99.5))) if finite.size else 2.0


def _load_colors(top: float) -> dict[str, Any]:
    return {
        "colorscale": balanced_scale(top),
        "zmin": 0.0,
        "zmax": top,
        "colorbar": {"title": {"text": "of balanced"}, "thickness": 14},
    }


def balanced_scale(top: float) -> list[list[Any]]:
    """Blue at 0, white at 1 and red at `top`: plotly's `zmid` would make 0 nearly white."""
    middle = 1.0 / top
    # linspace ends exactly at 1, which plotly demands; a sum of thirds can end one ulp above.
    below = ["#2166ac", "#67a9cf", "#d1e5f0", "#f7f7f7"]
    above = ["#f7f7f7", "#fddbc7", "#ef8a62", "#b2182b"]
    low = zip(np.linspace(0.0, middle, 4).tolist(), below, strict=True)
    high = zip(np.linspace(middle, 1.0, 4).tolist(), above, strict=True)
    return [[at, c] for at, c in [*low, *list(high)[1:]]]


def kind_maps(shares: Mapping[str, Float[np.ndarray, "L E"]], kind: str) -> go.Figure:
    """Kind of token by expert for one layer, chosen in a menu.

    Args:
        shares: domain or modality -> the fraction of its choices that each expert of each layer took.
        kind: `share` for the fractions themselves, `log2 lift` for log2 of a kind's fraction over the
            mean of all kinds.
    """
    stack = np.stack(list(shares.values()))  # [M L E]
    shown = stack if kind == "share" else log_ratio(stack)
    kinds, layers, experts = shown.shape
    fig = figure(140 + max(90, min(34 * kinds, 620)), margin={"t": 64, "l": 90})
    for layer in range(layers):
        fig.add_heatmap(
            z=shown[:, layer].astype(np.float32),
            y=[label(name) for name in shares],
            visible=layer == 0,
            hovertemplate=f"%{{y}}, expert %{{x}}: %{{z:.3f}} ({kind})<extra></extra>",
            coloraxis="coloraxis",
        )
    bar = {"colorbar": {"title": {"text": kind}, "thickness": 14}}
    fig.update_layout(coloraxis=_kind_colors(shown, kind) | bar)
    menu(fig, [f"layer {layer}" for layer in range(layers)])
    integer_axes(fig, "expert", None, experts, 99)
    fig.update_yaxes(autorange="reversed", type="category")
    return fig


def _kind_colors(shown: np.ndarray, kind: str) -> dict[str, Any]:
    top = float(np.nanmax(np.abs(shown), initial=0.0))
    if kind == "share":
        return {"colorscale": "Blues", "cmin": 0.0, "cmax": top or 1.0}
    # Beyond eight times or an eighth the number is in the hover; the colours are for the rest.
    end = min(max(top, 1.0), 3.0)
    return {"colorscale": DIVERGING, "cmin": -end, "cmax": end}


def log_ratio(shares: Float[np.ndarray, "M L E"]) -> Float[np.ndarray, "M L E"]:
    """log2 of each kind's share over the mean of the kinds, within ±6.

    An expert that nobody used has no ratio and shows as a gap.
    """
    mean = shares.mean(axis=0, keepdims=True)  # [1 L E]
    used = mean > 0
    ratio = np.divide(shares, mean, out=np.full_like(shares, np.nan), where=used)
    with np.errstate(divide="ignore"):  # a share of 0 is minus infinity, shown as the lower end
        return np.clip(np.log2(ratio), -6.0, 6.0)


def menu(fig: go.Figure, names: Sequence[str]) -> None:
    """A drop-down that shows one trace at a time."""
    if len(names) < 2:
        return
    buttons = [
        {
            "label": label(name),
            "method": "restyle",
            "args": [{"visible": [i == n for i in range(len(names))]}],
        }
        for n, name in enumerate(names)
    ]
    fig.update_layout(
        updatemenus=[
            {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.03, "yanchor": "bottom"}
        ]
    )


def integer_axes(fig: go.Figure, x: str | None, y: str | None, columns: int, rows: int) -> None:
    """Titles, and a tick a row or column while there are few."""
    fig.update_xaxes(title=x, showgrid=False, **({"dtick": 1} if columns <= 32 else {}))
    fig.update_yaxes(title=y, showgrid=False, **({"dtick": 1} if rows <= 16 else {}))
