"""Checkpoints that are whole and checked, or not there.

Orbax writes and reads the arrays, each process its own shards, on any mesh. What it leaves open is
answered here: a save that failed in the background raises at the next call; the last save is
waited for on every way out; a restore never casts, pads or mixes models, because the record stored
with each step names every leaf, its shape, dtype and digest (`moe.training.digest`); a step that
does not read back as it was written is put into quarantine and the one before it is taken.

Layout: `<directory>/<step>/{state, data, meta, manifest.json}`; `data` and `meta` are JSON, the
record is the custom metadata of the step, `scores.json` has metrics that came after a save.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
import threading
from types import TracebackType
from typing import Any, NamedTuple

from absl import logging
import jax
from jaxtyping import PyTree
import orbax.checkpoint as ocp

from moe.errors import CheckpointError, ConfigError, ResourceError, UserError
from moe.training import manifest, quarantine, step_folder
from moe.training.digest import digest, leaf_names
from moe.training.keeping import KeepRules, Scores
from moe.training.record import (
    NEW_SINCE,
    as_read_back,
    describe,
    first_difference,
    is_known,
    make_record,
    sha256,
)
from moe.training.save_failure import chain, root_cause, save_error

_SAVE_TIMEOUT_SECONDS = 600


class Restored(NamedTuple):
    """What a checkpoint holds."""

    step: int
    state: PyTree  # as `abstract_state`, on its shardings
    data_state: dict  # position of the data iterator
    meta: dict  # config, tokenizer, versions


class DamagedError(CheckpointError):
    """A checkpoint that does not read back as it was written."""

    def __init__(self, message: str, cause: str):
        super().__init__(message)
        self.cause = cause


class Checkpointer:
    """Saves, keeps and restores the checkpoints of one run.

    Use it as a context manager: leaving the block waits for the save that is still being written.
    In a run of several processes every process makes the same calls.

    Args:
        directory: `<workdir>/checkpoints`, one directory a step in it. Created if missing, unless
            `read_only`. Steps that are put aside go to folders of the workdir.
        every: Steps between two saves; `due` answers by it.
        keep_latest: Newest steps that stay on disk, at least 1.
        keep_best: Steps that stay for their `best_metric`. Steps without it never count.
        best_metric: A key of the `metrics` handed to `save` or `rate`.
        best_mode: `min` or `max`.
        read_only: Look at the checkpoints of a run that may still be going: nothing is created,
            cleaned, moved or deleted.

    Raises:
        ConfigError: If an argument cannot work.
        CheckpointError: If `read_only` and there is no such directory, or if the leftovers of a
            killed save cannot be removed.
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
        if every < 1:
            raise ConfigError(f"checkpoint.every={every} must be at least 1.")
        self._rules = KeepRules(keep_latest, keep_best, best_metric, best_mode)
        self._rules.check()
        self.directory = Path(directory).absolute()
        self._every = every
        self._read_only = read_only
        self._writes = not read_only and jax.process_index() == 0
        self._pending: tuple[int, dict, int] | None = None  # step, record, bytes
        self._finisher: threading.Thread | None = None
        self._records: dict[int, dict | None] = {}
        if read_only and not self.directory.is_dir():
            raise CheckpointError(
                f"There are no checkpoints at {self.directory}: the directory does not exist. "
                "Train first, or give the workdir of a run that has saved."
            )
        if self._writes:
            _clean(self.directory)
        self._manager = _open_manager(self.directory, read_only=read_only)
        self._steps = step_folder.steps_in(self.directory)
        self._scores = Scores(self.directory, writes=self._writes)

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
        except UserError as failure:
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
            ResourceError: If the disk refused one of the two.
            DivergedError: If a value of `state` is not finite; nothing is written then.
            TypeError: If a leaf is not a `jax.Array`.
        """
        self.wait()
        self._join()
        if self._read_only:
            raise CheckpointError(f"{self.directory} was opened to read; nothing is saved there.")
        if step in self._steps and self._record(step) is not None:
            return False
        data_state, meta = as_read_back(data_state), as_read_back(meta)
        record = make_record(state, data_state, meta, metrics or {})
        needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        self._manager.reload()
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state),
                    data=ocp.args.JsonSave(data_state),
                    meta=ocp.args.JsonSave(meta),
                ),
                custom_metadata=record,
                force=True,  # `due` decides; Orbax's own interval skips steps after a rollback
            )
        except Exception as error:
            raise self._not_saved(step, error, needed) from error
        self._pending = step, record, needed
        return True

    def poll(self) -> None:
        """Raises what `wait` raises if the save in the background has failed; never blocks."""
        if self._pending is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Blocks until the save in the background is on disk.

        Its manifest is written, and steps that no rule keeps are deleted, after that in a thread
        that the next save or `close` waits for.

        Raises:
            CheckpointError: If it failed.
            ResourceError: If the disk refused it.
        """
        if self._pending is None:
            return
        (step, record, needed), self._pending = self._pending, None
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._not_saved(step, error, needed) from error
        if not (self.directory / str(step)).is_dir():
            missing = OSError("the finished directory is missing")
            raise self._not_saved(step, missing, needed)
        self._records[step] = record
        self._steps = sorted({*self._steps, step})
        ours = self._metrics()
        dropped = set(ours) - self._rules.kept(ours)
        self._steps = [other for other in self._steps if other not in dropped]
        self._finish(step, dropped)

    def close(self) -> None:
        """Waits for the save in the background and ends all threads."""
        try:
            self.wait()
        finally:
            self._join()
            self._manager.close()

    def rate(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Adds the evaluation of a checkpoint that was saved before it was evaluated.

        Raises:
            CheckpointError: If there is no such checkpoint.
        """
        self.wait()
        if self._read_only:
            raise CheckpointError(f"{self.directory} was opened to read; nothing is rated there.")
        self._scores.add(self.resolve(step), metrics, self._steps)

    def retire_after(self, step: int) -> None:
        """Moves all newer steps to `<workdir>/superseded/`: what follows will be trained again.

        Raises:
            CheckpointError: If one cannot be moved.
        """
        self.wait()
        newer = [other for other in self._steps if other > step]
        reason = f"The run went back to step {step}, so that what was trained after it is no more."
        if newer:
            self._put_aside(newer, quarantine.SUPERSEDED, reason)

    def all_steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending.

        Raises:
            CheckpointError: If there are step directories and none of them is usable: training
                again from the start would bury them.
        """
        self.wait()
        steps = [step for step in self._steps if self._record(step) is not None]
        if self._steps and not steps:
            raise self._none_usable(self._steps)
        return steps

    def latest_step(self) -> int | None:
        """Newest step, or None if there is no checkpoint."""
        return max(self.all_steps(), default=None)

    def best_step(self) -> int | None:
        """Step with the best `best_metric`, the newer of two equals; None if no step has it."""
        return next(iter(self._ranked(self.all_steps())), None)

    def resolve(self, step: int | str) -> int:
        """The number of a step given by number, as `latest` or as `best`.

        With `read_only`, `latest` is the newest step whose files are as they were written; those
        that are not are named in a warning each.

        Raises:
            CheckpointError: If there is no such checkpoint; the message lists those there are.
        """
        steps = self.all_steps()
        if step == "latest" and steps:
            return self._newest_sound(steps) if self._read_only else steps[-1]
        if step == "best" and self._ranked(steps):
            return self._ranked(steps)[0]
        if step in steps:
            return int(step)
        there = f"it has steps {steps}" if steps else "it is empty"
        without = f" with the metric {self._rules.metric}" if step == "best" and steps else ""
        raise CheckpointError(
            f"There is no checkpoint {step}{without} in {self.directory}: {there}. "
            "Name one of the steps, `latest`, or `best` if an evaluation ran before a save."
        )

    def load_meta(self, step: int | str) -> dict:
        """The `meta` of a checkpoint without its arrays. Raises CheckpointError as `restore`."""
        step = self.resolve(step)
        return self._load(step, meta=ocp.args.JsonRestore())["meta"]

    def restore_newest(
        self, abstract_state: Mapping[str, PyTree], *, fresh: Mapping[str, PyTree]
    ) -> Restored | None:
        """Loads the newest checkpoint that reads back as it was written.

        Each newer one that does not is moved to `<workdir>/quarantine/<step>-<n>/` and told by one
        warning; with `read_only` it stays. A checkpoint of another model is never passed over.

        Args:
            abstract_state: As for `restore`.
            fresh: As for `restore`.

        Returns:
            None if there is no step at all.

        Raises:
            CheckpointError: If there are steps and none is good, if one is of another model, or if
                one that is damaged cannot be moved.
        """
        self.wait()
        self._join()
        found = list(self._steps)
        for step in reversed(found):
            restored, cause = self._try(step, abstract_state, fresh)
            if quarantine.all_agree(cause is None):
                if not (self.directory / str(step) / manifest.MANIFEST_FILE).exists():
                    self._finish(step, ())
                return restored
            self._distrust(step, cause or "another process could not read it")
        if not found:
            return None
        raise self._none_usable(found)

    def restore(
        self,
        step: int | str,
        abstract_state: Mapping[str, PyTree],
        *,
        partial: bool = False,
        fresh: Mapping[str, PyTree] | None = None,
    ) -> Restored:
        """Loads a checkpoint onto the shardings of `abstract_state`.

        Args:
            step: Number, `latest` or `best`.
            abstract_state: Tree of `jax.ShapeDtypeStruct`, each with a `sharding`, on any mesh.
            partial: Leave out whole entries that `abstract_state` lacks at its top level, such as the
                optimiser's state.
            fresh: Entries as in `abstract_state` with arrays for those that the format of the
                checkpoint did not have yet.

        Raises:
            CheckpointError: If there is no such step, if tree, shapes or dtypes differ, or if the
                stored bytes are not those that were saved.
        """
        step = self.resolve(step)
        record = self._known_record(step)
        added = _added(record, abstract_state, fresh or {})
        asked = {name: entry for name, entry in abstract_state.items() if name not in added}
        self._check_fit(step, record["leaves"], asked, partial=partial)
        loaded = self._load(
            step,
            state=ocp.args.PyTreeRestore(
                item=asked,
                restore_args=ocp.checkpoint_utils.construct_restore_args(asked),
                partial_restore=partial,
            ),
            data=ocp.args.JsonRestore(),
            meta=ocp.args.JsonRestore(),
        )
        for name, value in digest(loaded["state"]).items():
            if value != record["leaves"][name]["digest"]:
                raise self._damaged(step, f"the digest of {name} is not the one that was saved")
        return Restored(step, {**loaded["state"], **added}, loaded["data"], loaded["meta"])

    def _try(
        self, step: int, abstract_state: Mapping[str, PyTree], fresh: Mapping[str, PyTree]
    ) -> tuple[Restored | None, str | None]:
        """The step restored, or why it is not trusted."""
        # A process that fails inside Orbax's restore leaves the others at its barrier, so with
        # several of them one reads every byte before any of them goes there.
        thorough = jax.process_count() > 1 and jax.process_index() == 0
        cause = self._flaw(step, thorough=thorough)
        if not quarantine.all_agree(cause is None):
            return None, cause or "another process could not read it"
        try:
            return self.restore(step, abstract_state, fresh=fresh), None
        except DamagedError as error:
            return None, error.cause

    def _distrust(self, step: int, cause: str) -> None:
        """Quarantine, or only a warning where nothing may be moved."""
        reason = f"Checkpoint {step} in {self.directory} is not used: {cause}."
        quarantine.warn(self.directory, step, reason, moved=not self._read_only)
        if not self._read_only:
            self._put_aside([step], quarantine.QUARANTINE, reason)

    def _put_aside(self, steps: Iterable[int], kind: str, reason: str) -> None:
        self._join()
        steps = list(steps)
        quarantine.put_aside(self.directory, steps, kind, reason)
        self._steps = [step for step in self._steps if step not in steps]
        for step in steps:
            self._records.pop(step, None)
        if any(self._scores.of(step) for step in steps):
            self._scores.forget(steps)
        self._manager.reload()

    def _newest_sound(self, steps: list[int]) -> int:
        for step in reversed(steps):
            cause = self._flaw(step, thorough=jax.process_index() == 0)
            if quarantine.all_agree(cause is None):
                return step
            self._distrust(step, cause or "another process could not read it")
        raise self._none_usable(steps)

    def _flaw(self, step: int, *, thorough: bool) -> str | None:
        try:
            return step_folder.flaw(self.directory / str(step), thorough=thorough)
        except PermissionError as error:
            raise CheckpointError(
                f"Checkpoint {step} in {self.directory} cannot be read: {error}. Give this user "
                "the right to read it."
            ) from error

    def _load(self, step: int, **items: ocp.args.CheckpointArgs) -> dict[str, Any]:
        try:
            loaded = dict(self._manager.restore(step, args=ocp.args.Composite(**items)).items())
        except Exception as error:
            self._check_is_damage(step, error)
            raise self._damaged(step, root_cause(error)) from error
        record = self._known_record(step)
        for name in ("data", "meta"):
            if name in loaded and sha256(loaded[name]) != record[name]:
                raise self._damaged(step, f"the contents of {name} are not those that were saved")
        return loaded

    def _check_is_damage(self, step: int, error: Exception) -> None:
        """Raises where a step failed to load and its bytes are not to blame."""
        causes = list(chain(error))
        where = f"Checkpoint {step} in {self.directory} could not be read: {root_cause(error)}."
        if any(isinstance(e, MemoryError) or "out of memory" in str(e).lower() for e in causes):
            raise ResourceError(
                f"{where} The memory is too small for this state. The checkpoint stays as it is; "
                "use more devices or more memory."
            ) from error
        folder = self.directory / str(step)
        has_manifest = (folder / manifest.MANIFEST_FILE).exists()
        sound = has_manifest and self._flaw(step, thorough=True) is None
        if sound or any(isinstance(e, PermissionError) for e in causes):
            raise CheckpointError(
                f"{where} Its files are as they were written, so it stays where it is. Mend the "
                "cause and start again, or name another step."
            ) from error

    def _record(self, step: int) -> dict | None:
        """The record of a step, None if it is missing or its own checksum is wrong."""
        if step not in self._records:
            self._records[step] = step_folder.read_record(self.directory / str(step))
            if self._records[step] is None:
                logging.warning(
                    "Left out %s: not a whole checkpoint of this program.",
                    self.directory / str(step),
                )
        return self._records[step]

    def _known_record(self, step: int) -> dict:
        record = self._record(step)
        if record is None:
            raise self._damaged(step, "it has no intact record of its leaves")
        if not is_known(record):
            raise CheckpointError(
                f"Checkpoint {step} in {self.directory} has format {record['format']}, and this "
                f"program reads {list(NEW_SINCE)}. Use the version that wrote it, or a newer one."
            )
        return record

    def _metrics(self) -> dict[int, dict[str, float]]:
        """Metrics of the steps that the keep rules may delete: what is not ours is never deleted."""
        records = {step: self._record(step) for step in self._steps}
        return {
            step: {**record["metrics"], **self._scores.of(step)}
            for step, record in records.items()
            if record is not None and is_known(record)
        }

    def _ranked(self, steps: list[int]) -> list[int]:
        metrics = self._metrics()
        return self._rules.ranked({step: metrics[step] for step in steps if step in metrics})

    def _finish(self, step: int, dropped: Iterable[int]) -> None:
        if self._writes:
            self._join()
            arguments = (self.directory, step, sorted(dropped))
            self._finisher = threading.Thread(target=_finish, args=arguments, name="finish save")
            self._finisher.start()

    def _join(self) -> None:
        if self._finisher is not None:
            self._finisher.join()
            self._finisher = None

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

    def _damaged(self, step: int, cause: str) -> DamagedError:
        others = [other for other in self._steps if other != step]
        return DamagedError(
            f"Checkpoint {step} in {self.directory} is damaged: {cause}. Only what reads back bit "
            f"for bit is loaded. Move {self.directory / str(step)} away and use another step "
            f"(there are {others}).",
            cause,
        )

    def _none_usable(self, found: list[int]) -> CheckpointError:
        return CheckpointError(
            f"None of the checkpoints {found} in {self.directory} is usable: each needs an intact "
            "record of its leaves and bytes that agree with it, and theirs are missing or damaged. "
            f"Steps that were moved lie in {self.directory.parent / quarantine.QUARANTINE} with "
            "the reason. Restore the directory from a copy, or move it away to start afresh."
        )

    def _not_saved(self, step: int, error: Exception, needed: int) -> UserError:
        if self._writes:
            _clean(self.directory)  # the bytes of a save that failed are in the way of the next
        self._manager.reload()
        return save_error(self.directory, step, error, needed=needed, earlier=self._steps)


def _open_manager(directory: Path, *, read_only: bool) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        directory,
        options=ocp.CheckpointManagerOptions(
            create=not read_only,
            # Orbax deletes what only looks like a leftover, and a step that is being deleted when
            # the process is killed stays behind in part; both are done here.
            cleanup_tmp_directories=False,
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


def _clean(directory: Path) -> None:
    try:
        if directory.is_dir():
            step_folder.clean(directory)
    except OSError as error:
        raise CheckpointError(
            f"What a save that did not finish has left in {directory} cannot be removed: {error}. "
            "Make it writable, or remove it by hand."
        ) from error


def _finish(directory: Path, step: int, dropped: list[int]) -> None:
    """Writes the manifest of a step and deletes steps that no rule keeps."""
    try:
        manifest.write(directory / str(step))
    except OSError as error:
        logging.warning(
            "Checkpoint %d is whole, and its manifest was not written: %s. It is verified by the "
            "digests of its leaves alone.",
            step,
            error,
        )
    for old in dropped:
        try:
            step_folder.remove(directory / str(old))
        except OSError as error:
            logging.warning("Checkpoint %d is not kept, and could not be deleted: %s", old, error)


def _added(
    record: dict, abstract_state: Mapping[str, PyTree], fresh: Mapping[str, PyTree]
) -> dict[str, PyTree]:
    """Entries that the format of a record lacks, from `fresh`, on the shardings asked for."""
    stored = {name.split("/")[0] for name in record["leaves"]}
    names = [
        name
        for name in NEW_SINCE[record["format"]]
        if name in abstract_state and name in fresh and name not in stored
    ]
    for name in names:
        if describe(fresh[name]) != describe(abstract_state[name]):
            raise TypeError(f"fresh: {name} has not the leaves of abstract_state.")
    return {
        name: jax.tree.map(
            lambda leaf, like: jax.device_put(leaf, like.sharding),
            fresh[name],
            abstract_state[name],
        )
        for name in names
    }
