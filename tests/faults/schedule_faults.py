"""What disturbs a run of a schedule, and where in the run: signals, a full disk, damaged checkpoints."""

from collections.abc import Callable, Generator
import contextlib
import os
from pathlib import Path
import random
import re
import resource
import signal
import subprocess
import time
from typing import NamedTuple

from tests.faults.harness import Child, process_ids, steps_saved
from tests.faults.schedule_checks import is_whole, processes_of

DISK = "64m"  # of a run whose disk gets full
ENDINGS = (
    *("term", "int", "kill", "stop_kill"),
    *("term_saving", "kill_saving", "term_evaluating", "full"),
)
OF_ONE = (
    "term_one",
    "kill_one",
    "stop_one",
    "term_one_saving",
    "kill_one_saving",
)  # of two processes
DAMAGES = ("flip", "truncate")
START_SECONDS = 900.0  # of a machine that ten others share; a quiet one needs a hundredth


class Fault(NamedTuple):
    """How a start ends, and what happens to the newest checkpoint before the next one."""

    ending: str
    step: int  # from which on
    damage: str | None


@contextlib.contextmanager
def disk(workdir: Path, *, needed: bool) -> Generator[Callable[[bool], None]]:
    """Yields what fills the disk of the workdir for a child, or empties it again (`False`)."""
    workdir.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(workdir)]
    own = needed and os.geteuid() == 0 and subprocess.run(mount, check=False).returncode == 0
    ballast = workdir / "ballast"

    def fill(full: bool) -> None:
        if not full:
            ballast.unlink(missing_ok=True)
        elif own:
            with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(bytes(1 << 16)):
                    pass
        else:  # no file of the run may grow
            for pid in processes_of(workdir):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (1024, 1024))

    try:
        yield fill
    finally:
        if own:
            subprocess.run(["umount", str(workdir)], check=True)


def disturb(child: Child, fault: Fault, fill: Callable[[bool], None], rng: random.Random) -> bool:
    """Whether the fault came before the run was done."""
    if not reached(child, fault):
        return False
    time.sleep(rng.uniform(0, 0.1))
    target = child.pid
    if "one" in fault.ending.split("_"):
        ids = process_ids(child.pid)
        target = ids.get(rng.randrange(2), 0)
    if not target or child.process.poll() is not None:
        return False
    if fault.ending == "full":
        fill(True)
        return True
    try:
        hit(target, fault.ending, rng)
    except ProcessLookupError:  # one of two has ended just now
        return False
    return True


def reached(child: Child, fault: Fault) -> bool:
    """Waits for the place of a fault; False if the run has ended before."""
    seen = watch(child, lambda line: step_of(line) >= fault.step)
    where = {"saving": "SAVING", "evaluating": "EVALUATING"}.get(fault.ending.split("_")[-1])
    if seen is not None and where is not None:
        seen = watch(child, lambda line: line.startswith(where), after=seen)
    return seen is not None


def hit(target: int, ending: str, rng: random.Random) -> None:
    """Sends a process what `ending` says."""
    kind = ending.split("_")[0]
    if kind == "stop":
        os.kill(target, signal.SIGSTOP)
        time.sleep(rng.uniform(0, 0.5))
    if ending != "stop_one":  # this one stands still until its launcher ends it
        os.kill(target, {"term": signal.SIGTERM, "int": signal.SIGINT}.get(kind, signal.SIGKILL))


def damage(workdir: Path, kind: str, rng: random.Random) -> int | None:
    """Flips a byte of the newest checkpoint, or cuts a file of it; returns its step.

    None, and nothing happens, if no good one would be left.
    """
    steps = steps_saved(workdir) if (workdir / "checkpoints").is_dir() else []
    if not any(is_whole(workdir, step) for step in steps[:-1]):
        return None
    files = sorted(p for p in (workdir / "checkpoints" / str(steps[-1])).rglob("*") if p.is_file())
    path = rng.choice([p for p in files if p.stat().st_size])
    data = bytearray(path.read_bytes())
    place = rng.randrange(len(data))
    if kind == "flip":
        data[place] ^= 1 << rng.randrange(8)
    else:
        del data[place:]
    path.write_bytes(data)
    return steps[-1]


# ---- where a run is


def watch(child: Child, wanted: Callable[[str], bool], after: int = 0) -> int | None:
    """Number of the first line that is wanted, plus one; None if the child ends without it."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        ended = not child._reader.is_alive()
        for number in range(after, len(child.lines)):
            if wanted(child.lines[number]):
                return number + 1
        if ended:
            return None
        time.sleep(0.005)
    raise AssertionError(f"nothing for {START_SECONDS} s:\n{child.text}")


def step_of(line: str) -> int:
    found = re.match(r"step (\d+)/", line)
    return int(found[1]) if found else 0


def first_step(child: Child) -> int:
    number = watch(child, lambda line: step_of(line) > 0)
    assert number is not None, f"no step:\n{child.text}"
    return step_of(child.lines[number - 1])
