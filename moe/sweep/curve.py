"""The metric of a run over its steps, read while it trains, and what pruning makes of it."""

from collections.abc import Mapping
import math
import os
from pathlib import Path

from optuna.trial import Trial

from moe.report.records import parse_record
from moe.sweep.space import Sweep

CURVE_POINTS = 200  # of a learning curve kept in the storage


class Curve:
    """The metric over steps, read from a metrics.jsonl that grows.

    Args:
        path: need not exist yet.
        sweep: names the metric and the split.
    """

    def __init__(self, path: Path, sweep: Sweep):
        self._path = path
        self._metric, self._split = sweep.metric, sweep.split
        self._offset = 0
        self._file: tuple[int, int] | None = None
        self.points: dict[int, float] = {}  # NaN where the file says null
        self.keys: set[str] = set()  # of the split's lines

    def update(self) -> None:
        """Reads the lines that are new; a file that was replaced or cut is read from its start."""
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                identity = status.st_dev, status.st_ino
                if identity != self._file or status.st_size < self._offset:
                    self._file, self._offset = identity, 0
                    self.points.clear()
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            return
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.decode("utf-8", errors="replace").splitlines():
            self._read(line)

    def _read(self, line: str) -> None:
        record = parse_record(line)
        if record is None or record["split"] != self._split:
            return
        self.keys |= record.keys()
        if self._metric in record:
            value = record[self._metric]
            self.points[record["step"]] = math.nan if value is None else float(value)

    def position(self) -> tuple[tuple[int, int] | None, int]:
        """Changes whenever the run has logged something."""
        return self._file, self._offset

    def last(self) -> tuple[int, float] | None:
        """The last step and its value."""
        return max(self.points.items()) if self.points else None

    def thinned(self) -> list[list[int | float]]:
        """[step, value] pairs for the storage, the last one among them."""
        found = [[step, value] for step, value in sorted(self.points.items())]
        stride = -(-len(found) // CURVE_POINTS) or 1
        return found[::-1][::stride][::-1]


class Pruning:
    """Reports a curve to Optuna and asks whether to go on."""

    def __init__(self, trial: Trial):
        self._trial = trial
        known = trial.study.get_trials(deepcopy=False)[trial.number]
        self._reported = set(known.intermediate_values)

    def is_hopeless(self, points: Mapping[int, float]) -> bool:
        """Whether the newest of the points is so bad that the trial should end."""
        new = sorted(step for step in points if step not in self._reported)
        for step in new:
            self._trial.report(points[step], step)
            self._reported.add(step)
        return bool(new) and self._trial.should_prune()
