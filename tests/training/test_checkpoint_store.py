"""What a load that fails leaves behind."""

import asyncio
import gc

import pytest

from moe.training.store import Store
from tests.training.tiny_checkpoints import abstract, save_steps, small_state


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
