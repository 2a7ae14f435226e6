"""What a sweep found: a row a point, with the mean over seeds and its 95% interval."""

from collections.abc import Sequence
import csv
import io
import math
from typing import Any, NamedTuple

import optuna
from optuna.trial import FrozenTrial, TrialState
import scipy.stats

from moe.sweep import attempts
from moe.sweep.space import Sweep

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean and half the width of its interval, NaN where one value has none."""

    mean: float
    half_width: float


class Row(NamedTuple):
    """One point of the sweep.

    Attributes:
        trial: the number of the point's first trial, which names its directory.
        state: complete, pruned, failed, running or waiting.
        params: dotted key -> value.
        seeds: seed -> final value, of the seeds that are done.
        interval: over the seeds; None unless the point is complete.
        curves: seed -> [step, value] pairs.
        note: how earlier attempts failed, then the error of a failed trial, or where it was pruned.
    """

    trial: int
    state: str
    params: dict[str, Any]
    seeds: dict[int, float]
    interval: Interval | None
    curves: dict[int, list[list[int | float]]]
    note: str


def student_interval(values: Sequence[int | float], confidence: float = CONFIDENCE) -> Interval:
    """Mean and half-width t s / sqrt(n) of Student's interval (n - 1 degrees of freedom).

    It holds for values that are near normal and independent, as final losses over seeds are.
    """
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Interval(mean, math.nan)
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
    t = float(scipy.stats.t.ppf((1 + confidence) / 2, n - 1))
    return Interval(mean, t * math.sqrt(variance / n))


def rows(study: optuna.Study, sweep: Sweep) -> list[Row]:
    """All points: complete ones first, the best on top, then the others by number."""
    sign = 1.0 if sweep.direction == "minimize" else -1.0
    found = [row(study, trial) for trial in attempts.point_trials(study)]
    return sorted(
        found,
        key=lambda r: (r.interval is None, sign * r.interval.mean if r.interval else 0.0, r.trial),
    )


def row(study: optuna.Study, trial: FrozenTrial) -> Row:
    """The row of one point, from its newest attempt."""
    done = trial.user_attrs.get(attempts.SEEDS, {})
    seeds = {int(seed): result["value"] for seed, result in done.items()}
    complete = trial.state is TrialState.COMPLETE
    first = sorted(trial.intermediate_values.items())
    curves = {int(seed): result["curve"] for seed, result in done.items()}
    if not curves and first:
        curves = {-1: [[step, value] for step, value in first]}  # the first seed, not yet done
    return Row(
        trial=attempts.first_number(trial),
        state={TrialState.FAIL: "failed"}.get(trial.state, trial.state.name.lower()),
        params=trial.params or trial.system_attrs.get("fixed_params", {}),
        seeds=seeds,
        interval=student_interval(list(seeds.values())) if complete else None,
        curves=curves,
        note=_note(study, trial),
    )


def _note(study: optuna.Study, trial: FrozenTrial) -> str:
    known = study.get_trials(deepcopy=False)
    errors = [
        known[number].user_attrs.get(attempts.ERROR, "")
        for number in attempts.earlier_numbers(trial)
    ]
    lines = [f"attempt {i} failed: {_last_line(error)}" for i, error in enumerate(errors, start=1)]
    return "\n".join([*lines, trial.user_attrs.get(attempts.ERROR, "")]).strip()


def _last_line(text: str) -> str:
    """Of a message, what says most."""
    return text.strip().rpartition("\n")[2]


def to_csv(found: Sequence[Row], sweep: Sweep) -> str:
    """The table for other programs, numbers in full."""
    header = ["trial", "state", *sweep.space, "n", "mean", "half_width_95", "low_95", "high_95"]
    header += [f"seed_{seed}" for seed in sweep.seeds] + ["note"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in found:
        writer.writerow(
            [
                row.trial,
                row.state,
                *(row.params.get(key, "") for key in sweep.space),
                len(row.seeds),
                *_numbers(row.interval),
                *(row.seeds.get(seed, "") for seed in sweep.seeds),
                row.note,
            ]
        )
    return text.getvalue()


def _numbers(interval: Interval | None) -> list[Any]:
    if interval is None:
        return ["", "", "", ""]
    mean, half = interval
    return [mean, *("" if math.isnan(v) else v for v in (half, mean - half, mean + half))]


def to_text(found: Sequence[Row], sweep: Sweep) -> str:
    """The table for a terminal, columns aligned."""
    lines = [["trial", "state", *sweep.space, "seeds", sweep.metric, "95% interval", "note"]]
    lines += [
        [
            str(row.trial),
            row.state,
            *(_short(row.params.get(key, "")) for key in sweep.space),
            str(len(row.seeds)),
            f"{row.interval.mean:.4f}" if row.interval else "-",
            interval_text(row.interval),
            _last_line(row.note)[:100],
        ]
        for row in found
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def interval_text(interval: Interval | None) -> str:
    """`+- half-width`, or why there is none."""
    if interval is None:
        return "-"
    return "one seed" if math.isnan(interval.half_width) else f"+- {interval.half_width:.4f}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
