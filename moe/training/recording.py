"""The history of a run: one JSON line a record in `metrics.jsonl`, scalars for TensorBoard.

JSON knows no NaN and no infinity: both are written as null, so that every reader can parse every
line. A disk that is full never stops training: the first failure is warned about, the lost lines
stay lost, and no half line is left behind.
"""

from collections.abc import Mapping
import json
import math
import os
from pathlib import Path
import time
from types import TracebackType
from typing import Any

from absl import logging
import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # ty: ignore[missing-module-member]
from tensorboardX.summary import scalar

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIRECTORY = "tensorboard"


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
        self._writers: dict[str, EventsWriter] = {}
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
        """Closes the TensorBoard files; every line is on disk already."""
        for writer in self._writers.values():
            try:
                writer.close()
            except OSError as error:
                self._warn(error)
        self._writers.clear()

    def _rewind_lines(self, step: int) -> None:
        if not self._path.exists():
            return
        before = self._path.read_bytes()
        lines = before.splitlines(keepends=True)
        after = b"".join(line for line in lines if _is_kept(line, step))
        if after == before:
            return
        replacement = self._path.with_name(METRICS_FILE + ".tmp")
        with replacement.open("wb") as file:
            file.write(after)
            file.flush()
            os.fsync(file.fileno())
        replacement.replace(self._path)

    def _write_events(self, step: int, split: str, values: dict[str, Any]) -> None:
        writer = self._writers.get(split)
        if writer is None:
            writer = self._writers[split] = self._open_events(split)
        for key, value in values.items():
            if isinstance(value, float | int):
                writer.write_event(Event(step=step, summary=scalar(key, value)))
        writer.flush()

    def _open_events(self, split: str) -> EventsWriter:
        """One directory a split, so that TensorBoard draws its curves over those of the others."""
        directory = self._events_directory / split
        directory.mkdir(parents=True, exist_ok=True)
        # The library names files by the second and would overwrite that of a quick restart.
        writer = EventsWriter(str(directory / "events"), filename_suffix=f".{time.time_ns()}")
        if self._first_step is not None:
            start = SessionLog(status=SessionLog.START)  # hides older events from this step on
            writer.write_event(Event(step=self._first_step, session_log=start))
        return writer

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
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _append(path: Path, line: bytes) -> None:
    """Appends the whole line or nothing of it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        try:
            written = os.write(descriptor, line)
        except OSError:
            os.ftruncate(descriptor, size)
            raise
        if written < len(line):
            os.ftruncate(descriptor, size)
            raise OSError(f"only {written} of {len(line)} bytes fit")
    finally:
        os.close(descriptor)


def _plain(value: Any) -> Any:
    """Python numbers and lists for scalars, arrays and nested lists; None for NaN and infinity."""
    if isinstance(value, list | tuple):
        return [_plain(element) for element in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, int | str):
        return value
    return _plain(np.asarray(value).tolist())
