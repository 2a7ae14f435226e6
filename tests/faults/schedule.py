"""One run through a random schedule of faults, started again after each, beside one that nothing disturbed.

    python3 -m tests.faults.schedule --seeds=0-19

A line a seed, then totals; a seed that fails is printed with its schedule and stops nothing but itself.
"""

from collections import Counter
from collections.abc import Callable, Generator, Iterable
import contextlib
import json
import os
from pathlib import Path
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

from absl import flags

from moe.training import manifest
from moe.training.recording import read_records
from tests import entry
from tests.faults.harness import Child, Reference, digest, number_bits, steps_saved

STEPS, EVERY, BATCH = 200, 10, 8
RUN = [
    f"--config.steps={STEPS}",
    f"--config.checkpoint.every={EVERY}",
    "--config.checkpoint.keep_latest=3",
    "--config.evaluation.every=20",
    "--config.evaluation.batches=2",
]
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
PACE = f"slow_step@1-{STEPS}:0.02"  # a fault that follows a printed line meets the run nearby
DISK = "64m"  # of a run whose disk gets full
ENDINGS = (
    *("term", "int", "kill", "stop_kill"),
    *("term_saving", "kill_saving", "term_evaluating", "full"),
)
DAMAGES = ("flip", "truncate")
PREEMPTED, NO_ROOM = 75, 6
START_SECONDS, SEED_SECONDS = 240.0, 1200.0  # a machine that is shared; a quiet one needs a tenth
KNOWN = {
    *("config.json", "tokenizer.json", "metrics.jsonl", "history.jsonl", "report.html"),
    *("checkpoints", "tensorboard", "eval", "choices", "quarantine", "superseded"),
}


class Fault(NamedTuple):
    """How a start ends, and what happens to the newest checkpoint before the next one."""

    ending: str
    step: int  # from which on
    damage: str | None


def schedule(seed: int) -> list[Fault]:
    rng = random.Random(seed)
    endings = rng.sample(ENDINGS, 6)
    steps = sorted(rng.sample(range(3, STEPS - 10), len(endings)))
    return [
        Fault(ending, step, rng.choice(DAMAGES) if rng.random() < 0.35 else None)
        for ending, step in zip(endings, steps, strict=True)
    ]


class Oracle(NamedTuple):
    """A run that nothing disturbed."""

    reference: Reference
    flags: list[str]
    bits: dict[int, str]

    @classmethod
    def make(cls, folder: Path, devices: int) -> "Oracle":
        entry.tiny_text(folder)
        expert = next(size for size in (4, 2, 1) if devices % size == 0)
        layout = [f"--cpu_devices={devices}", f"--config.mesh.expert={expert}"]
        oracle = cls(Reference(folder), [*RUN, *layout], {})
        with oracle.start(folder / "run") as child:
            ended = child.finish(SEED_SECONDS)
        assert ended.code == 0, ended.text
        found = executed(folder / "run", 0)
        assert list(found) == list(range(1, STEPS + 1))
        assert len(set(found.values())) == STEPS, "rows in another order would not show"
        return oracle._replace(bits=found)

    def start(self, workdir: Path) -> Child:
        quick = {"XLA_FLAGS": QUICK}
        return self.reference.train(workdir, *self.flags, faults=[PACE], variables=quick)


class Told(NamedTuple):
    """What a seed came to."""

    faults: Counter
    restarts: int
    quarantined: int
    executed: int
    start_seconds: list[float]  # each to its first step
    seconds: float


