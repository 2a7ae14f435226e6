"""Which checkpoints stay: the newest, and the best of those that were evaluated."""

from collections.abc import Iterable, Mapping
import json
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging

from moe.errors import ConfigError
from moe.training.record import finite_numbers
from moe.training.workdir import write_atomically

SCORES_FILE = "scores.json"


class KeepRules(NamedTuple):
    """How many steps stay, and by what the best are told."""

    latest: int = 2  # newest steps, at least 1
    best: int = 1  # steps with the best `metric`
    metric: str = "bits_per_byte"
    mode: str = "min"  # or max

    def check(self) -> None:
        """Raises ConfigError for a rule that cannot work."""
        for name, value, least in (
            ("keep_latest", self.latest, 1),
            ("keep_best", self.best, 0),
        ):
            if value < least:
                raise ConfigError(f"checkpoint.{name}={value} must be at least {least}.")
        if self.mode not in ("min", "max"):
            raise ConfigError(f"checkpoint.best_mode={self.mode!r} must be 'min' or 'max'.")

    def ranked(self, metrics: Mapping[int, Mapping[str, float]]) -> list[int]:
        """Steps that have the metric, best first, the newer of two equals first."""
        sign = 1.0 if self.mode == "min" else -1.0
        scores = {
            step: sign * values[self.metric]
            for step, values in metrics.items()
            if self.metric in values
        }
        return sorted(scores, key=lambda step: (scores[step], -step))

    def kept(self, metrics: Mapping[int, Mapping[str, float]]) -> set[int]:
        """The steps that stay.

        Args:
            metrics: Of every step that is a checkpoint of ours.
        """
        return set(sorted(metrics)[-self.latest :]) | set(self.ranked(metrics)[: self.best])


class Scores:
    """Metrics of evaluations that came after their save, in `scores.json`.

    Every process holds them; process 0 writes them.

    Args:
        directory: Of the checkpoints.
        writes: Whether this process writes the file.
    """

    def __init__(self, directory: Path, *, writes: bool):
        self._path = directory / SCORES_FILE
        self._writes = writes
        self._metrics = self._read()

    def of(self, step: int) -> dict[str, float]:
        """The metrics of a step; empty if none were added."""
        return self._metrics.get(step, {})

    def add(self, step: int, metrics: Mapping[str, Any], there: Iterable[int]) -> None:
        """Adds the finite numbers of `metrics` to a step; forgets steps that are not `there`."""
        self._metrics[step] = {**self.of(step), **finite_numbers(metrics)}
        self.forget(set(self._metrics) - set(there))

    def forget(self, steps: Iterable[int]) -> None:
        """Drops steps and writes the file."""
        for step in steps:
            self._metrics.pop(step, None)
        if not self._writes:
            return
        content = {str(step): self._metrics[step] for step in sorted(self._metrics)}
        try:
            write_atomically(self._path, json.dumps(content, indent=1) + "\n")
        except OSError as error:
            logging.warning(
                "%s was not written: %s. After a restart the best checkpoint is told without it.",
                self._path,
                error,
            )

    def _read(self) -> dict[int, dict[str, float]]:
        try:
            content = json.loads(self._path.read_bytes())
            return {int(step): finite_numbers(values) for step, values in content.items()}
        except FileNotFoundError:
            return {}
        except (
            *(OSError, ValueError, TypeError, AttributeError, RecursionError),
            OverflowError,  # a whole number beyond floats
        ) as error:
            logging.warning(
                "%s is left out: %s. The best checkpoint is told without it.", self._path, error
            )
            return {}
