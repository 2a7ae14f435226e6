"""Processes that read: the same batches as threads, and ends of all kinds."""

import contextlib
import errno
import fcntl
import gc
import io
import itertools
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import termios
import time

import numpy as np
import pytest

from moe.data import reader, readers
from moe.data.open import make_data
from moe.data.place import TrainBatches
from moe.data.reader import LENGTH
from moe.data.readers import Job, Readers
from moe.data.tokenizers import byte_tokenizer
from moe.data.types import Batch
from moe.errors import DataError

SECONDS = 60.0  # for a process to be gone: instants on a quiet machine


def take(batches, n):
    return list(itertools.islice(batches, n))


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)
            assert getattr(x, "dtype", None) == getattr(y, "dtype", None)


def pids(batches: TrainBatches) -> list[int]:
    return [process.pid for process in batches.start()._processes]  # type: ignore[attr-defined]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_until_gone(found: list[int]) -> None:
    end = time.monotonic() + SECONDS
    while not all(map(gone, found)):
        assert time.monotonic() < end, f"processes {found} are still there"
        time.sleep(0.05)


def wait_until_ahead(batches: TrainBatches) -> None:
    """Until every reader has written a dozen batches that nobody has taken."""
    end = time.monotonic() + SECONDS
    for process in batches.start()._processes:  # type: ignore[attr-defined]
        written = np.zeros(1, np.int32)
        while written[0] < 20_000:
            assert time.monotonic() < end
            fcntl.ioctl(process.stdout, termios.FIONREAD, written)
            time.sleep(0.05)


PRINTS = """
import sys
class Loud:
    def find_spec(self, name, *rest):
        if name == "moe.data.text":
            print("loud", flush=True)
sys.meta_path.insert(0, Loud())
"""


