"""Orbax behind the few calls that a run makes of it: start a save, wait for it, load a step."""

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
import threading
import time
from typing import Any

import jax
from jaxtyping import PyTree
import orbax.checkpoint as ocp

_SAVE_TIMEOUT_SECONDS = 600
_LEFT_BEHIND_SECONDS = 60.0  # given to what a failed save left running
ITEMS = ("state", "data", "meta")


class Store:
    """One directory of steps, written and read by all processes together.

    Args:
        directory: Created if missing, unless `read_only`.
        read_only: Nothing is created.
    """

    def __init__(self, directory: Path, *, read_only: bool):
        self._directory = directory
        self._read_only = read_only
        self._threads_before: set[threading.Thread] = set()
        self._manager: ocp.CheckpointManager | None = self._open()

    def start(self, step: int, state: PyTree, data: dict, meta: dict, record: dict) -> None:
        """Starts a save; returns when the arrays are copied from the devices."""
        manager = self._opened()
        self._threads_before = set(threading.enumerate())
        try:
            manager.reload()
            manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state),
                    data=ocp.args.JsonSave(data),
                    meta=ocp.args.JsonSave(meta),
                ),
                custom_metadata=record,
                force=True,  # Orbax's own interval skips steps after a rollback
            )
        except Exception:
            self._abandon()
            raise

    def is_writing(self) -> bool:
        """Whether a save goes on in the background."""
        return self._manager is not None and self._manager.is_saving_in_progress()

    def wait(self, step: int) -> None:
        """Blocks until the save of `step` is on disk; raises what stopped it."""
        try:
            self._opened().wait_until_finished()
        except Exception:
            self._abandon()
            raise
        if not (self._directory / str(step)).is_dir():
            raise OSError("the finished directory is missing")

    def load(
        self, step: int, abstract_state: PyTree | None = None, *, partial: bool = False
    ) -> dict[str, Any]:
        """`meta`, and with an `abstract_state` also `data` and `state` on its shardings.

        Args:
            step: Number.
            abstract_state: Tree of `jax.ShapeDtypeStruct` with shardings.
            partial: Whether the step may hold more.
        """
        items: dict[str, ocp.args.CheckpointArgs] = {"meta": ocp.args.JsonRestore()}
        if abstract_state is not None:
            items["data"] = ocp.args.JsonRestore()
            items["state"] = ocp.args.PyTreeRestore(
                item=abstract_state,
                restore_args=ocp.checkpoint_utils.construct_restore_args(abstract_state),
                partial_restore=partial,
            )
        return dict(self._opened().restore(step, args=ocp.args.Composite(**items)).items())

    def close(self) -> None:
        """Ends Orbax's threads."""
        if self._manager is not None:
            self._manager.close()

    def _opened(self) -> ocp.CheckpointManager:
        if self._manager is None:
            self._manager = self._open()
        return self._manager

    def _open(self) -> ocp.CheckpointManager:
        mark = type(ocp.PLACEHOLDER)  # of what a partial restore leaves out
        registry = ocp.type_handlers.create_type_handler_registry(
            (jax.Array, _Arrays()), (mark, ocp.type_handlers.get_type_handler(mark))
        )
        return ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                create=not self._read_only,
                # Orbax takes for a leftover what only has such a name, and a step that is being
                # deleted when the process is killed stays in part; the caller does both.
                cleanup_tmp_directories=False,
                step_name_format=_OnlyNames(),
                async_options=ocp.AsyncOptions(
                    timeout_secs=_SAVE_TIMEOUT_SECONDS,
                    # Creating them in the background can hang the interpreter's exit when a
                    # save raises.
                    create_directories_asynchronously=False,
                ),
            ),
            item_names=ITEMS,
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(
                    use_ocdbt=True, use_zarr3=True, type_handler_registry=registry
                ),
                "data": ocp.JsonCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )

    def _abandon(self) -> None:
        """Waits for the threads of a save that failed and forgets the manager they belong to.

        Orbax raises the first error while other writers of the same save go on: they would fill the
        folder that is deleted next, and raise their own errors out of the save after it.
        """
        self._manager = None
        deadline = time.monotonic() + _LEFT_BEHIND_SECONDS
        for thread in set(threading.enumerate()) - self._threads_before:
            if thread.name == "async_save" or type(thread).__module__.startswith("orbax."):
                thread.join(max(0.0, deadline - time.monotonic()))


class _Arrays(ocp.type_handlers.ArrayHandler):
    """Orbax's reader and writer of arrays; a read that fails waits for those begun beside it.

    Orbax raises the first error and closes its event loop while other reads go on: each then raises
    an error of its own, out of a thread of the array store, that nothing can catch.
    """

    def __init__(self):
        super().__init__()
        # The options of Orbax's own handler, among them one whose type has no public name.
        vars(self).update(vars(ocp.type_handlers.get_type_handler(jax.Array)))

    async def deserialize(
        self,
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.type_handlers.RestoreArgs] | None = None,
    ) -> Sequence[jax.Array]:
        before = asyncio.all_tasks()
        try:
            return await super().deserialize(infos, args)
        except Exception:
            while left := asyncio.all_tasks() - before:
                await asyncio.gather(*left, return_exceptions=True)
            raise


class _OnlyNames(ocp.path.step.NameFormat):
    """Steps are found by number and never listed: what only looks like a step is not opened."""

    def __init__(self):
        self._standard = ocp.path.step.standard_name_format()

    def build_name(self, step: int) -> str:
        return self._standard.build_name(step)

    def find_all(self, base_path: Any) -> Iterator:
        del base_path
        return iter(())

    def find_step(self, base_path: Any, step: int) -> Any:
        return self._standard.find_step(base_path, step)


def bytes_of(state: PyTree) -> int:
    """Bytes of all leaves, each counted once however it is sharded."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
