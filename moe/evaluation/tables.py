"""Evaluations as text."""

from collections.abc import Sequence
from typing import Any

QUALITY = ("loss/cross_entropy", "perplexity", "bits_per_byte", "accuracy")
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


def evaluation_table(record: dict[str, Any]) -> str:
    """Quality over all text and by domain, then routing, model and speed."""
    metrics, model = record["metrics"], record["model"]
    quality = [["", *QUALITY, "tokens"]]
    for name, values in [("all", metrics), *record["domains"].items()]:
        quality.append(
            [name, *(number(values.get(k)) for k in QUALITY), number(int(values["tokens"]))]
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
    parts = [title, align(quality), align(routing) if routing else "", align(rest)]
    return "\n\n".join(part for part in parts if part)


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
