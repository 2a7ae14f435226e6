"""Accuracy, cost and generalisation of a run, from the entry `triad` of its evaluations."""

from collections.abc import Mapping
from typing import Any

from moe.evaluation.triad import COST
from moe.report import page
from moe.report.records import Record, Run

INTERVAL = "95% interval"


def sections(run: Run) -> list[page.Section]:
    """One section, with the tables of every split whose newest evaluation has a triad."""
    found = [(s, r["triad"]) for s, r in sorted(run.evaluations.items()) if r.get("triad")]
    tables = [table for split, record in found for table in _tables(split, record)]
    if not tables:
        return []
    caption = (
        "How good the model is, what it takes, and how it does on other data. Intervals are of the "
        "bootstrap over examples: another sample of the same kind would give a value inside 95 times "
        "in 100; other seeds of training vary beyond that."
    )
    return [page.Section("Accuracy, cost, generalisation", caption, (), tables)]


def _tables(split: str, record: Record) -> list[page.Table]:
    primary, accuracy = record.get("primary"), record.get("accuracy") or {}
    names = sorted(accuracy, key=lambda name: name != primary)  # the primary first
    quality = [[name, *_cells(accuracy[name])] for name in names]
    cost = [
        [f"{name}: {COST[name]}" if name in COST else name, page.number(value)]
        for name, value in (record.get("cost") or {}).items()
    ]
    checks = [
        [f"{check} · {score}", *_cells(found), _signed(found.get("difference"))]
        for check, scores in (record.get("generalisation") or {}).items()
        for score, found in scores.items()
    ]
    tables = (
        page.Table(
            f"Accuracy, {split}",
            "Every example of the split once.",
            ("score", "value", INTERVAL, "examples"),
            quality,
        ),
        page.Table(
            f"Cost, {split}",
            "Active parameters and FLOPs are those that one token meets.",
            ("cost", "value"),
            cost,
        ),
        page.Table(
            f"Generalisation, {split}",
            f"The same scores under other conditions; the difference is to {split} itself.",
            ("condition", "value", INTERVAL, "examples", "difference"),
            checks,
        ),
    )
    return [table for table in tables if table.rows]


def _cells(found: Mapping[str, Any]) -> list[str]:
    low, high = (page.number(found.get(key)) for key in ("low", "high"))
    return [page.number(found.get("value")), f"{low} to {high}", page.number(found.get("n"))]


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}"
