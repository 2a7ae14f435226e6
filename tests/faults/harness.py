"""Real runs in processes of their own, and what they leave: the oracle of every row of the matrix."""

from collections.abc import Generator, Sequence
import contextlib
import fcntl
import json
import os
from pathlib import Path
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import NamedTuple

import numpy as np

from tests import entry

ROOT = Path(__file__).parents[2]
STEPS = 40
FLAGS = [
    entry.QUICKSTART,
    *entry.MODEL_FLAGS,
    "--cpu_devices=8",
    "--config.mesh.expert=4",
    f"--config.steps={STEPS}",
    "--config.log_every=1",
    "--config.checkpoint.every=10",
    "--config.checkpoint.keep_latest=4",
    "--config.evaluation.every=10",
    "--config.evaluation.batches=2",
    "--config.optimizer.schedule=constant",
    "--config.optimizer.warmup_steps=2",
    "--config.router.name=deepseek_v3",  # state beside the parameters
    "--config.router.jitter=0.01",  # noise, which must not depend on the interruption
    "--config.model.dropout=0.1",
]
PATIENCE = 240.0  # seconds for what takes a few on a quiet machine


class Ended(NamedTuple):
    code: int
    text: str
    seconds: float  # since the child was started


class Child:
    """A program in a process of its own, whose lines are read while it runs."""

    def __init__(self, command: Sequence[str], variables: dict[str, str]):
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self.lines: list[str] = []
        self._new: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait_for(self, text: str, seconds: float = PATIENCE) -> str:
        """The first line not yet waited for that starts with `text`."""
        end = time.monotonic() + seconds
        while True:
            try:
                line = self._new.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no line {text!r} in {seconds} s:\n{self.text}") from None
            assert line is not None, f"ended before {text!r}:\n{self.text}"
            if line.startswith(text):
                return line

    def finish(self, seconds: float = PATIENCE) -> Ended:
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGKILL)
            self._reader.join()
            raise AssertionError(f"still there after {seconds} s:\n{self.text}") from None
        self._reader.join()
        return Ended(code, self.text, time.monotonic() - self.started)

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self.lines.append(line)
                self._new.put(line)
        self._new.put(None)


class Reference(NamedTuple):
    """A run that nothing disturbed, and what every child shares with it: text and compiled programs."""

    folder: Path

    @property
    def workdir(self) -> Path:
        return self.folder / "run"

    @property
    def flags(self) -> list[str]:
        return [*FLAGS, *entry.data_flags(self.folder)]

    @property
    def variables(self) -> dict[str, str]:
        return {
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }

    @property
    def bits(self) -> dict[int, str]:
        return bits(self.workdir)

    @property
    def digest(self) -> dict[str, int]:
        return digest(self.workdir, STEPS)

    def train(
        self,
        workdir: Path,
        *flags: str,
        faults: Sequence[str] = (),
        variables: dict[str, str] | None = None,
    ) -> Child:
        """R in another workdir: later flags win over its own; faults as in `tests.faults.child`."""
        rest = [*distinct([*self.flags, *flags]), f"--workdir={workdir}"]
        command = [sys.executable, str(ROOT / "tests/faults/child.py"), *faults, "--", *rest]
        return Child(command, {**self.variables, **(variables or {})})

    def launch(
        self,
        workdir: Path,
        *flags: str,
        devices: int = 8,
        heartbeat: int,
        restarts: int = 0,
        faults: Sequence[str] = (),
        variables: dict[str, str] | None = None,
    ) -> Child:
        """`train` as two processes that share the devices."""
        given = distinct([*self.flags, *flags])
        rest = [flag for flag in given if not flag.startswith("--cpu_devices")]
        launcher = [f"--heartbeat={heartbeat}", "--processes=2", f"--cpu_devices={devices // 2}"]
        program = [str(ROOT / "tests/faults/child.py"), *faults, "--", *rest]
        command = [
            *(sys.executable, str(ROOT / "scripts/launch.py"), *launcher),
            *(f"--restarts={restarts}", "--", *program, f"--workdir={workdir}"),
        ]
        return Child(command, {**self.variables, **(variables or {})})

    def until(self, step: int, workdir: Path) -> Path:
        """A copy of R as it was when `step`, one of 10, 20, 30, was its newest checkpoint."""
        shutil.copytree(self.workdir, workdir)
        for path in (workdir / "checkpoints").iterdir():
            if path.name.isdigit() and int(path.name) > step:
                shutil.rmtree(path)
        return workdir


def distinct(flags: Sequence[str]) -> list[str]:
    """The last of the flags that set the same thing."""
    return list({flag.partition("=")[0]: flag for flag in flags}.values())


def process_ids(launcher: int) -> dict[int, int]:
    """Process ids of a launcher's children, by their number."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            words = (path / "cmdline").read_text().split("\0")
        except OSError:
            continue  # gone meanwhile
        numbers = [word.partition("=")[2] for word in words if word.startswith("--process_id=")]
        if parent == launcher and numbers:
            found[int(numbers[0])] = int(path.name)
    return found


@contextlib.contextmanager
def only_one(path: Path) -> Generator[None]:
    """Waits until no other process is inside with the same path."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make_reference(folder: Path) -> Reference:
    """Runs R, once for all test processes."""
    reference = Reference(folder)
    with only_one(folder.with_suffix(".lock")):
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            entry.tiny_text(folder)
            with reference.train(reference.workdir) as child:
                ended = child.finish()
            assert ended.code == 0, ended.text
            (folder / "done").touch()
    return reference


def bits(workdir: Path) -> dict[int, str]:
    """Loss and gradient norm of every step that stands in the history, to the last bit."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["split"] == "train"]
    assert len({record["step"] for record in records}) == len(records), "a step stands twice"
    return {record["step"]: number_bits(record) for record in records}


def number_bits(record: dict) -> str:
    values = [record["loss/total"], record["grad_norm"]]
    return np.asarray([np.nan if v is None else v for v in values], np.float32).tobytes().hex()


def digest(workdir: Path, step: int) -> dict[str, int]:
    """The digest of each leaf, as recorded when the state was on the devices."""
    path = workdir / "checkpoints" / str(step) / "_CHECKPOINT_METADATA"
    leaves = json.loads(path.read_text())["custom_metadata"]["leaves"]
    return {name: leaf["digest"] for name, leaf in leaves.items()}


def steps_saved(workdir: Path) -> list[int]:
    """Numbers of the checkpoint directories, ascending."""
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