def run_seed(oracle: Oracle, seed: int, workdir: Path) -> Told:
    """Raises AssertionError where an invariant does not hold."""
    faults, rng = schedule(seed), random.Random(seed)
    began, done, steps, waits = time.monotonic(), Counter(), 0, []
    damaged: set[int | None] = set()
    with disk(workdir, needed=any(fault.ending == "full" for fault in faults)) as fill:
        for fault in [*faults, None]:
            before, torn = newest_whole(workdir), drafts(workdir)
            with oracle.start(workdir) as child:
                resumed = first_step(child) - 1
                waits.append(time.monotonic() - child.started)
                check_start(workdir, resumed, before, torn)
                met = fault is not None and disturb(child, fault, fill, rng)
                ended = child.finish(START_SECONDS)
            fill(False)
            check_code(fault.ending if met and fault else None, ended.code, ended.text)
            steps += check_losses(oracle, workdir, resumed)
            done.update([fault.ending] if met and fault else [])
            if ended.code == 0:
                break
            if fault is not None and fault.damage:
                step = damage(workdir, fault.damage, rng)
                done.update([] if step is None else [fault.damage])
                damaged.add(step)
        check_end(oracle, workdir, damaged)
        quarantined = len(list(workdir.glob("quarantine/*")))
    seconds = time.monotonic() - began
    assert seconds < SEED_SECONDS
    return Told(done, len(waits) - 1, quarantined, steps, waits, seconds)


# ---- faults


@contextlib.contextmanager
def disk(workdir: Path, *, needed: bool) -> Generator[Callable[..., None]]:
    """Yields what fills the disk of the workdir for a child, or empties it again (`False`)."""
    workdir.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(workdir)]
    own = needed and os.geteuid() == 0 and subprocess.run(mount, check=False).returncode == 0
    ballast = workdir / "ballast"

    def fill(full: bool, child: Child | None = None) -> None:
        if not full:
            ballast.unlink(missing_ok=True)
        elif own:
            with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(bytes(1 << 16)):
                    pass
        else:  # no file of the child may grow
            assert child is not None
            resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (1024, 1024))

    try:
        yield fill
    finally:
        if own:
            subprocess.run(["umount", str(workdir)], check=True)


def disturb(child: Child, fault: Fault, fill: Callable[..., None], rng: random.Random) -> bool:
    """Whether the fault came before the run was done."""
    seen = watch(child, lambda line: step_of(line) >= fault.step)
    where = {"saving": "SAVING", "evaluating": "EVALUATING"}.get(fault.ending.split("_")[-1])
    if seen is not None and where is not None:
        seen = watch(child, lambda line: line.startswith(where), after=seen)
    if seen is None:
        return False
    time.sleep(rng.uniform(0, 0.1))
    if child.process.poll() is not None:
        return False
    if fault.ending == "full":
        fill(True, child)
    if fault.ending == "stop_kill":
        child.signal(signal.SIGSTOP)
        time.sleep(rng.uniform(0, 0.5))
    number = {"term": signal.SIGTERM, "int": signal.SIGINT}.get(fault.ending.split("_")[0])
    if fault.ending != "full":
        child.signal(number or signal.SIGKILL)
    return True


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


# ---- what is seen of a run


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


def executed(workdir: Path, resumed: int) -> dict[int, str]:
    records = [one for one in read_records(workdir) if one["split"] == "train"]
    assert len({one["step"] for one in records}) == len(records), "a step stands twice"
    return {one["step"]: number_bits(one) for one in records if one["step"] > resumed}


def newest_whole(workdir: Path) -> int:
    """The newest step whose files are those that its manifest names; 0 without any."""
    if not (workdir / "checkpoints").is_dir():
        return 0
    return max((n for n in steps_saved(workdir) if is_whole(workdir, n)), default=0)


def is_whole(workdir: Path, step: int) -> bool:
    folder = workdir / "checkpoints" / str(step)
    named = (folder / manifest.MANIFEST_FILE).exists()
    return named and manifest.difference(folder, thorough=True) is None


def drafts(workdir: Path) -> dict[str, int]:
    """Unfinished checkpoints and files, with their inodes."""
    found = {}
    for folder, inside, files in os.walk(workdir):
        for name in (*inside, *files):
            if "tmp" in name.rpartition(".")[2]:
                with contextlib.suppress(FileNotFoundError):  # it was finished meanwhile
                    path = os.path.join(folder, name)
                    found[path] = os.stat(path).st_ino
    return found


# ---- invariants


