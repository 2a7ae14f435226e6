"""Trainers as child processes: how they are stopped, when they are started again, what is told of them."""

from collections.abc import Callable
import os
from pathlib import Path
import signal
import subprocess

from moe.errors import EXIT_PREEMPTED, EXIT_STUCK, DivergedError, ResourceError
from moe.report.records import parse_record
from moe.sweep.storage import redacted

KILL_SECONDS = 120.0  # between SIGTERM and SIGKILL: time to save a checkpoint
LOG_TAIL = 2000  # characters of a failed run's output that are kept
TAIL_BYTES = 1 << 16  # of a file that are looked at

# Ends after which a trainer is started again: how often at one place of the run.
ENDS = {EXIT_PREEMPTED: 3, EXIT_STUCK: 2}
KILLS = 1

CAUSES = {
    DivergedError.exit_code: "diverged: ",
    ResourceError.exit_code: "out of disk or memory: ",
    EXIT_STUCK: "stuck: ",
}


class Restarts:
    """Says whether a trainer that ended is started again.

    One that saved and stopped by itself, one that its watchdog ended, and one that was killed are:
    as long as they get further, and a few times where they do not.

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
        allowed = KILLS if code < 0 else ENDS.get(code, 0)
        return self._here <= allowed

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


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - TAIL_BYTES))
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


def failure_text(code: int, log: Path) -> str:
    """The exit code and the end of the output, where an entry point writes its message; no passwords."""
    text = redacted(_tail(log)).strip()[-LOG_TAIL:]
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name} (the system kills processes when memory runs out). {text}"
    return f"{CAUSES.get(code, '')}exit code {code}. {text}"
