"""One run through a random schedule of faults, started again after each, beside one that nothing disturbed.

    python3 -m tests.faults.schedule --seeds=0-19
    python3 -m tests.faults.schedule --seeds=0-19 --devices=8             # experts spread over four of them
    python3 -m tests.faults.schedule --seeds=0-19 --devices=8,4,1         # each start on another number
    python3 -m tests.faults.schedule --seeds=0-9 --devices=8 --processes=2  # faults of one of them too

A line a seed, then totals; a seed that fails is printed with its schedule and stops nothing but itself.
"""

from collections import Counter
from collections.abc import Generator, Iterable, Sequence
import contextlib
from pathlib import Path
import random
import shutil
import sys
import tempfile
import time
from typing import NamedTuple

from absl import flags

from tests import entry
from tests.faults.harness import Child, Reference, only_one
from tests.faults.schedule_checks import (
    Layout,
    Ledger,
    Undisturbed,
    check_code,
    check_gone,
    check_start,
    drafts,
    newest_whole,
)
from tests.faults.schedule_faults import (
    DAMAGES,
    ENDINGS,
    OF_ONE,
    START_SECONDS,
    Fault,
    damage,
    disk,
    disturb,
    first_step,
)

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
HEARTBEAT = 10  # seconds
SEED_SECONDS = 3600.0  # for each process, on the same machine
GONE_SECONDS = 30.0


def schedule(seed: int, processes: int = 1) -> list[Fault]:
    rng = random.Random(seed)
    endings = rng.sample(ENDINGS if processes == 1 else (*ENDINGS, *OF_ONE), 6)
    steps = sorted(rng.sample(range(3, STEPS - 10), len(endings)))
    return [
        Fault(ending, step, rng.choice(DAMAGES) if rng.random() < 0.35 else None)
        for ending, step in zip(endings, steps, strict=True)
    ]


def layouts_of(seed: int, layouts: Sequence[Layout], starts: int) -> list[Layout]:
    """Of each start: another one than before, if there is any."""
    rng, found = random.Random(f"layouts of {seed}"), []
    for _ in range(starts):
        others = [one for one in layouts if one not in found[-1:]]
        found.append(rng.choice(others or list(layouts)))
    return found


class Oracle(NamedTuple):
    """A run that nothing disturbed, on the first of the layouts that others may have."""

    reference: Reference
    layouts: list[Layout]
    undisturbed: Undisturbed

    @classmethod
    def make(cls, folder: Path, layouts: Sequence[Layout]) -> "Oracle":
        entry.tiny_text(folder)
        reference, first = Reference(folder), layouts[0]
        with start(reference, first, folder / "run") as child:
            ended = child.finish(first.processes * SEED_SECONDS)
        assert ended.code == 0, ended.text
        found = Undisturbed.of(first, folder / "run", child.lines)
        assert list(found.bits) == list(found.rows) == list(range(1, STEPS + 1))
        assert len({str(rows) for rows in found.rows.values()}) == STEPS, "steps have the same rows"
        assert {len(rows) for rows in found.rows.values()} == {BATCH}
        return cls(reference, list(layouts), found)


def start(reference: Reference, layout: Layout, workdir: Path) -> Child:
    given = [*RUN, *layout.flags]
    how = {"faults": [PACE, "tell"], "variables": {"XLA_FLAGS": QUICK}}
    if layout.processes == 1:
        return reference.train(workdir, *given, **how)
    return reference.launch(workdir, *given, devices=layout.devices, heartbeat=HEARTBEAT, **how)


class Told(NamedTuple):
    """What a seed came to."""

    faults: Counter
    restarts: int
    quarantined: int
    executed: int
    widest: float  # relative difference of a loss from the undisturbed run's
    start_seconds: list[float]  # each to its first step
    seconds: float