def test_any_number_of_processes_gives_the_batches_of_threads(section, tmp_path, monkeypatch):
    """From the start, from the middle with another number, for one of two processes of the run.

    What a module prints in a reader does not come between its batches.
    """
    (tmp_path / "sitecustomize.py").write_text(PRINTS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    wanted = take(make_data(section(), seed=3).train_batches(), 11)
    two = make_data(section(workers=2), seed=3).train_batches()
    assert_same(wanted[:5], take(two, 5))
    state, started = two.get_state(), pids(two)
    assert state["next_row"] == 5 * 4
    two.close()
    assert all(map(gone, started))
    three = make_data(section(workers=3), seed=3).train_batches(1, 2, state)
    blocks = [type(batch)(*(None if x is None else x[2:] for x in batch)) for batch in wanted]
    assert_same(blocks[5:], take(three, 6))
    three.close()


def test_a_reader_that_is_killed_is_named_and_takes_the_others_with_it(section):
    batches = make_data(section(workers=2), seed=0).train_batches()
    take(batches, 3)
    found = pids(batches)
    os.kill(found[1], signal.SIGTERM)  # to all processes of a run: readers go on
    take(batches, 2)
    wait_until_ahead(batches)
    os.kill(found[1], signal.SIGKILL)
    steps = (time.sleep(0.2) or batch for batch in batches)
    with pytest.raises(DataError, match=rf"process 1 .*pid {found[1]}.*SIGKILL.*data\.workers"):
        take(steps, 9)  # what it had read ahead would last for more
    batches.close()
    wait_until_gone(found)


# ---- readers of any behaviour, in the place of ours


def head(row: int) -> bytes:
    """What comes before the arrays of a batch, here four bytes of one of them."""
    empty = [[name, "|u1", [0]] for name in Batch._fields[1:6]]
    arrays = [["tokens", "|u1", [2, 2]], *empty]
    text = json.dumps({"row": row, "arrays": arrays}).encode()
    return LENGTH.pack(len(text)) + text


@pytest.fixture
def readers_that(monkeypatch, section):
    """From what each reader writes, and does then, to the run's readers from row 8 on."""

    def start(*scripts: tuple[bytes, str]) -> Readers:
        def popen(job, row, worker, workers):
            del job, row, workers
            out, then = scripts[worker]
            code = f"import os, sys, time; os.write(1, {out!r}); {then}"
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            return subprocess.Popen([sys.executable, "-S", "-c", code], **pipes)

        monkeypatch.setattr(readers, "_start", popen)
        job = Job(section().to_dict(), {}, "", {}, 4, (0, 1))
        return Readers(job, 8, len(scripts))

    return start


WHOLE = head(8) + b"abcd"


@pytest.mark.parametrize("size", [*range(0, len(WHOLE), 40), 7, 8, len(WHOLE) - 1])
@pytest.mark.parametrize(
    ("then", "told"),
    [
        ("pass", "ended with exit code 0; what"),
        ("time.sleep(0.2); sys.exit(3)", "ended with exit code 3; what"),
        ("os.close(1); time.sleep(0.2); os.kill(os.getpid(), 9)", "was ended by SIGKILL"),
    ],
)
def test_a_batch_that_is_cut_anywhere_is_a_death(readers_that, size, then, told):
    batches = readers_that((WHOLE[:size], then))
    with pytest.raises(DataError, match=rf"Reader process 0 of data\.workers=1 .* {told}"):
        next(batches)
    batches.close()


def test_batches_are_those_of_the_row_that_is_due_or_an_error(readers_that):
    stay = "time.sleep(1000)"
    batches = readers_that((WHOLE + head(16) + b"ijkl", stay), (head(12) + b"efgh", stay))
    found = [next(batches).tokens.tobytes() for _ in range(3)]
    assert found == [b"abcd", b"efgh", b"ijkl"]
    batches.close()
    assert list(batches) == []
    for wrong in (4, 12):
        batches = readers_that((head(wrong) + b"abcd", stay))
        with pytest.raises(AssertionError):
            next(batches)
        batches.close()


def test_readers_end_with_what_reads_from_them(readers_that):
    batches = readers_that(*[(WHOLE, "time.sleep(1000)")] * 2)
    found = [process.pid for process in batches._processes]
    assert not any(map(gone, found))
    del batches
    gc.collect()
    assert all(map(gone, found))


def test_one_that_cannot_start_is_told_and_the_others_end(readers_that, monkeypatch):
    started: list[subprocess.Popen] = []
    popen = subprocess.Popen

    def second_fails(*args, **kwargs):
        if started:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        started.append(popen(*args, **kwargs))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", second_fails)
    message = r"Cannot start data\.workers=2 .*temporarily unavailable.*data\.workers=0"
    with pytest.raises(DataError, match=message) as told:
        readers_that(*[(WHOLE, "time.sleep(1000)")] * 2)
    assert gone(started[0].pid), told


def test_one_that_is_dead_before_it_has_its_job_is_a_death(section, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    job = Job(section().to_dict(), {}, "x" * 1_000_000, {}, 4, (0, 1))
    batches = Readers(job, 0, 1)
    with pytest.raises(DataError, match=r"Reader process 0 .* ended with exit code 1"):
        next(batches)
    batches.close()


@pytest.mark.parametrize("key", ["fingerprint", "code", None])
def test_a_reader_that_finds_other_data_or_code_says_so(section, key):
    data = make_data(section(), seed=0)
    assert data.source is not None
    same = {"fingerprint": data.fingerprint, "code": data.code}
    job = {"section": data.source.section, "options": data.source.options, "row": 0, "rows": 4}
    job |= {"same": same | ({} if key is None else {key: "other"}), "read": [0, 0, 1, 0, 1]}
    job["tokenizer"] = data.tokenizer.to_json()
    out = Full()
    with pytest.raises(BrokenPipeError) if key is None else contextlib.nullcontext():
        reader._serve(job, out)
    (size,) = LENGTH.unpack(out.getvalue()[:8])
    found = json.loads(out.getvalue()[8 : 8 + size])
    assert found.keys() == ({"row", "arrays"} if key is None else {"error"})
    assert key is None or (f"'{key}': 'other'" in found["error"] and same[key] in found["error"])


class Full(io.BytesIO):
    """Has room for one batch."""

    def flush(self) -> None:
        if b'"row"' in self.getvalue():
            raise BrokenPipeError


def test_data_that_changes_meanwhile_is_told_by_the_reader(section, corpus):
    batches = make_data(section(workers=1), seed=0).train_batches()
    with corpus.open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(DataError, match=r"Reader process 0 .*fingerprint"):
        next(batches)
    batches.close()


PARENT = """
import json, sys, time
from ml_collections import ConfigDict
from moe.data.open import make_data
batches = make_data(ConfigDict(json.loads(sys.argv[1])), seed=0).train_batches()
if sys.argv[2] == "early":
    batches.start()
else:
    next(batches)
print(*(process.pid for process in batches.start()._processes), flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("when", ["early", "late"])
def test_readers_end_with_a_run_that_is_killed(section, when):
    """Also while they still import: nothing of theirs is set up then."""
    argument = section(workers=2).to_json()
    command = [sys.executable, "-c", PARENT, argument, when]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        found = [int(text) for text in parent.stdout.readline().split()]
        assert len(found) == 2
        assert not any(map(gone, found))
        parent.kill()
        started = time.monotonic()
        wait_until_gone(found)
        assert time.monotonic() - started < SECONDS


def test_a_reader_that_hangs_ends_with_its_parent_too(tmp_path):
    """It opens a pipe that nobody writes to, where no broken pipe would ever tell it."""
    pipe = tmp_path / "pairs.tsv"
    os.mkfifo(pipe)
    section = {"name": "pairs", "files": str(pipe), "directory": str(tmp_path)}
    job = {"section": section, "options": {"seed": 0, "task": "seq2seq"}, "same": {}}
    job["tokenizer"] = byte_tokenizer().to_json()
    command = [sys.executable, "-m", "moe.data.reader"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
        assert reader.stdin is not None
        reader.stdin.write(json.dumps(job).encode() + b"\n")
        reader.stdin.flush()
        with pytest.raises(subprocess.TimeoutExpired):
            reader.wait(5)
        reader.stdin.close()
        try:
            assert reader.wait(SECONDS) == 0
        finally:
            reader.kill()
