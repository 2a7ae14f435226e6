"""Batches read in a thread: the same ones, the same places, and an ear for signals."""

import subprocess
import sys
import textwrap
import threading
import time
import traceback
from typing import Any

import jax
import numpy as np
import pytest

from moe import cli, setup
from moe.training.patience import Interrupted, Patient
from tests.entry import data_flags, tiny_text


class Source:
    """Counts batches; waits at those of `gates`, fails at `bad`, ends at `length`."""

    def __init__(self, length: int = 100, bad: int | None = None, gate: int | None = None):
        self.place, self._length, self._bad, self._gate = 0, length, bad, gate
        self.open = threading.Event()
        self.closed = False

    def close(self) -> None:
        self.closed = True

    def __next__(self) -> int:
        self.place += 1  # before the wait, as an iterator may
        if self.place == self._gate:
            self.open.wait()
        if self.place == self._bad:
            raise ValueError("a bad record")
        if self.place > self._length:
            raise StopIteration
        return self.place

    def get_state(self) -> dict[str, int]:
        return {"next": self.place}

    def set_state(self, state: dict[str, Any], *args: Any, **options: Any) -> Any:
        self.place = state["next"]
        return options


def never() -> bool:
    return False


def test_batches_and_places_are_those_of_the_source():
    source = Source(length=3)
    with Patient(source, never) as batches:
        assert batches.get_state() == {"next": 0}
        assert next(batches) == 1
        time.sleep(0.05)  # time to read ahead, if it did
        assert batches.get_state() == {"next": 1}
        assert batches.set_state({"next": 0}, allow=["seed"]) == {"allow": ["seed"]}
        assert list(batches) == [1, 2, 3]
        with pytest.raises(StopIteration):
            next(batches)
    assert "batches" not in [thread.name for thread in threading.enumerate()]
    assert source.closed


def test_a_stop_is_noticed_while_a_read_hangs_and_the_place_is_before_it():
    source, stop = Source(gate=3), threading.Event()
    with Patient(source, stop.is_set) as batches:
        assert [next(batches), next(batches)] == [1, 2]
        threading.Timer(0.3, stop.set).start()
        began = time.monotonic()
        with pytest.raises(Interrupted):
            next(batches)
        assert 0.2 < time.monotonic() - began < 5  # 0.5, on a machine shared by ten
        assert batches.get_state() == {"next": 2}
        with pytest.raises(RuntimeError, match="being read"):
            batches.set_state({"next": 0})
        source.open.set()
        assert next(batches) == 3  # not lost
        assert batches.get_state() == {"next": 3}


def test_a_batch_that_is_there_is_handed_out_though_a_stop_was_asked_for():
    with Patient(Source(), lambda: True) as batches:
        assert next(batches) == 1


def test_an_error_of_the_reader_reaches_the_caller_with_its_traceback():
    with Patient(Source(bad=2), never) as batches:
        assert next(batches) == 1
        with pytest.raises(ValueError, match="a bad record") as raised:
            next(batches)
        names = [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]
        assert names.count("__next__") == 2  # ours and the source's
        assert next(batches) == 3


def test_an_end_of_another_kind_reaches_the_caller_too():
    """It ends the reader's thread, and the caller must not wait for it."""

    class Ends(Source):
        def __next__(self) -> int:
            raise SystemExit(3)

    ends = iter([False] * 50)
    with Patient(Ends(), lambda: next(ends, True)) as batches, pytest.raises(SystemExit):
        next(batches)


def test_a_reader_that_hangs_does_not_block_the_end_of_the_process():
    code = """
        import threading, sys
        from moe.training.patience import Interrupted, Patient
        class Source:
            def __next__(self):
                threading.Event().wait()
            def get_state(self):
                return {}
        try:
            with Patient(Source(), lambda: True) as batches:
                next(batches)
        except Interrupted:
            sys.exit(75)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=60, check=False)
    assert done.returncode == 75


def test_a_read_in_the_thread_costs_little():
    seconds = []
    with Patient(Source(2000), never) as batches:
        for _ in range(1000):
            began = time.perf_counter()
            next(batches)
            seconds.append(time.perf_counter() - began)
    assert sorted(seconds)[100] < 0.0002  # of what the machine's other work does not slow down


def test_batches_of_training_are_the_same_and_go_on_at_the_same_place(tmp_path):
    tiny_text(tmp_path)
    _, _, overrides = cli.split_overrides(data_flags(tmp_path))
    data = setup.open_data(cli.load_config("configs/quickstart.py", overrides))
    plain = data.train_batches()
    with Patient(data.train_batches(), never) as patient:
        for _ in range(3):
            jax.tree.map(np.testing.assert_array_equal, next(patient), next(plain))
        assert patient.get_state() == plain.get_state()
        place = patient.get_state()
        after = next(patient)
    with Patient(data.train_batches(), never) as again:
        again.set_state(place)
        jax.tree.map(np.testing.assert_array_equal, next(again), after)
