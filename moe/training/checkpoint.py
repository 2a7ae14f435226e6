"""Checkpoints that are whole and checked, or not there.

Orbax writes and reads the arrays, each process its own shards, on any mesh. What it leaves open is
answered here: a save that failed in the background raises at the next call; the last save is
waited for on every way out; a restore never casts, pads or mixes models, because the record stored
with each step names every leaf, its shape, dtype and digest (`moe.training.digest`).

Layout: `<directory>/<step>/{state, data, meta}`; `data` and `meta` are JSON, the record is the
custom metadata of the step.
"""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from absl import logging
import jax
from jaxtyping import PyTree
import orbax.checkpoint as ocp

from moe.errors import CheckpointError, ConfigError
from moe.training.digest import digest, leaf_names
from moe.training.record import as_read_back, first_difference, is_intact, make_record, sha256

_SAVE_TIMEOUT_SECONDS = 600


class Restored(NamedTuple):
    """What a checkpoint holds."""

    step: int
    state: PyTree  # as `abstract_state`, on its shardings
    data_state: dict  # position of the data iterator
    meta: dict  # config, tokenizer, versions


class Checkpointer:
    """Saves, keeps and restores the checkpoints of one run.

    Use it as a context manager: leaving the block waits for the save that is still being written.
    In a run of several processes every process makes the same calls.

    Args:
        directory: Holds one directory a step. Created if missing, unless `read_only`.
        every: Steps between two saves; `due` answers by it.
        keep_latest: Newest steps that stay on disk, at least 1.
        keep_best: Steps that stay for their `best_metric`. Steps saved without it never count.
        best_metric: A key of the `metrics` handed to `save`.
        best_mode: `min` or `max`.
        read_only: Look at the checkpoints of a run that may still be going: nothing is created,
            cleaned or deleted.

    Raises:
        ConfigError: If an argument cannot work.
        CheckpointError: If `read_only` and there is no such directory.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        every: int = 1000,
        keep_latest: int = 2,
        keep_best: int = 1,
        best_metric: str = "bits_per_byte",
        best_mode: str = "min",
        read_only: bool = False,
    ):
        _check_arguments(every, keep_latest, keep_best, best_mode)
        self.directory = Path(directory).absolute()
        self._every = every
        self._keep_latest = keep_latest
        self._keep_best = keep_best
        self._best_metric = best_metric
        self._sign = 1.0 if best_mode == "min" else -1.0
        self._read_only = read_only
        self._pending: int | None = None
        self._records: dict[int, dict | None] = {}
        if read_only and not self.directory.is_dir():
            raise CheckpointError(
                f"There are no checkpoints at {self.directory}: the directory does not exist. "
                "Train first, or give the workdir of a run that has saved."
            )
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                create=not read_only,
                cleanup_tmp_directories=not read_only,
                preservation_policy=_KeepPolicy(self),
                async_options=ocp.AsyncOptions(
                    timeout_secs=_SAVE_TIMEOUT_SECONDS,
                    # Creating them in the background can hang the interpreter's exit when a
                    # save raises.
                    create_directories_asynchronously=False,
                ),
            ),
            item_names=("state", "data", "meta"),
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True),
                "data": ocp.JsonCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except CheckpointError as failure:
            if not isinstance(error, Exception):
                raise
            # The error that ended the block is the one to show first.
            error.add_note(str(failure))

    def due(self, step: int) -> bool:
        """Whether `every` asks for a save after `step` optimiser steps."""
        return step > 0 and step % self._every == 0

    def save(
        self,
        step: int,
        state: PyTree,
        data_state: dict,
        meta: dict,
        metrics: Mapping[str, Any] | None = None,
    ) -> bool:
        """Starts writing a checkpoint and returns once the arrays are copied from the devices.

        Args:
            step: Optimiser steps done.
            state: Tree of `jax.Array`, typed keys included. It may be donated after the call.
            data_state: JSON; the same on every process, written once.
            meta: JSON.
            metrics: Evaluation of this very state, for `keep_best`. Only finite numbers count.

        Returns:
            False if a checkpoint of this step is there already.

        Raises:
            CheckpointError: If this save cannot start or the one before it failed.
            TypeError: If a leaf is not a `jax.Array`.
        """
        self.wait()
        if self._read_only:
            raise CheckpointError(f"{self.directory} was opened to read; nothing is saved there.")
        if step in self._manager.all_steps() and self._record(step) is not None:
            return False
        data_state, meta = as_read_back(data_state), as_read_back(meta)
        self._records[step] = make_record(state, data_state, meta, metrics or {})
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state),
                    data=ocp.args.JsonSave(data_state),
                    meta=ocp.args.JsonSave(meta),
                ),
                custom_metadata=self._records[step],
                force=True,  # `due` decides; Orbax's own interval skips steps after a rollback
            )
        except Exception as error:
            raise self._save_error(step, error) from error
        self._pending = step
        return True

    def poll(self) -> None:
        """Raises CheckpointError if the save in the background has failed; never blocks."""
        if self._pending is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Blocks until the save in the background is on disk.

        Raises:
            CheckpointError: If it failed.
        """
        if self._pending is None:
            return
        step, self._pending = self._pending, None
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._save_error(step, error) from error
        if not (self.directory / str(step)).is_dir():
            raise self._save_error(step, OSError("the finished directory is missing"))

    def close(self) -> None:
        """Waits for the save in the background and ends Orbax's threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def all_steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending.

        Raises:
            CheckpointError: If there are step directories and none of them is usable: training
                again from the start would bury them.
        """
        self.wait()
        found = sorted(self._manager.all_steps())
        steps = [step for step in found if self._record(step) is not None]
        if found and not steps:
            raise CheckpointError(
                f"None of the checkpoints {found} in {self.directory} is usable: each needs an "
                "intact record of its leaves, and theirs are missing or damaged. Restore the "
                "directory from a copy, or move it away to start afresh."
            )
        return steps

    def latest_step(self) -> int | None:
        """Newest step, or None if there is no checkpoint."""
        return max(self.all_steps(), default=None)

    def best_step(self) -> int | None:
        """Step with the best `best_metric`, the newer of two equals; None if no step has it."""
        scored = self._by_score(self.all_steps())
        return scored[0] if scored else None

    def resolve(self, step: int | str) -> int:
        """The number of a step given by number, as `latest` or as `best`.

        Raises:
            CheckpointError: If there is no such checkpoint; the message lists those there are.
        """
        steps = self.all_steps()
        if step == "latest" and steps:
            return steps[-1]
        if step == "best" and self._by_score(steps):
            return self._by_score(steps)[0]
        if step in steps:
            return int(step)
        there = f"it has steps {steps}" if steps else "it is empty"
        without = f" with the metric {self._best_metric}" if step == "best" and steps else ""
        raise CheckpointError(
            f"There is no checkpoint {step}{without} in {self.directory}: {there}. "
            "Name one of the steps, `latest`, or `best` if an evaluation ran before a save."
        )

    def load_meta(self, step: int | str) -> dict:
        """The `meta` of a checkpoint without its arrays. Raises CheckpointError as `restore`."""
        step = self.resolve(step)
        return self._load(step, meta=ocp.args.JsonRestore())["meta"]

    def restore(
        self, step: int | str, abstract_state: PyTree, *, partial: bool = False
    ) -> Restored:
        """Loads a checkpoint onto the shardings of `abstract_state`.

        Args:
            step: Number, `latest` or `best`.
            abstract_state: Tree of `jax.ShapeDtypeStruct`, each with a `sharding`, on any mesh.
            partial: Leave out whole entries that `abstract_state` lacks at its top level, such as the
                optimiser's state.

        Raises:
            CheckpointError: If there is no such step, if tree, shapes or dtypes differ, or if the
                stored bytes are not those that were saved.
        """
        step = self.resolve(step)
        leaves = (self._record(step) or {})["leaves"]
        self._check_fit(step, leaves, abstract_state, partial=partial)
        loaded = self._load(
            step,
            state=ocp.args.PyTreeRestore(
                item=abstract_state,
                restore_args=ocp.checkpoint_utils.construct_restore_args(abstract_state),
                partial_restore=partial,
            ),
            data=ocp.args.JsonRestore(),
            meta=ocp.args.JsonRestore(),
        )
        for name, value in digest(loaded["state"]).items():
            if value != leaves[name]["digest"]:
                raise self._damaged(step, f"the digest of {name} is not the one that was saved")
        return Restored(step, loaded["state"], loaded["data"], loaded["meta"])

    def _load(self, step: int, **items: ocp.args.CheckpointArgs) -> dict[str, Any]:
        try:
            loaded = dict(self._manager.restore(step, args=ocp.args.Composite(**items)).items())
        except Exception as error:
            raise self._damaged(step, _root_cause(error)) from error
        record = self._record(step) or {}
        for name in ("data", "meta"):
            if name in loaded and sha256(loaded[name]) != record[name]:
                raise self._damaged(step, f"the contents of {name} are not those that were saved")
        return loaded

    def _record(self, step: int) -> dict | None:
        """The record of a step, None if it is missing or its own checksum is wrong."""
        if step not in self._records:
            record = dict(self._manager.metadata(step).custom_metadata or {})
            intact = is_intact(record)
            if not intact:
                logging.warning(
                    "Left out %s: not a whole checkpoint of this program.",
                    self.directory / str(step),
                )
            self._records[step] = record if intact else None
        return self._records[step]

    def _by_score(self, steps: list[int]) -> list[int]:
        """Steps that have `best_metric`, best first, the newer of two equals first."""
        scores = {}
        for step in steps:
            record = self._record(step)
            if record is not None and self._best_metric in record["metrics"]:
                scores[step] = self._sign * record["metrics"][self._best_metric]
        return sorted(scores, key=lambda step: (scores[step], -step))

    def kept(self, steps: list[int]) -> set[int]:
        """Which of `steps` the keep rules hold on to. What is not ours is never deleted."""
        ours = sorted(step for step in steps if self._record(step) is not None)
        foreign = set(steps) - set(ours)
        best = self._by_score(ours)[: self._keep_best]
        return foreign | set(ours[-self._keep_latest :]) | set(best)

    def _check_fit(self, step: int, leaves: dict, abstract_state: PyTree, *, partial: bool) -> None:
        difference = first_difference(leaves, abstract_state, partial=partial)
        if difference is not None:
            raise CheckpointError(
                f"Checkpoint {step} in {self.directory} is of another model: {difference}. A "
                "checkpoint loads only into the same leaves, shapes and dtypes. Use the config "
                "that wrote it (config.json in the workdir), or another workdir."
            )
        for name, leaf in zip(
            leaf_names(abstract_state), jax.tree.leaves(abstract_state), strict=True
        ):
            if leaf.sharding is None:
                raise TypeError(f"abstract_state: {name} has no sharding.")

    def _damaged(self, step: int, cause: str) -> CheckpointError:
        others = [other for other in self._manager.all_steps() if other != step]
        return CheckpointError(
            f"Checkpoint {step} in {self.directory} is damaged: {cause}. Only what reads back bit "
            f"for bit is loaded. Move {self.directory / str(step)} away and use another step "
            f"(there are {sorted(others)})."
        )

    def _save_error(self, step: int, error: Exception) -> CheckpointError:
        self._records.pop(step, None)
        self._manager.reload()
        steps = sorted(self._manager.all_steps())
        return CheckpointError(
            f"Checkpoint {step} was not saved in {self.directory}: {_root_cause(error)}. Earlier "
            f"steps {steps} are as they were. Check space and permissions there, then run the "
            "same command again to continue from the newest."
        )


class _KeepPolicy:
    """The keep rules in the shape Orbax asks for: one bool for each checkpoint."""

    def __init__(self, checkpointer: Checkpointer):
        self._checkpointer = checkpointer

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        del context
        kept = self._checkpointer.kept([info.step for info in checkpoints])
        return [info.step in kept for info in checkpoints]


def _check_arguments(every: int, keep_latest: int, keep_best: int, best_mode: str) -> None:
    for name, value, least in (
        ("every", every, 1),
        ("keep_latest", keep_latest, 1),
        ("keep_best", keep_best, 0),
    ):
        if value < least:
            raise ConfigError(f"checkpoint.{name}={value} must be at least {least}.")
    if best_mode not in ("min", "max"):
        raise ConfigError(f"checkpoint.best_mode={best_mode!r} must be 'min' or 'max'.")


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}".rstrip(": .")
