"""Reads what a run left in its workdir: metrics.jsonl, config.json and eval/*.json.

A run may still be going, or may have been killed in the middle of a line: what cannot be read is
left out and named in `Run.notices`, so that a gap on the page is never silent.
"""

from collections.abc import Mapping, Sequence
import json
from pathlib import Path
import re
from typing import Any, NamedTuple

from jaxtyping import Float, Int
import numpy as np

from moe.errors import DataError

EVAL_NAME = re.compile(r"(?P<split>.+)-(?P<step>\d+)\.json")

Record = Mapping[str, Any]


class Series(NamedTuple):
    """One metric over steps; the trailing axes are scalar, `L`, or `L E`."""

    steps: Int[np.ndarray, " N"]
    values: Float[np.ndarray, "N ..."]


class Run(NamedTuple):
    """Everything the page shows.

    Attributes:
        name: the workdir's own name.
        metrics: split -> records of metrics.jsonl, in the order of their steps.
        config: config.json, empty where there is none.
        evaluations: split -> the newest eval/<split>-<step>.json.
        notices: sentences about what is missing or could not be read.
    """

    name: str
    metrics: Mapping[str, Sequence[Record]]
    config: Record
    evaluations: Mapping[str, Record]
    notices: Sequence[str]


def read_run(workdir: Path) -> Run:
    """Reads a workdir.

    Raises:
        DataError: there is no metrics.jsonl, or no line of it can be read.
    """
    notices: list[str] = []
    path = workdir / "metrics.jsonl"
    metrics, broken = read_metrics(path)
    if not metrics:
        raise DataError(
            f"{path} has no line that can be read: a report needs at least one logged step. "
            "Let the run reach its first log_every, or give the workdir of another run."
        )
    if broken:
        notices.append(
            f"{broken} line(s) of metrics.jsonl could not be read (a run that was killed while "
            "writing leaves such a line) and are left out."
        )
    config = _read_object(workdir / "config.json", notices)
    if not (workdir / "config.json").exists():
        notices.append("There is no config.json beside metrics.jsonl.")
    return Run(
        name=workdir.resolve().name,
        metrics=metrics,
        config=config,
        evaluations=_newest_evaluations(workdir / "eval", notices),
        notices=notices,
    )


def read_metrics(path: Path) -> tuple[dict[str, list[Record]], int]:
    """The records of a metrics.jsonl by split, and how many lines could not be read.

    A run that was interrupted may log a step again after it continues: the last record of a step
    counts, keys merged, so that a step has one value.

    Raises:
        DataError: the file is missing or cannot be opened.
    """
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): give the workdir of a run of train.py, "
            "which holds a metrics.jsonl."
        ) from error
    by_split: dict[str, dict[int, dict[str, Any]]] = {}
    broken = 0
    for line in text.splitlines():
        if not line.strip():
            continue
        record = parse_record(line)
        if record is None:
            broken += 1
        else:
            steps = by_split.setdefault(record["split"], {})
            steps.setdefault(record["step"], {}).update(record)
    return {split: [s[n] for n in sorted(s)] for split, s in by_split.items()}, broken


def parse_record(line: str) -> dict[str, Any] | None:
    """One line of metrics.jsonl, or None where it is not a whole record."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("split"), str):
        return None
    step = record.get("step")
    return record if isinstance(step, int) and not isinstance(step, bool) else None


def series(records: Sequence[Record], key: str, rank: int = 0) -> Series | None:
    """A metric over the steps that logged it, or None where no step did.

    Args:
        records: of one split.
        key: for example `loss/total`.
        rank: trailing axes of a value: 0 scalar, 1 per layer, 2 layer by expert. Values whose shape
            differs from the last one's are left out.
    """
    steps, values = [], []
    for record in records:
        value = _as_array(record[key], rank) if key in record else None
        if value is not None:
            steps.append(record["step"])
            values.append(value)
    if not values:
        return None
    keep = [i for i, value in enumerate(values) if value.shape == values[-1].shape]
    return Series(
        np.asarray([steps[i] for i in keep], np.int64), np.stack([values[i] for i in keep])
    )


def last(records: Sequence[Record], key: str) -> float | None:
    """The last number logged under a key."""
    found = series(records, key)
    return None if found is None else float(found.values[-1])


def _as_array(value: Any, rank: int) -> np.ndarray | None:
    """A float64 array of the wanted rank, or None; null, which stands for NaN in JSON, is NaN."""
    if isinstance(value, str | bool | dict):
        return None
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError):  # ragged lists, or text inside
        return None
    return array if array.ndim == rank and array.size else None


def _read_object(path: Path, notices: list[str]) -> dict[str, Any]:
    """A JSON object; an absent file is empty, an unreadable one is empty with a notice."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        notices.append(f"{path.parent.name}/{path.name} could not be read ({error}).")
        return {}
    if not isinstance(value, dict):
        notices.append(f"{path.parent.name}/{path.name} holds no JSON object.")
        return {}
    return value


def _newest_evaluations(directory: Path, notices: list[str]) -> dict[str, Record]:
    newest: dict[str, tuple[int, Path]] = {}
    for path in sorted(directory.glob("*.json")) if directory.is_dir() else ():
        match = EVAL_NAME.fullmatch(path.name)
        if match is None:
            continue
        found = int(match["step"]), path
        newest[match["split"]] = max(found, newest.get(match["split"], found))
    read = {split: _read_object(path, notices) for split, (_, path) in newest.items()}
    return {split: record for split, record in read.items() if record}