def check_start(workdir: Path, resumed: int, before: int, torn: dict[str, int]) -> None:
    assert resumed >= before, f"started from {resumed}, and {before} was whole"
    left = {path for path, inode in drafts(workdir).items() if torn.get(path) == inode}
    assert not left, f"left of before: {left}"


def check_code(ending: str | None, code: int, text: str) -> None:
    kinds = {"term": PREEMPTED, "int": PREEMPTED, "full": NO_ROOM}
    expected = {0} if ending is None else {kinds.get(ending.split("_")[0], -signal.SIGKILL), 0}
    assert code in expected, f"{ending}: ended with {code}, not {expected}:\n{text}"


def check_losses(oracle: Oracle, workdir: Path, resumed: int) -> int:
    found = executed(workdir, resumed)
    wrong = [step for step, bits in found.items() if oracle.bits[step] != bits]
    assert not wrong, f"losses of steps {wrong} after step {resumed} are others"
    return len(found)


def check_end(oracle: Oracle, workdir: Path, damaged: set[int | None]) -> None:
    assert executed(workdir, 0) == oracle.bits
    assert digest(workdir, STEPS) == digest(oracle.reference.workdir, STEPS)
    for step in steps_saved(workdir):
        place = json.loads((workdir / f"checkpoints/{step}/data/metadata").read_text())
        assert place["next_row"] == step * BATCH
        # A byte that nobody reads keeps a step from being whole, and not from being right.
        assert step in damaged or is_whole(workdir, step), f"{step} is not whole"
    assert not drafts(workdir)
    assert not {path.name for path in workdir.iterdir()} - KNOWN, os.listdir(workdir)
    inside = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert not [name for name in inside if not name.isdigit() and name != "scores.json"]
    assert not processes_of(workdir)


def processes_of(workdir: Path) -> list[int]:
    """Processes whose command line names the workdir."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"--workdir={workdir}" in (path / "cmdline").read_text().split("\0"):
                found.append(int(path.name))
    return found


# ---- command line


def seeds_of(text: str) -> list[int]:
    parts = (part.partition("-") for part in text.split(","))
    return [n for first, _, last in parts for n in range(int(first), int(last or first) + 1)]


def line_of(told: Told) -> str:
    kinds = ", ".join(f"{kind} {n}" for kind, n in sorted(told.faults.items()))
    starts = sorted(told.start_seconds)
    return (
        f"{kinds}; {told.restarts} restarts (first step after {starts[len(starts) // 2]:.1f} s), "
        f"{told.quarantined} quarantined, {told.executed} steps executed, "
        f"{told.seconds:.0f} s: all invariants hold"
    )


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(seeds: Iterable[int], devices: int, folder: Path) -> int:
    began = time.monotonic()
    oracle = Oracle.make(folder, devices)
    say(f"undisturbed: {STEPS} steps on {devices} devices, {time.monotonic() - began:.0f} s")
    total, restarts, quarantined, failed = Counter(), 0, 0, []
    for seed in seeds:
        workdir = folder / f"seed-{seed}"
        try:
            told = run_seed(oracle, seed, workdir)
        except AssertionError as error:
            failed.append(seed)
            say(f"seed {seed} FAILED: {error}\nschedule: {schedule(seed)}")
            continue
        say(f"seed {seed}: {line_of(told)}")
        total += told.faults
        restarts, quarantined = restarts + told.restarts, quarantined + told.quarantined
        shutil.rmtree(workdir)
    kinds = ", ".join(f"{kind} {n}" for kind, n in sorted(total.items()))
    say(
        f"{total.total()} faults ({kinds}), {restarts} restarts, {quarantined} quarantined, "
        f"failed seeds: {failed or 'none'}, {time.monotonic() - began:.0f} s"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    values = flags.FlagValues()
    flags.DEFINE_string("seeds", "0-19", "Numbers and ranges.", flag_values=values)
    flags.DEFINE_integer("devices", 1, "Virtual devices of the run.", flag_values=values)
    values(sys.argv)
    with tempfile.TemporaryDirectory(prefix="schedule-") as scratch:
        sys.exit(main(seeds_of(values.seeds), values.devices, Path(scratch)))
