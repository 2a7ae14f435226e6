"""What experts have come to stand for: plots and numbers of the newest evaluation (M11 to M18)."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
import numpy as np
import plotly.graph_objects as go

from moe.report import figures, page
from moe.report.records import Record, Series, series

MAP_CELLS = 40_000  # of all co-activation maps of a page; further layers are left out

PROFILES = (
    (
        "What choices tell",
        "Mutual information of the expert with the text's domain and with the position in its "
        "document, and how far domains' loads are apart (Jensen-Shannon); 0: experts do not care.",
        "nats",
        {
            "domain_information": "domain",
            "domain_divergence": "between domains",
            "position_information": "position",
        },
    ),
    (
        "Vocabulary",
        "How surely an expert's ten favourite tokens come to it, by the token that goes in and by "
        "the one that is predicted; K/E is chance, 1 a table of words.",
        "share",
        {"vocabulary_inputs": "input token", "vocabulary_predictions": "predicted token"},
    ),
    (
        "Similarity of experts",
        "Mean cosine between two experts: of the router's columns, and of all their weights.",
        "cosine",
        {"router_similarity": "router columns", "weight_similarity": "weights"},
    ),
)

NUMBERS = (
    ("choices", "experts a token"),
    ("skip_rate", "tokens that no expert worked on"),
    ("coactivation", "co-activation of an expert's strongest partner"),
    ("domain_information", "information on the domain, nats"),
    ("domain_divergence", "divergence between domains, nats"),
    ("position_information", "information on the position, nats"),
    ("vocabulary_inputs", "vocabulary specialisation, input tokens"),
    ("vocabulary_predictions", "vocabulary specialisation, predicted tokens"),
    ("router_similarity", "similarity of router columns"),
    ("weight_similarity", "similarity of experts' weights"),
    ("path_entropy", "entropy of paths, nats"),
    ("unique_paths", "different paths in 1,000 tokens"),
    ("prior_entropy", "entropy of the prior, nats"),
    ("saturation", "choices that the evaluation before had made already"),
    ("causal_gap", "causal gap, nats a token"),
    ("causal_flip_rate", "tokens that training routes elsewhere"),
)


def numbers(evaluation: Record) -> list[tuple[str, str]]:
    """(what it is, value) of the routing of an evaluation, with the FLOPs it promised and took."""
    metrics, model = evaluation.get("metrics", {}), evaluation.get("model", {})
    if "routing/choices" not in metrics:
        return []
    found = [(text, metrics.get(f"routing/{name}")) for name, text in NUMBERS]
    found += [
        ("FLOPs a token, by the config", model.get("flops_per_token")),
        ("FLOPs a token, executed", model.get("flops_executed")),
    ]
    if evaluation.get("causality", {}).get("causal_form") is False:
        found.append(("causal form", "none: this model cannot generate"))
    return [(text, page.number(value)) for text, value in found if value is not None]


def plots(evaluation: Record, held_out: Sequence[Record]) -> list[page.Plot]:
    """The section's plots; those without data are left out.

    Args:
        evaluation: the newest one.
        held_out: records of the valid split, step by step.
    """
    metrics = evaluation.get("metrics", {})
    profiles = [
        (title, caption, _profile(metrics, names, unit)) for title, caption, unit, names in PROFILES
    ]
    found = page.plots(
        *profiles,
        (
            "Saturation",
            "Of the last evaluation's choices, those that were made already; what is flat near the "
            "top has settled, K/E is chance.",
            _saturation(evaluation),
        ),
        (
            "Churn",
            "Choices that differ from those of the evaluation before.",
            _churn(held_out),
        ),
    )
    maps = coactivation_maps(evaluation)
    if maps is not None:
        caption = (
            "Of the tokens that visit the row's expert, the share that visits the column's too. "
            "A bright pair could be one expert."
        )
        found.append(page.Plot("Co-activation", caption, maps, wide=True))
    return found


def _profile(metrics: Mapping[str, Any], names: Mapping[str, str], unit: str) -> go.Figure | None:
    """A line over layers for each measure."""
    fig = figures.figure(300, yaxis={"title": unit, "rangemode": "tozero"})
    for name, text in names.items():
        values = metrics.get(f"routing/per_layer/{name}")
        if values:
            fig.add_scatter(
                x=np.arange(len(values)),
                y=np.asarray(values, np.float32),
                name=text,
                mode="lines+markers",
            )
    fig.update_xaxes(title="layer", dtick=1)
    fig.update_layout(showlegend=len(fig.data) > 1)
    return fig if fig.data else None


def _saturation(evaluation: Record) -> go.Figure | None:
    curve = evaluation.get("saturation") or {}
    steps, shares = curve.get("steps"), np.asarray(curve.get("per_layer", []), np.float64)
    if not steps or shares.ndim != 2 or len(shares) != len(steps):
        return None
    at = np.asarray(steps, np.int64)
    return figures.layer_lines(Series(at, shares.mean(axis=1)), Series(at, shares), "share")


def _churn(held_out: Sequence[Record]) -> go.Figure | None:
    mean, layers = (
        series(held_out, "routing/churn"),
        series(held_out, "routing/per_layer/churn", rank=1),
    )
    return figures.layer_lines(mean, layers, "share")


def coactivation_maps(evaluation: Record) -> go.Figure | None:
    """Expert by expert for one layer, chosen in a menu; the diagonal, 1 by definition, is a gap."""
    table = (evaluation.get("tables") or {}).get("routing/coactivation")
    together = np.asarray(table if table is not None else [], np.float64)
    if together.ndim != 3 or not (np.nanmax(_off_diagonal(together), initial=0.0) > 0):
        return None
    layers, E = together.shape[:2]
    shown = np.unique(np.linspace(0, layers - 1, min(layers, max(1, MAP_CELLS // E**2))).round())
    together = _off_diagonal(together)[shown.astype(int)]
    fig = figures.figure(120 + min(max(260, 16 * E), 720), margin={"t": 64})
    for index, share in enumerate(together):
        fig.add_heatmap(
            z=share.astype(np.float32),
            visible=index == 0,
            colorscale="Blues",
            zmin=0.0,
            zmax=float(np.nanmax(together)),
            colorbar={"title": {"text": "share"}, "thickness": 14},
            hovertemplate="of expert %{y}'s tokens, %{z:.3f} visit expert %{x} too<extra></extra>",
        )
    figures.menu(fig, [f"layer {int(layer)}" for layer in shown])
    figures.integer_axes(fig, "visits too", "expert", E, E)
    fig.update_yaxes(autorange="reversed")
    return fig


def _off_diagonal(together: Float[np.ndarray, "L E E"]) -> Float[np.ndarray, "L E E"]:
    return np.where(np.eye(together.shape[-1], dtype=bool), np.nan, together)
