"""Trainers as child processes: how they are stopped, when they are started again, what is told of them."""

from collections.abc import Callable
import os
from pathlib import Path
import signal
import subprocess

from moe.errors import EXIT_STUCK, RESTARTS_IN_PLACE, STARTED_AGAIN, DivergedError, ResourceError
from moe.report.records import parse_record
from moe.sweep.address import redacted

KILL_SECONDS = 120.0  # between SIGTERM and SIGKILL: time to save a checkpoint
LOG_TAIL = 2000  # characters of a failed run's output that are kept
TAIL_BYTES = 1 << 16  # of a file that are looked at

CAUSES = {
    DivergedError.exit_code: "diverged: ",
    ResourceError.exit_code: "out of disk or memory: ",
    EXIT_STUCK: "stuck: ",
}


class Restarts:
    """Says whether a trainer that ended is started again.

    It is after the ends of `STARTED_AGAIN`, as long as it gets further, and `RESTARTS_IN_PLACE` times where
    it does not.

    Args:
        progress: of the run on disk; grows when it gets further.
    """

    def __init__(self, progress: Callable[[], int]):
        self._progress = progress
        self._best = -1
        self._here = 0  # ends since it last got further

    def again(self, code: int) -> bool:
        """Whether to start it again after this exit code."""
        reached = self._progress()
        self._here = 1 if reached > self._best else self._here + 1
        self._best = max(reached, self._best)
        return code in STARTED_AGAIN and self._here <= RESTARTS_IN_PLACE

    def text(self) -> str:
        """How often it was started again for nothing, "" if it was not."""
        return f"started again {self._here - 1} times without getting further: " * (self._here > 1)


def reached(run: Path) -> int:
    """The last step that a run has logged or saved; 0 before any."""
    steps = [int(p.name) for p in run.glob("checkpoints/*") if p.name.isdigit()]
    return max([_last_logged(run / "metrics.jsonl"), *steps])


def _last_logged(path: Path) -> int:
    try:
        lines = _tail(path).splitlines()
    except FileNotFoundError:
        return 0
    records = map(parse_record, lines)
    return max((record["step"] for record in records if record is not None), default=0)


def size(path: Path) -> int:
    """Bytes of a file, 0 of one that is not there."""
    return path.stat().st_size if path.exists() else 0


def _tail(path: Path, since: int = 0) -> str:
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(since, end - TAIL_BYTES))
        return file.read().decode("utf-8", errors="replace")


def terminate(process: "subprocess.Popen[bytes]", seconds: float = KILL_SECONDS) -> int:
    """Asks a process to save and stop, waits so long, and kills it if it does not."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


def failure_text(code: int, log: Path, since: int = 0) -> str:
    """The exit code and the end of the output, where an entry point writes its message; no passwords.

    Args:
        code: of the trainer.
        log: its output, after that of earlier attempts.
        since: bytes of those.
    """
    text = redacted(_tail(log, since)).strip()[-LOG_TAIL:]
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name} (the system kills processes when memory runs out). {text}"
    return f"{CAUSES.get(code, '')}exit code {code}. {text}"
