"""What a directory of checkpoints holds: steps, their records and metrics, and what is wrong."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from absl import logging
import jax

from moe.errors import CheckpointError, ResourceError
from moe.training import manifest, quarantine, step_folder, stored
from moe.training.keeping import KeepRules, Scores
from moe.training.record import NEW_SINCE, is_known
from moe.training.save_failure import chain, root_cause


class DamagedError(CheckpointError):
    """A checkpoint that does not read back as it was written."""

    def __init__(self, message: str, cause: str):
        super().__init__(message)
        self.cause = cause


class Catalogue:
    """The steps of one directory, listed once: what a run changes it changes here as well.

    Args:
        directory: Of the checkpoints.
        rules: Which steps stay.
        writes: Whether this process writes `scores.json`.
        follows: Whether another run may be writing there, so that the newest step may be half gone.
    """

    def __init__(self, directory: Path, rules: KeepRules, *, writes: bool, follows: bool):
        self.directory = directory
        self.steps = step_folder.steps_in(directory)
        self._rules = rules
        self._follows = follows
        self._records: dict[int, dict | None] = {}
        self._scores = Scores(directory, writes=writes)

    def folder(self, step: int) -> Path:
        """Where a step lies."""
        return self.directory / str(step)

    def usable(self) -> list[int]:
        """Steps with an intact record, ascending. Raises CheckpointError if none of several has."""
        steps = [step for step in self.steps if self.record(step) is not None]
        if self.steps and not steps:
            raise self.none_usable(self.steps)
        return steps

    def record(self, step: int) -> dict | None:
        """The record of a step, None if it is missing or its own checksum is wrong."""
        if step not in self._records:
            self._records[step] = step_folder.read_record(self.folder(step))
            if self._records[step] is None:
                logging.warning("Left out %s: not a whole checkpoint of ours.", self.folder(step))
        return self._records[step]

    def known_record(self, step: int) -> dict:
        """The record of a step. Raises CheckpointError if it is damaged or of a later format."""
        record = self.record(step)
        if record is None:
            raise self.damaged(step, "it has no intact record of its leaves")
        if not is_known(record):
            raise CheckpointError(
                f"Checkpoint {step} in {self.directory} has format {record['format']}, and this "
                f"program reads {list(NEW_SINCE)}. Use the version that wrote it, or a newer one."
            )
        return record

    def add(self, step: int, record: dict) -> list[int]:
        """Adds a step that was saved; drops and returns those that no rule keeps."""
        self._records[step] = record
        self.steps = sorted({*self.steps, step})
        return self.prune()

    def prune(self) -> list[int]:
        """Drops and returns steps that no rule keeps. What is not ours always stays."""
        metrics = self._metrics()
        dropped = sorted(set(metrics) - self._rules.kept(metrics))
        self.steps = [step for step in self.steps if step not in dropped]
        return dropped

    def forget(self, steps: Iterable[int]) -> None:
        """Drops steps that were moved away, with their metrics."""
        gone = set(steps)
        self.steps = [step for step in self.steps if step not in gone]
        for step in gone:
            self._records.pop(step, None)
        if any(self._scores.of(step) for step in gone):
            self._scores.forget(gone)

    def rate(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Adds metrics to a step that is there."""
        self._scores.add(step, metrics, self.steps)

    def metrics(self, step: int) -> dict[str, float]:
        """Metrics of a step that came with its save or after it."""
        record = self.record(step)
        saved = record["metrics"] if record and is_known(record) else {}
        return {**saved, **self._scores.of(step)}

    def ranked(self, steps: list[int]) -> list[int]:
        """Those of `steps` that have the metric of the rules, best first."""
        metrics = self._metrics()
        return self._rules.ranked({step: metrics[step] for step in steps if step in metrics})

    def resolve(self, step: int | str) -> int:
        """As `Checkpointer.resolve`."""
        steps = self.usable()
        if step == "latest" and steps:
            return self._newest_sound(steps) if self._follows else steps[-1]
        if step == "best" and self.ranked(steps):
            return self.ranked(steps)[0]
        if step in steps:
            return int(step)
        there = f"it has steps {steps}" if steps else "it is empty"
        without = f" with the metric {self._rules.metric}" if step == "best" and steps else ""
        raise CheckpointError(
            f"There is no checkpoint {step}{without} in {self.directory}: {there}. "
            "Name one of the steps, `latest`, or `best` if an evaluation ran before a save."
        )

    def flaw(self, step: int, *, thorough: bool) -> str | None:
        """What of a step is not as it was written, as this process sees it.

        Args:
            step: Number.
            thorough: Whether every byte is read.
        """
        try:
            return (stored.full_flaw if thorough else step_folder.flaw)(self.folder(step))
        except PermissionError as error:
            raise CheckpointError(
                f"Checkpoint {step} in {self.directory} cannot be read: {error}. Give this user "
                "the right to read it."
            ) from error

    def check_is_damage(self, step: int, error: Exception) -> None:
        """Raises where a step failed to load and its bytes are not to blame."""
        causes = list(chain(error))
        where = f"Checkpoint {step} in {self.directory} could not be read: {root_cause(error)}."
        if any(isinstance(e, MemoryError) or "out of memory" in str(e).lower() for e in causes):
            raise ResourceError(
                f"{where} The memory is too small for this state. The checkpoint stays as it is; "
                "use more devices or more memory."
            ) from error
        has_manifest = (self.folder(step) / manifest.MANIFEST_FILE).exists()
        sound = has_manifest and self.flaw(step, thorough=True) is None
        if sound or any(isinstance(e, PermissionError) for e in causes):
            raise CheckpointError(
                f"{where} Its files are as they were written, so it stays where it is. Mend the "
                "cause and start again, or name another step."
            ) from error

    def damaged(self, step: int, cause: str) -> DamagedError:
        """The error of a step that does not read back."""
        others = [other for other in self.steps if other != step]
        return DamagedError(
            f"Checkpoint {step} in {self.directory} is damaged: {cause}. Only what reads back bit "
            f"for bit is loaded. Move {self.folder(step)} away and use another step "
            f"(there are {others}).",
            cause,
        )

    def none_usable(self, found: list[int]) -> CheckpointError:
        """The error of a directory in which all is damaged."""
        return CheckpointError(
            f"None of the checkpoints {found} in {self.directory} is usable: each needs an intact "
            "record of its leaves and bytes that agree with it, and theirs are missing or damaged. "
            f"Steps that were moved lie in {self.directory.parent / quarantine.QUARANTINE} with "
            "the reason. Restore the directory from a copy, or move it away to start afresh."
        )

    def distrusted(self, step: int, cause: str | None, *, moves: bool) -> str:
        """Warns of a step that is passed over; returns the reason to leave with it."""
        cause = cause or "another process could not read it"
        reason = f"Checkpoint {step} in {self.directory} is not used: {cause}."
        away = self.directory.parent / quarantine.QUARANTINE
        logging.warning("%s %s", reason, f"It goes to {away}." if moves else "It stays there.")
        return reason

    def _newest_sound(self, steps: list[int]) -> int:
        for step in reversed(steps):
            cause = self.flaw(step, thorough=jax.process_index() == 0)
            if quarantine.all_agree(cause is None):
                return step
            self.distrusted(step, cause, moves=False)
        raise self.none_usable(steps)

    def _metrics(self) -> dict[int, dict[str, float]]:
        """Metrics of the steps that the keep rules may delete."""
        records = {step: self.record(step) for step in self.steps}
        return {step: self.metrics(step) for step, r in records.items() if r and is_known(r)}
