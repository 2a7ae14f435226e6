"""Evaluations as text."""

from collections.abc import Sequence
from typing import Any

QUALITY = ("loss/cross_entropy", "perplexity", "bits_per_byte", "accuracy")
# Columns of each task, and what its predictions are; scores with intervals are in the triad.
COLUMNS: dict[str, tuple[tuple[str, ...], str]] = {
    "language": (QUALITY, "tokens"),
    "seq2seq": (QUALITY, "tokens"),
    "classify": (("loss/cross_entropy", "accuracy"), "examples"),
    "ctc": (("loss/cross_entropy", "accuracy"), "labels"),
    "match": (("loss/cross_entropy", "accuracy"), "pairs"),
}
MATRIX = (
    "loss/cross_entropy",
    "bits_per_byte",
    "accuracy",
    "routing/drop_rate",
    "routing/max_violation",
    "speed/tokens_per_second",
)


def align(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def number(value: float | int | None) -> str:
    """Four decimals for small numbers, thousands separated for large ones."""
    if value is None:
        return "-"
    if isinstance(value, int) or abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.4f}"


def evaluation_table(record: dict[str, Any], task: str = "language") -> str:
    """Quality over everything and by domain, then routing, model and speed.

    Args:
        record: of an evaluation.
        task: `task.name`, which says what there is to tell.
    """
    metrics, model = record["metrics"], record["model"]
    columns, counted = COLUMNS[task]
    quality = [["", *columns, counted]]
    for name, values in [("all", metrics), *record["domains"].items()]:
        quality.append(
            [name, *(number(values.get(k)) for k in columns), number(int(values["tokens"]))]
        )
    rest = [[k, number(v)] for k, v in model.items()]
    rest += [[k, number(v)] for k, v in metrics.items() if k.startswith(("speed/", "memory/"))]
    routing = [
        [k, number(v)]
        for k, v in sorted(metrics.items())
        if k.startswith("routing/") and isinstance(v, float)
    ]
    title = f"step {record['step']}, split {record['split']}"
    if record["causality"]["causal_form"] is False:
        title += (
            "\nThe router has no causal form: this is not the loss of a model that can generate."
        )
    if "saturation" in record:
        routing += _saturation_rows(record)
    scores = scores_table(record.get("scores", {}))
    parts = [title, align(quality), scores, align(routing) if routing else "", align(rest)]
    return "\n\n".join(part for part in parts if part)


def scores_table(domains: dict[str, dict[str, dict[str, float]]]) -> str:
    """A line for each domain with the value of each score; empty where there is one domain."""
    names = list(dict.fromkeys(name for scores in domains.values() for name in scores))
    rows = [["", *names, "n"]] if domains else []
    for domain, scores in domains.items():
        values = [number(scores[name]["value"] if name in scores else None) for name in names]
        rows.append([domain, *values, number(max(int(s["n"]) for s in scores.values()))])
    return align(rows) if rows else ""


def _saturation_rows(record: dict[str, Any]) -> list[list[str]]:
    curve = record["saturation"]
    means = [sum(shares) / len(shares) for shares in curve["per_layer"]]
    return [
        [f"saturation, step {step} against {record['step']}", number(mean)]
        for step, mean in zip(curve["steps"], means, strict=True)
    ]


def matrix_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a combination."""
    keys = list(rows[0]["overrides"])
    names = [name for name in MATRIX if name in rows[0]["metrics"]]
    table = [[*keys, *names, "flops_per_token"]]
    for row in rows:
        values = [number(row["metrics"].get(name)) for name in names]
        table.append(
            [
                *(row["overrides"][key] for key in keys),
                *values,
                number(row["model"]["flops_per_token"]),
            ]
        )
    return align(table)
