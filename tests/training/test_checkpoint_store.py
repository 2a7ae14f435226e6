"""What Orbax is kept from: reads and writers left behind, steps skipped after a way back."""

import asyncio
import gc
import threading
import time

import orbax.checkpoint as ocp
import pytest

from moe.errors import CheckpointError
from moe.training.checkpoint import Checkpointer
from moe.training.store import Store, _Arrays
from tests.training.tiny_checkpoints import (
    abstract,
    assert_same_bits,
    restore_small,
    save_steps,
    small_state,
)


def test_a_load_that_fails_leaves_no_read_in_flight(tmp_path):
    """Orbax raises its first error and closes the event loop that the other reads report to."""
    save_steps(tmp_path, [1])
    described = tmp_path / "1/state/array_metadatas/process_0"
    described.write_bytes(described.read_bytes()[:99])  # found to be wrong before any array is read
    store = Store(tmp_path, read_only=True)
    for _ in range(3):
        with pytest.raises(ValueError, match=r"Expecting|Unterminated"):
            store.load(1, abstract(small_state(0), devices=1))
        tasks = [found for found in gc.get_objects() if isinstance(found, asyncio.Task)]
        assert [task for task in tasks if not task.done()] == []
    store.close()


def test_reads_beside_one_that_fails_are_waited_for(monkeypatch):
    ended = []

    async def slow() -> None:
        await asyncio.sleep(0.1)
        ended.append("slow")
        await asyncio.create_task(asyncio.sleep(0))  # what is begun meanwhile ends as well

    async def broken() -> None:
        raise ValueError("unreadable")

    async def deserialize(handler: object, infos: object, args: object = None) -> None:
        await asyncio.gather(slow(), broken())

    monkeypatch.setattr(ocp.type_handlers.ArrayHandler, "deserialize", deserialize)
    loop = asyncio.new_event_loop()
    with pytest.raises(ValueError, match="unreadable"):
        loop.run_until_complete(_Arrays().deserialize([]))
    assert ended == ["slow"]
    assert not asyncio.all_tasks(loop)
    loop.close()


def test_a_wait_that_fails_waits_for_the_other_writers(tmp_path, monkeypatch):
    ended = threading.Event()

    def write_on() -> None:
        time.sleep(0.3)
        ended.set()

    def fail(manager: ocp.CheckpointManager) -> None:
        threading.Thread(target=write_on, name="async_save").start()
        raise OSError("No space left on device")

    store = Store(tmp_path, read_only=False)
    with monkeypatch.context() as patched:
        patched.setattr(ocp.CheckpointManager, "wait_until_finished", fail)
        with pytest.raises(OSError, match="No space left"):
            store.wait(1)
    assert ended.is_set()
    store.close()


def test_a_step_before_the_last_one_is_saved_after_a_way_back(tmp_path):
    with Checkpointer(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(5, small_state(5), {}, {})
        checkpoints.retire_after(0)
        assert checkpoints.save(2, small_state(2), {}, {})
        assert checkpoints.all_steps() == [2]
        checkpoints.retire_after(0)
        assert checkpoints.save(5, small_state(6), {}, {})
        assert checkpoints.all_steps() == [5]
    assert_same_bits(small_state(6), restore_small(tmp_path / "checkpoints").state)


def test_nothing_is_saved_by_who_only_reads(tmp_path):
    save_steps(tmp_path, [1])
    with (
        Checkpointer(tmp_path, read_only=True) as checkpoints,
        pytest.raises(CheckpointError, match="nothing is saved there"),
    ):
        checkpoints.save(2, small_state(2), {}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
