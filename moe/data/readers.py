"""Training batches read by processes of their own: `data.workers`.

Process w of n reads batches w, w + n, w + 2n, ... and the run takes them in turn, so that any number
of processes gives the same batches. They open the data themselves, from the config: nothing but a
line of JSON goes to them and nothing but arrays comes back. Grain's own worker processes outlive a
run that is killed, with their shared memory; these end with it (`moe.data.reader`).
"""

from collections.abc import Sequence
import contextlib
import json
import math
import os
from pathlib import Path
import signal
import subprocess
import sys
from typing import Any, NamedTuple
import weakref

import numpy as np

from moe.data.reader import LENGTH
from moe.data.types import Batch
from moe.errors import DataError

_SILENT = (signal.SIGINT, signal.SIGTERM)  # to all processes of a run; it still wants its batches
_PATIENCE = 10.0  # seconds for a process to be gone once its output has ended


class Job(NamedTuple):
    """What the processes read."""

    section: dict[str, Any]  # `config.data`
    options: dict[str, Any]  # of `moe.data.open.make_data`, JSON
    tokenizer: str  # JSON
    same: dict[str, str]  # fingerprint and code that they must find
    batch_size: int  # rows of the global batch
    block: tuple[int, int]  # of a global batch: process of the run, and how many there are


class Readers:
    """Batches from a row of the stream on, made by several processes.

    Args:
        job: what they read.
        row: first row of the first global batch.
        workers: number of processes.
    """

    def __init__(self, job: Job, row: int, workers: int):
        self._row, self._batch_size, self._turn = row, job.batch_size, 0
        self._processes: list[subprocess.Popen] = []
        self._end = weakref.finalize(self, _end, self._processes)  # of a run that does not close it
        try:
            for worker in range(workers):
                self._processes.append(_start(job, row, worker, workers))
        except OSError as error:
            self.close()
            raise DataError(
                f"Cannot start data.workers={workers} processes that read: {error.strerror}. Set "
                "data.workers=0, which reads in threads, or fewer."
            ) from error

    def __iter__(self) -> "Readers":
        return self

    def __next__(self) -> Batch:
        if not self._processes:
            raise StopIteration
        # Not only when its pipe is empty: that may hold batches for many steps. One that tells an
        # error ends with 0.
        for worker, process in enumerate(self._processes):
            if process.poll():
                raise DataError(self._death(worker))
        worker = self._turn % len(self._processes)
        batch = self._take(worker)
        self._turn += 1
        self._row += self._batch_size
        return batch

    def close(self) -> None:
        """Ends the processes."""
        self._end()
        self._processes.clear()

    def _take(self, worker: int) -> Batch:
        stream: Any = self._processes[worker].stdout
        try:
            (size,) = LENGTH.unpack(_exactly(stream, LENGTH.size))
            head = json.loads(_exactly(stream, size))
            if "error" in head:
                raise DataError(f"Reader process {worker} of data.workers: {head['error']}")
            arrays = {name: _array(stream, *shape) for name, *shape in head["arrays"]}
        except EOFError as error:
            raise DataError(self._death(worker)) from error
        assert head["row"] == self._row, (head["row"], self._row)
        return Batch(**arrays)

    def _death(self, worker: int) -> str:
        process = self._processes[worker]
        try:
            code = process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            code = 0  # it closed its output and stays
        how = f"ended with exit code {code}; what it said of it stands above"
        if code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
        return (
            f"Reader process {worker} of data.workers={len(self._processes)} (pid {process.pid}) "
            f"{how}. A kernel that runs out of memory ends processes so: use fewer data.workers (0 "
            "reads in threads), then start the run again; it goes on from its last checkpoint, with "
            "the same rows."
        )


def _start(job: Job, row: int, worker: int, workers: int) -> subprocess.Popen:
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    line = {
        "section": job.section,
        "options": job.options,
        "tokenizer": job.tokenizer,
        "same": job.same,
        "row": row + worker * job.batch_size,
        "rows": workers * job.batch_size,
        "read": [row, *job.block, worker, workers],
    }
    # Blocked signals stay blocked through exec, so that there is no moment without.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SILENT)
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "moe.data.reader"],
            env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it is dead already; the first batch tells
        process.stdin.write(json.dumps(line).encode() + b"\n")
        process.stdin.flush()
    return process


def _end(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):
                stream and stream.close()


def _exactly(stream: Any, size: int) -> bytearray:
    """The next bytes of a stream.

    Raises:
        EOFError: there are fewer.
    """
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        count = stream.readinto(view[done:])
        if not count:
            raise EOFError
        done += count
    return data


def _array(stream: Any, dtype: str, shape: Sequence[int]) -> np.ndarray:
    kind = np.dtype(dtype)
    data = _exactly(stream, math.prod(shape) * kind.itemsize)
    return np.frombuffer(data, kind).reshape(shape)
