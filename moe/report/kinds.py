"""Who takes what: which experts serve which domain, modality and token, and how surely (M13, M14)."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
import numpy as np

from moe.report import figures, page
from moe.report.records import Record

KINDS = {"domain": "domain_load", "modality": "modality_load"}
TABLE_ROWS = 400  # experts of all layers whose tokens are listed; further layers are left out
TOKEN_LENGTH = 24  # characters shown of a token

INFORMATION_HEADER = (
    *("layer", "nats", "bits", "shuffled, nats", "beyond chance, nats"),
    "share of all there is to know",
)
LIFT_CAPTION = (
    "log2 of a {kind}'s share over the mean of all: +1 is twice the mean, -1 is half of it, white is "
    "no preference."
)


def sections(evaluation: Record) -> list[page.Section]:
    """The section, or none where the evaluation has nothing of the sort."""
    plots, tables = [], []
    for kind, key in KINDS.items():
        loads = _loads(evaluation.get(key))
        plots += _maps(kind, loads)
        table = _information(kind, evaluation.get("metrics", {}))
        tables += [] if table is None or len(loads) < 2 else [table]
    favourites = _favourites(evaluation.get("favourites"))
    tables += [] if favourites is None else [favourites]
    if not plots and not tables:
        return []
    caption = (
        "From the newest evaluation. Experts that share a kind of text evenly know nothing of it; an "
        "expert that takes far more of one than of others has specialised in it."
    )
    return [page.Section("Who takes what", caption, plots, tables)]


def _loads(load: Any) -> dict[str, Float[np.ndarray, "L E"]]:
    shares = {name: np.asarray(values, np.float64) for name, values in (load or {}).items()}
    return {name: s for name, s in shares.items() if s.ndim == 2 and np.isfinite(s).all()}


def _maps(kind: str, shares: dict[str, Float[np.ndarray, "L E"]]) -> list[page.Plot]:
    if not shares:
        return []
    share = page.Plot(
        f"Expert by {kind}",
        f"Of all choices that tokens of a {kind} made in the layer, the part that each expert took: "
        f"rows sum to 1, and rows that are alike do not tell one {kind} from another.",
        figures.kind_maps(shares, "share"),
        wide=True,
    )
    if len(shares) < 2:
        return [share]
    lift = figures.kind_maps(shares, "log2 lift")
    caption = LIFT_CAPTION.format(kind=kind)
    return [share, page.Plot(f"Preference for a {kind}", caption, lift, wide=True)]


def _information(kind: str, metrics: Record) -> page.Table | None:
    """Layer by layer, beside the control; None for records without one."""
    names = ("", "_shuffled", "_excess", "_share")
    layers = [metrics.get(f"routing/per_layer/{kind}_information{name}") for name in names]
    if not all(layers):
        return None
    rows = np.asarray(layers, np.float64).T  # [L 4]
    shown = [
        [
            str(layer),
            *map(page.number, (found, found / np.log(2), mixed, excess)),
            f"{100 * share:.1f}%",
        ]
        for layer, (found, mixed, excess, share) in enumerate(rows.tolist())
    ]
    title = f"What an expert tells about the {kind}"
    return page.Table(title, sentences(kind, rows), INFORMATION_HEADER, shown)


def sentences(kind: str, rows: Float[np.ndarray, "L 4"]) -> str:
    """What the numbers mean, in words.

    Args:
        kind: domain or modality.
        rows: of each layer the mutual information of the expert with the kind, that of shuffled
            kinds, the difference (nats), and the first as a share of the kind's entropy.
    """
    best = int(rows[:, 2].argmax())
    found, mixed, excess, share = rows[best].tolist()
    control = (
        f"The same numbers with every {kind} given to another at random measure chance: they are "
        "above 0 because tokens are finitely many, and only what is beyond them is knowledge."
    )
    if excess <= mixed:
        return (
            f"No layer's experts tell the {kind} beyond what chance explains: the most, in layer "
            f"{best}, is {found:.2g} nats against {mixed:.2g} nats of shuffled labels. {control}"
        )
    return (
        f"Who knows the expert that a token chose in layer {best} knows {100 * share:.0f}% of what "
        f"there is to know about its {kind}: {found:.2g} nats, or {found / np.log(2):.2g} bits, where "
        f"shuffled labels give {mixed:.2g} nats. Over all layers the mean beyond chance is "
        f"{rows[:, 2].mean():.2g} nats. {control}"
    )


def _favourites(layers: Any) -> page.Table | None:
    """A row an expert, of as many layers as fit, evenly picked."""
    if not layers or not any(rows for layer in layers for rows in layer):
        return None
    count = max(1, min(len(layers), TABLE_ROWS // max(len(layers[0]), 1)))
    picked = np.unique(np.linspace(0, len(layers) - 1, count).round().astype(int)).tolist()
    rows: list[Sequence[page.Cell]] = [
        [f"layer {layer}, expert {e}", [_piece(*row) for row in listed]]
        for layer in picked
        for e, listed in enumerate(layers[layer])
    ]
    caption = (
        "The tokens that come to an expert most beyond its share, with how often it took them and how "
        "many times its share of all choices that is: 1.0 would be no preference, and a layer of E "
        "experts can reach E times. Tokens with fewer than ten choices are not counted."
    )
    if len(picked) < len(layers):
        caption += f" Shown are {len(picked)} of {len(layers)} layers."
    return page.Table("Favourite tokens", caption, ("expert", "tokens"), rows)


def _piece(token: str, count: int, lift: float) -> page.Marked:
    text = token.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣")
    text = "".join(c if c.isprintable() else "·" for c in text)
    short = text if len(text) <= TOKEN_LENGTH else text[: TOKEN_LENGTH - 1] + "…"
    return page.Marked(short, f"{lift:.1f} times, {count:,}")