def run_seed(oracle: Oracle, seed: int, workdir: Path) -> Told:
    """Raises AssertionError where an invariant does not hold."""
    processes = oracle.layouts[0].processes
    faults, rng = schedule(seed, processes), random.Random(seed)
    layouts = layouts_of(seed, oracle.layouts, len(faults) + 1)
    began, done, steps, waits = time.monotonic(), Counter(), 0, []
    damaged: set[int | None] = set()
    ledger = Ledger(oracle.undisturbed)
    with disk(workdir, needed=any(fault.ending == "full" for fault in faults)) as fill:
        for fault, layout in zip([*faults, None], layouts, strict=True):
            before, torn = newest_whole(workdir), drafts(workdir)
            with start(oracle.reference, layout, workdir) as child:
                resumed = first_step(child) - 1
                waits.append(time.monotonic() - child.started)
                check_start(workdir, resumed, before, torn)
                met = fault is not None and disturb(child, fault, fill, rng)
                ended = child.finish(START_SECONDS)
            fill(False)
            check_gone(workdir, GONE_SECONDS)
            check_code(fault.ending if met and fault else None, ended.code, ended.text)
            steps += ledger.add(layout, workdir, resumed, child.lines, ended.code)
            done.update([fault.ending] if met and fault else [])
            if ended.code == 0:
                break
            if fault is not None and fault.damage:
                step = damage(workdir, fault.damage, rng)
                done.update([] if step is None else [fault.damage])
                damaged.add(step)
        ledger.check_end(workdir, damaged, BATCH)
        quarantined = len(list(workdir.glob("quarantine/*")))
    seconds = time.monotonic() - began
    assert seconds < processes * SEED_SECONDS
    return Told(done, len(waits) - 1, quarantined, steps, ledger.widest, waits, seconds)


# ---- command line


def seeds_of(text: str) -> list[int]:
    parts = (part.partition("-") for part in text.split(","))
    return [n for first, _, last in parts for n in range(int(first), int(last or first) + 1)]


def line_of(told: Told) -> str:
    kinds = ", ".join(f"{kind} {n}" for kind, n in sorted(told.faults.items()))
    starts = sorted(told.start_seconds)
    widest = f", losses within {told.widest:.1e}" if told.widest else ", losses equal"
    return (
        f"{kinds}; {told.restarts} restarts (first step after {starts[len(starts) // 2]:.1f} s), "
        f"{told.quarantined} quarantined, {told.executed} steps executed{widest}, "
        f"{told.seconds:.0f} s: all invariants hold"
    )


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@contextlib.contextmanager
def alone(processes: int) -> Generator[None]:
    """Two runs of two processes at once on two cores would wait beyond the patience of gloo."""
    lock = only_one(Path(tempfile.gettempdir()) / "moe-two-processes.lock")
    with lock if processes > 1 else contextlib.nullcontext():
        yield


def main(seeds: Iterable[int], layouts: Sequence[Layout], folder: Path) -> int:
    began, processes = time.monotonic(), layouts[0].processes
    with alone(processes):
        oracle = Oracle.make(folder, layouts)
    say(f"undisturbed: {STEPS} steps on {layouts[0]}, {time.monotonic() - began:.0f} s")
    total, restarts, quarantined, failed = Counter(), 0, 0, []
    for seed in seeds:
        workdir = folder / f"seed-{seed}"
        try:
            with alone(processes):
                told = run_seed(oracle, seed, workdir)
        except AssertionError as error:
            failed.append(seed)
            say(f"seed {seed} FAILED: {error}\nschedule: {schedule(seed, processes)}")
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
    flags.DEFINE_list(
        "devices", ["1"], "Virtual devices; of several each start gets another.", flag_values=values
    )
    flags.DEFINE_integer(
        "processes",
        1,
        "That share the devices: 1 or 2.",
        lower_bound=1,
        upper_bound=2,
        flag_values=values,
    )
    values(sys.argv)
    chosen = [Layout(int(devices), values.processes) for devices in values.devices]
    with tempfile.TemporaryDirectory(prefix="schedule-") as scratch:
        sys.exit(main(seeds_of(values.seeds), chosen, Path(scratch)))
