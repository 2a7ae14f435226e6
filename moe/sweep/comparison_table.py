"""What a comparison found: a row an arm, means over seeds, intervals where they matter."""

from collections.abc import Mapping, Sequence
import csv
import io
import math
from typing import Any, NamedTuple

from moe.evaluation.tables import align
from moe.sweep.arm_runner import ArmResult, Results
from moe.sweep.arms import Arm, Comparison
from moe.sweep.table import Interval, student_interval

# Means over seeds: key, heading, digits after the point (None: thousands apart).
COLUMNS: tuple[tuple[str, str, int | None], ...] = (
    ("accuracy", "accuracy", 3),
    ("relative_speed", "speed", 2),
    ("executed_flops", "FLOPs/token", None),
    ("parameters_total", "parameters", None),
    ("choices", "k", 2),
    ("load_violation", "violation", 2),
    ("dead_experts", "dead", 1),
    ("entropy", "entropy", 2),
    ("drop_rate", "drops", 3),
    ("saturation", "saturation", 3),
    ("causal_gap", "causal gap", 3),
)
CSV_MEANS = (
    *(key for key, _, _ in COLUMNS),
    *("tokens_per_second", "flops_per_token", "parameters_active", "causal_flip_rate"),
)


class Row(NamedTuple):
    """One arm.

    Attributes:
        arm: which.
        state: complete, failed, or missing seeds.
        seeds: seed -> loss.
        loss: mean over seeds with 95% interval; None without any seed.
        out_of_domain: the same of the domain held out; None where there is none.
        difference: loss less that of the reference, paired by seed: what the seeds share (text,
            order) cancels.
        means: key -> mean over the seeds, None where it does not apply.
        note: why it failed.
    """

    arm: Arm
    state: str
    seeds: dict[int, int | float]
    loss: Interval | None
    out_of_domain: Interval | None
    difference: Interval | None
    means: dict[str, float | None]
    note: str


def rows(comparison: Comparison, arms: Sequence[ArmResult]) -> list[Row]:
    """All arms, the lowest loss first; those without any loss at the end."""
    wanted = {a.arm.name: _seeds(a.results, comparison.seeds) for a in arms}
    reference = wanted[comparison.reference]
    found = [_row(a, wanted[a.arm.name], reference, comparison.seeds) for a in arms]
    return sorted(found, key=lambda row: math.inf if row.loss is None else row.loss.mean)


def _seeds(results: Results, seeds: Sequence[int]) -> dict[int, dict[str, Any]]:
    return {seed: results[seed]["metrics"] for seed in seeds if seed in results}


def _row(
    result: ArmResult,
    runs: Mapping[int, Mapping[str, Any]],
    reference: Mapping[int, Mapping[str, Any]],
    seeds: Sequence[int],
) -> Row:
    complete = len(runs) == len(seeds)
    losses = values_of(runs, "loss")
    theirs = values_of(reference, "loss")
    pairs = {seed: losses[seed] - theirs[seed] for seed in losses if seed in theirs}
    means = {key: _mean(values_of(runs, key)) for key in CSV_MEANS}
    speed = _mean(values_of(reference, "tokens_per_second"))
    own = means["tokens_per_second"]
    means["relative_speed"] = None if own is None or not speed else own / speed
    return Row(
        arm=result.arm,
        state="complete" if complete else "failed" if result.error else "incomplete",
        seeds=losses,
        loss=interval(losses),
        out_of_domain=interval(values_of(runs, "out_of_domain_loss")),
        difference=interval(pairs),
        means=means,
        note="" if complete else result.error,
    )


def values_of(runs: Mapping[int, Mapping[str, Any]], key: str) -> dict[int, int | float]:
    """Value by seed, of the seeds that have one."""
    return {seed: m[key] for seed, m in runs.items() if m.get(key) is not None}


def _mean(values: Mapping[int, int | float]) -> float | None:
    return math.fsum(values.values()) / len(values) if values else None


def interval(values: Mapping[int, int | float]) -> Interval | None:
    """Mean over seeds and its interval of Student's t; None without values."""
    return student_interval(list(values.values())) if values else None


def to_csv(comparison: Comparison, found: Sequence[Row]) -> str:
    """The table for other programs, numbers in full; empty where something does not apply."""
    intervals = ("loss", "out_of_domain", "difference")
    header = ["arm", "group", "router", "causality", "state", "n"]
    for name in intervals:
        header += [name, f"{name}_half_width_95"]
    header += [*CSV_MEANS, *(f"seed_{seed}" for seed in comparison.seeds), "note"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in found:
        cells: list[Any] = [row.arm.name, row.arm.group, row.arm.router, row.arm.causality]
        cells += [row.state, len(row.seeds)]
        for name in intervals:
            cells += _numbers(getattr(row, name))
        cells += ["" if row.means[key] is None else row.means[key] for key in CSV_MEANS]
        cells += [row.seeds.get(seed, "") for seed in comparison.seeds]
        writer.writerow([*cells, row.note])
    return text.getvalue()


def _numbers(found: Interval | None) -> list[Any]:
    if found is None:
        return ["", ""]
    return [found.mean, "" if math.isnan(found.half_width) else found.half_width]


def headings(comparison: Comparison, found: Sequence[Row]) -> list[str]:
    """Columns of `cells`: those that some arm has."""
    shown = ["loss", f"less {comparison.reference}"]
    shown += ["out of domain"] if comparison.out_of_domain else []
    return ["arm", *shown, *(heading for _, heading, _ in columns(found))]


def columns(found: Sequence[Row]) -> list[tuple[str, str, int | None]]:
    """Of `COLUMNS`, those that some arm has a value of."""
    return [c for c in COLUMNS if any(row.means[c[0]] is not None for row in found)]


def cells(comparison: Comparison, row: Row, found: Sequence[Row]) -> list[str]:
    """One row for people, in the order of `headings`."""
    own = row.arm.name == comparison.reference
    shown = [interval_cell(row.loss), "-" if own else interval_cell(row.difference, sign="+")]
    shown += [interval_cell(row.out_of_domain)] if comparison.out_of_domain else []
    name = row.arm.name + (" (C3)" if row.arm.causality == "C3" else "")
    return [name, *shown, *(_cell(row.means[key], digits) for key, _, digits in columns(found))]


def interval_cell(found: Interval | None, sign: str = "") -> str:
    """`mean +- half-width`; without the latter for one seed."""
    if found is None:
        return "-"
    half = "" if math.isnan(found.half_width) else f" +- {found.half_width:.3f}"
    return f"{found.mean:{sign}.3f}{half}"


def _cell(value: int | float | None, digits: int | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if digits is None else f"{value:.{digits}f}"


def to_text(comparison: Comparison, found: Sequence[Row]) -> str:
    """The table for a terminal, then the arms that failed and why."""
    table = [headings(comparison, found), *(cells(comparison, row, found) for row in found)]
    notes = [f"{row.arm.name} {row.state}: {row.note}".strip() for row in found if row.note]
    return "\n".join([f"loss: {unit(comparison)}, valid split", align(table), *notes])


def unit(comparison: Comparison) -> str:
    """Of the loss."""
    if comparison.task == "classify":
        return "nats a row"
    return "bits per byte" + (f" of {comparison.in_domain}" if comparison.in_domain else "")
