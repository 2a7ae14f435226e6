"""Checkpoints that are whole and checked, or not there.

Orbax writes and reads the arrays, each process its own shards, on any mesh. What it leaves open is
answered here: a save that failed in the background raises at the next call; the last save is
waited for on every way out; a restore never casts, pads or mixes models, because the record stored
with each step names every leaf, its shape, dtype and digest (`moe.training.digest`); a step that
does not read back as it was written is put into quarantine and the one before it is taken.

Layout: `<directory>/<step>/{state, data, meta, manifest.json}`; `data` and `meta` are JSON, the
record is the custom metadata of the step, `scores.json` has metrics that came after a save.
"""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from moe.errors import CheckpointError, ConfigError, UserError
from moe.training import manifest, quarantine
from moe.training.catalogue import Catalogue, DamagedError
from moe.training.digest import digest, leaf_names
from moe.training.finishing import Finisher
from moe.training.keeping import KeepRules
from moe.training.record import (
    added_entries,
    as_read_back,
    first_difference,
    is_as_saved,
    make_record,
)
from moe.training.save_failure import root_cause, save_error
from moe.training.store import Store, bytes_of


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
        rules = KeepRules(keep_latest, keep_best, best_metric, best_mode)
        rules.check()
        self.directory = Path(directory).absolute()
        self._every = every
        self._read_only = read_only
        writes = not read_only and jax.process_index() == 0
        self._pending: tuple[int, dict, int] | None = None  # step, record, bytes
        if read_only and not self.directory.is_dir():
            raise CheckpointError(
                f"There are no checkpoints at {self.directory}: the directory does not exist. "
                "Train first, or give the workdir of a run that has saved."
            )
        self._finisher = Finisher(self.directory, works=writes)
        self._finisher.clean()
        self._store = Store(self.directory, read_only=read_only)
        self._catalogue = Catalogue(self.directory, rules, writes=writes, follows=read_only)

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
        self._finisher.join()
        if self._read_only:
            raise CheckpointError(f"{self.directory} was opened to read; nothing is saved there.")
        if step in self._catalogue.steps and self._catalogue.record(step) is not None:
            return False
        data_state, meta = as_read_back(data_state), as_read_back(meta)
        record = make_record(state, data_state, meta, metrics or {})
        needed = bytes_of(state)
        try:
            self._store.start(step, state, data_state, meta, record)
        except Exception as error:
            raise self._not_saved(step, error, needed) from error
        self._pending = step, record, needed
        return True

    def poll(self) -> None:
        """Raises what `wait` raises if the save in the background has failed; never blocks."""
        if self._pending is not None and not self._store.is_writing():
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
            self._store.wait(step)
        except Exception as error:
            raise self._not_saved(step, error, needed) from error
        self._finisher.start(step, self._catalogue.add(step, record))

    def close(self) -> None:
        """Waits for the save in the background and ends all threads."""
        try:
            self.wait()
        finally:
            self._finisher.join()
            self._store.close()

    def rate(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Adds the evaluation of a checkpoint that was saved before it was evaluated.

        Raises:
            CheckpointError: If there is no such checkpoint.
        """
        self.wait()
        if self._read_only:
            raise CheckpointError(f"{self.directory} was opened to read; nothing is rated there.")
        self._catalogue.rate(self._catalogue.resolve(step), metrics)

    def retire_after(self, step: int) -> None:
        """Moves all newer steps to `<workdir>/superseded/`: what follows will be trained again.

        Raises:
            CheckpointError: If one cannot be moved.
        """
        self.wait()
        newer = [other for other in self._catalogue.steps if other > step]
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
        return self._catalogue.usable()

    def latest_step(self) -> int | None:
        """Newest step, or None if there is no checkpoint."""
        return max(self.all_steps(), default=None)

    def best_step(self) -> int | None:
        """Step with the best `best_metric`, the newer of two equals; None if no step has it."""
        return next(iter(self._catalogue.ranked(self.all_steps())), None)

    def resolve(self, step: int | str) -> int:
        """The number of a step given by number, as `latest` or as `best`.

        With `read_only`, `latest` is the newest step whose files are as they were written; those
        that are not are named in a warning each.

        Raises:
            CheckpointError: If there is no such checkpoint; the message lists those there are.
        """
        self.wait()
        return self._catalogue.resolve(step)

    def load_meta(self, step: int | str) -> dict:
        """The `meta` of a checkpoint without its arrays. Raises CheckpointError as `restore`."""
        step = self.resolve(step)
        return self._load(step)["meta"]

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
        self._finisher.join()
        found = list(self._catalogue.steps)
        for step in reversed(found):
            restored, cause = self._try(step, abstract_state, fresh)
            if quarantine.all_agree(cause is None):
                if not (self.directory / str(step) / manifest.MANIFEST_FILE).exists():
                    self._finisher.start(step, ())
                return restored
            reason = self._catalogue.distrusted(step, cause, moves=not self._read_only)
            if not self._read_only:
                self._put_aside([step], quarantine.QUARANTINE, reason)
        if not found:
            return None
        raise self._catalogue.none_usable(found)

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
        record = self._catalogue.known_record(step)
        added = added_entries(record, abstract_state, fresh or {})
        asked = {name: entry for name, entry in abstract_state.items() if name not in added}
        self._check_fit(step, record["leaves"], asked, partial=partial)
        loaded = self._load(step, asked, partial=partial)
        for name, value in digest(loaded["state"]).items():
            if value != record["leaves"][name]["digest"]:
                raise self._catalogue.damaged(
                    step, f"the digest of {name} is not the one that was saved"
                )
        return Restored(step, {**loaded["state"], **added}, loaded["data"], loaded["meta"])

    def _try(
        self, step: int, abstract_state: Mapping[str, PyTree], fresh: Mapping[str, PyTree]
    ) -> tuple[Restored | None, str | None]:
        """The step restored, or why it is not trusted."""
        # One process reads every byte before any goes to Orbax: a process that fails inside a
        # restore leaves the others at its barrier, and reads in flight to a closed event loop.
        thorough = jax.process_index() == 0
        cause = self._catalogue.flaw(step, thorough=thorough)
        if not quarantine.all_agree(cause is None):
            return None, cause or "another process could not read it"
        try:
            return self.restore(step, abstract_state, fresh=fresh), None
        except DamagedError as error:
            return None, error.cause

    def _put_aside(self, steps: list[int], kind: str, reason: str) -> None:
        self._finisher.join()
        quarantine.put_aside(self.directory, steps, kind, reason)
        self._catalogue.forget(steps)

    def _load(
        self, step: int, abstract_state: PyTree | None = None, *, partial: bool = False
    ) -> dict[str, Any]:
        try:
            loaded = self._store.load(step, abstract_state, partial=partial)
        except Exception as error:
            self._catalogue.check_is_damage(step, error)
            raise self._catalogue.damaged(step, root_cause(error)) from error
        record = self._catalogue.known_record(step)
        for name in ("data", "meta"):
            if name in loaded and not is_as_saved(loaded[name], record[name]):
                cause = f"the contents of {name} are not those that were saved"
                raise self._catalogue.damaged(step, cause)
        return loaded

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

    def _not_saved(self, step: int, error: Exception, needed: int) -> UserError:
        earlier = self._catalogue.steps
        failure = save_error(self.directory, step, error, needed=needed, earlier=earlier)
        try:
            self._finisher.clean()  # the bytes of a save that failed are in the way of the next
        except CheckpointError as leftover:
            failure.add_note(str(leftover))
        return failure
