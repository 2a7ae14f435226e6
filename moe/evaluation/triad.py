"""The three things that a model is judged by: accuracy, cost, and how it does on other data."""

from typing import Any

from moe.evaluation.bootstrap import Interval
from moe.evaluation.examples import Examples
from moe.evaluation.scores import SCORES
from moe.evaluation.tables import align, number

Scores = dict[str, Interval]

COST = {  # key -> what it is
    "parameters_total": "numbers of the model",
    "parameters_active": "those that one token meets",
    "flops_per_token": "forward pass, by the config",
    "flops_executed": "forward pass, of the tokens of this evaluation",
    "flops_per_example": "of a row, every position counted",
    "examples_per_second": "rows of this evaluation, reading included",
    "tokens_per_second": "positions of those rows",
    "memory/host_peak_bytes": "of the process, so far",
    "memory/device_peak_bytes": "of the fullest device, where it tells",
}


def cost_of(
    record: dict[str, Any], examples: Examples, sequence_length: int
) -> dict[str, float | int]:
    """The entry `cost`: what the model takes, and how fast this evaluation was.

    Args:
        record: of an evaluation, with `model` and `metrics`.
        examples: its rows.
        sequence_length: positions of a row.
    """
    model, metrics = record["model"], record["metrics"]
    seconds = metrics["tokens"] / metrics["speed/tokens_per_second"]  # `tokens` are predictions
    rows = len(examples.index) / seconds
    found = {name: model[name] for name in COST if name in model}
    found["flops_per_example"] = model["flops_per_token"] * sequence_length
    found |= {"examples_per_second": rows, "tokens_per_second": rows * sequence_length}
    return found | {name: metrics[name] for name in COST if name in metrics}


def triad(
    accuracy: Scores,
    cost: dict[str, float | int],
    generalisation: dict[str, Scores],
    *,
    primary: str,
) -> dict[str, Any]:
    """The entry `triad` of an evaluation's record.

    Args:
        accuracy: scores of the split.
        cost: of `cost_of`.
        generalisation: scores of each check, by its name.
        primary: the score that counts; where the split has none such, the first that it has.

    Returns:
        `accuracy`: score -> value, low, high, n. `generalisation`: check -> score -> the same, and
        `difference`: the value less that of the split.
    """
    name = primary if primary in accuracy else next(iter(accuracy))
    checks = {}
    for check, scores in generalisation.items():
        checks[check] = {
            score: value.to_json() | {"difference": value.value - accuracy[score].value}
            for score, value in scores.items()
            if score in accuracy
        }
    return {
        "primary": name,
        "accuracy": {score: value.to_json() for score, value in accuracy.items()},
        "cost": cost,
        "generalisation": checks,
    }


def triad_table(record: dict[str, Any]) -> str:
    """The triad as text; the score that counts stands first, and is the one that checks compare."""
    primary, accuracy = record["primary"], record["accuracy"]
    names = [primary, *(name for name in accuracy if name != primary)]
    heading = ["value", "low", "high", "n"]
    rows = [["ACCURACY, 95% interval", *heading, ""]]
    rows += [[name, *_cells(accuracy[name]), _direction(name)] for name in names]
    cost = [["COST", ""], *([name, number(value)] for name, value in record["cost"].items())]
    parts = [align(rows), align(cost)]
    checks = record["generalisation"]
    if checks:
        rows = [[f"GENERALISATION, {primary}", *heading, "difference"]]
        for check, scores in checks.items():
            found = scores.get(primary)
            cells = ["-"] * 5
            if found is not None:
                cells = [*_cells(found), f"{found['difference']:+.4f}"]
            rows.append([check, *cells])
        parts.append(align(rows))
    return "\n\n".join(parts)


def _cells(found: dict[str, Any]) -> list[str]:
    return [*(number(float(found[key])) for key in ("value", "low", "high")), number(found["n"])]


def _direction(name: str) -> str:
    return "higher is better" if SCORES[name].higher else "lower is better"
