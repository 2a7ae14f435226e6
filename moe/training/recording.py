"""The history of a run: one JSON line a record in `metrics.jsonl`, scalars for TensorBoard.

JSON knows no NaN and no infinity: both are written as null, so that every reader can parse every
line. A disk that is full never stops training: the first failure is warned about, the lost lines
stay lost, and no half line or half event is left behind. No file stays open between two records.
"""

from collections.abc import Mapping
import json
import math
import os
from pathlib import Path
import re
import struct
from types import TracebackType
from typing import Any

from absl import logging
import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog  # ty: ignore[missing-module-member]
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar

from moe.training.workdir import write_atomically

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIRECTORY = "tensorboard"
_EVENTS = re.compile(r"events\.out\.tfevents\.(\d+)\.")


class Recorder:
    """Appends records to `<workdir>/metrics.jsonl` and `<workdir>/tensorboard/<split>/`.

    Args:
        workdir: Exists already.
        primary: Whether this process writes; in a run of several processes only process 0 does.
    """

    def __init__(self, workdir: str | Path, *, primary: bool = True):
        self._path = Path(workdir) / METRICS_FILE
        self._events_directory = Path(workdir) / TENSORBOARD_DIRECTORY
        self._primary = primary
        self._first_step: int | None = None  # of this process, once the history was rewound
        self._events: dict[str, Path] = {}  # split -> file
        self._warned = False

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def rewind(self, step: int) -> None:
        """Drops every record after `step`: call it before the first `write` of a process.

        A run that goes on from a checkpoint does the steps after it again, so each step stands in
        the history once. A last line cut short by a kill is dropped too.

        Args:
            step: Optimiser steps done in the restored state; 0 for a new run.
        """
        if not self._primary:
            return
        self._first_step = step + 1
        try:
            self._rewind_lines(step)
        except OSError as error:
            self._warn(error)

    def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Records the values of one step.

        Args:
            step: Optimiser steps done.
            split: `train`, `valid`, ...
            values: Numbers, or arrays and nested lists of numbers. Only numbers reach TensorBoard.
        """
        if not self._primary:
            return
        plain = {key: _plain(value) for key, value in values.items()}
        line = json.dumps({"step": step, "split": split, **plain}, allow_nan=False)
        try:
            _append(self._path, line.encode() + b"\n")
            self._write_events(step, split, plain)
        except OSError as error:
            self._warn(error)

    def close(self) -> None:
        """Every record is in its file already: what is written later starts another file of events."""
        self._events.clear()

    def _rewind_lines(self, step: int) -> None:
        if not self._path.exists():
            return
        before = self._path.read_bytes()
        lines = before.splitlines(keepends=True)
        after = b"".join(line for line in lines if _is_kept(line, step))
        if after == before:
            return
        write_atomically(self._path, after)

    def _write_events(self, step: int, split: str, values: dict[str, Any]) -> None:
        events = [
            Event(step=step, summary=scalar(key, value))
            for key, value in values.items()
            if isinstance(value, float | int)
        ]
        path = self._events.get(split) or self._next_events(split)
        if split not in self._events:
            events = [*self._opening(), *events]
        _append(path, b"".join(_framed(event) for event in events))
        self._events[split] = path

    def _next_events(self, split: str) -> Path:
        """One directory a split, so that TensorBoard draws its curves over those of the others.

        TensorBoard reads the files of a directory in the order of their names and expects the time of
        their making there. A number one above the last keeps the order when the clock jumps.
        """
        directory = self._events_directory / split
        directory.mkdir(parents=True, exist_ok=True)
        found = [_EVENTS.match(path.name) for path in directory.iterdir()]
        number = max((int(one[1]) for one in found if one is not None), default=0) + 1
        return directory / f"events.out.tfevents.{number:010d}.moe"

    def _opening(self) -> list[Event]:
        """What a file starts with: its version, and a mark that hides older events from a step on."""
        opening = [Event(file_version="brain.Event:2")]
        if self._first_step is not None:
            start = SessionLog(status=SessionLog.START)
            opening.append(Event(step=self._first_step, session_log=start))
        return opening

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            logging.warning(
                "Metrics cannot be written in %s (%s). Training goes on; records are lost until "
                "there is room again. This is said once.",
                self._path.parent,
                error.strerror or error,
            )


def read_records(workdir: str | Path) -> list[dict[str, Any]]:
    """All whole records of `metrics.jsonl`, in the order written; empty if there is no file."""
    path = Path(workdir) / METRICS_FILE
    if not path.exists():
        return []
    records = (_parse(line) for line in path.read_bytes().splitlines(keepends=True))
    return [record for record in records if record is not None]


def _is_kept(line: bytes, step: int) -> bool:
    record = _parse(line)
    return record is not None and record["step"] <= step


def _parse(line: bytes) -> dict[str, Any] | None:
    """A record, or None for a line that a kill or a full disk cut short."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _append(path: Path, line: bytes) -> None:
    """Appends the whole line or nothing of it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        written = os.write(descriptor, line)  # an error has written nothing
        if written < len(line):
            os.ftruncate(descriptor, size)
            raise OSError(f"only {written} of {len(line)} bytes fit")
    finally:
        os.close(descriptor)


def _framed(event: Event) -> bytes:
    """A record of TFRecord: length, its checksum, payload, its checksum."""
    payload = event.SerializeToString()
    length = struct.pack("<Q", len(payload))
    checks = [struct.pack("<I", masked_crc32c(part)) for part in (length, payload)]
    return length + checks[0] + payload + checks[1]


def _plain(value: Any) -> Any:
    """Python numbers and lists for scalars, arrays and nested lists; None for NaN and infinity."""
    if isinstance(value, list | tuple):
        return [_plain(element) for element in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, int | str):
        return value
    return _plain(np.asarray(value).tolist())
