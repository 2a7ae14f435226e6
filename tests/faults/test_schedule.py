"""A random schedule of faults over one run; `python3 -m tests.faults.schedule` runs many."""

import itertools
import json
import random
import shutil
import subprocess
import sys
import time

import pytest

from tests.faults import schedule
from tests.faults.schedule import Oracle, layouts_of
from tests.faults.schedule_checks import (
    Layout,
    Ledger,
    Undisturbed,
    check_code,
    check_gone,
    check_start,
    drafts,
    newest_whole,
    processes_of,
)
from tests.faults.schedule_faults import DAMAGES, ENDINGS, OF_ONE, damage

LAYOUTS = {
    "one device": [Layout(1)],
    "other devices": [Layout(8), Layout(4), Layout(1)],
    "two processes": [Layout(8, 2)],
}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("layouts", LAYOUTS.values(), ids=LAYOUTS)
def test_every_invariant_survives_a_schedule_of_faults(layouts, tmp_path):
    with schedule.alone(layouts[0].processes):
        oracle = Oracle.make(tmp_path, layouts)
        told = schedule.run_seed(oracle, 0, tmp_path / "seed-0")
    assert told.faults.total() >= 4
    assert told.restarts >= 4


@pytest.mark.parametrize(("processes", "endings"), [(1, ENDINGS), (2, (*ENDINGS, *OF_ONE))])
def test_a_seed_is_a_schedule_and_twenty_have_every_fault(processes, endings):
    schedules = [schedule.schedule(seed, processes) for seed in range(20)]
    assert schedules == [schedule.schedule(seed, processes) for seed in range(20)]
    assert {fault.ending for one in schedules for fault in one} == set(endings)
    assert {fault.damage for one in schedules for fault in one} == {None, *DAMAGES}


def test_every_start_has_other_devices():
    three = LAYOUTS["other devices"]
    found = layouts_of(3, three, 50)
    assert set(found) == set(three)
    assert all(one != another for one, another in itertools.pairwise(found))
    assert layouts_of(3, three[:1], 4) == three[:1] * 4


@pytest.fixture
def workdir(reference, tmp_path):
    shutil.copytree(reference.workdir, tmp_path / "run")
    return tmp_path / "run"


def lines_of(processes: int = 1, **changed: str) -> list[str]:
    """What the processes of a run of 40 steps say of it; `rows_5="..."` for others."""
    lines = []
    for process in range(processes):
        prefix = f"[{process}] " if process else ""
        for step in range(1, 41):
            rows = f"{process}:{process:04x}{step:04x}"
            lines.append(f"{prefix}ROWS {step} {changed.get(f'rows_{step}', rows)}\n")
        for step in (10, 20, 30, 40):
            state = changed.get(f"saved_{step}_{process}", f"{step:016x}")
            lines.append(f"{prefix}STATE saved {step} {state}\n")
    return lines


EIGHT, FOUR = Layout(8), Layout(4)
LOADED = f"STATE loaded 30 {30:016x}\n"


def test_what_breaks_the_same_losses_is_seen(workdir):
    lines = lines_of()
    undisturbed = Undisturbed.of(EIGHT, workdir, lines)
    ledger = Ledger(undisturbed)
    assert ledger.add(EIGHT, workdir, 0, lines, 0) == 40
    assert ledger.add(EIGHT, workdir, 30, [*lines, LOADED], 0) == 10
    assert ledger.widest == 0
    ledger.check_end(workdir, set(), 8)

    other = undisturbed._replace(bits={**undisturbed.bits, 17: undisturbed.bits[18]})
    with pytest.raises(AssertionError, match=r"losses of steps \[17\] after step 0 are others"):
        Ledger(other).add(EIGHT, workdir, 0, lines, 0)
    with pytest.raises(AssertionError):
        Ledger(other).check_end(workdir, set(), 8)
    elsewhere = Ledger(other)
    elsewhere.add(FOUR, workdir, 0, lines, 0)  # as near as sums in another order
    far = undisturbed._replace(losses={**undisturbed.losses, 17: 1.01 * undisturbed.losses[17]})
    with pytest.raises(AssertionError, match="the loss of step 17 is 9"):
        Ledger(far).add(FOUR, workdir, 0, lines, 0)

    records = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (place,) = (i for i, line in enumerate(records) if '"step": 35' in line and '"train"' in line)
    record = json.loads(records[place])
    record["loss/total"] *= 1 + 1e-6
    records[place] = json.dumps(record) + "\n"
    (workdir / "metrics.jsonl").write_text("".join(records))
    with pytest.raises(AssertionError, match=r"losses of steps \[35\] after step 30"):
        elsewhere.add(FOUR, workdir, 30, [*lines, LOADED], 0)  # again, on the same devices
    elsewhere.add(Layout(2), workdir, 30, [*lines, LOADED], 0)
    assert 0 < elsewhere.widest < 2e-6


def test_what_breaks_the_rows_or_the_state_is_seen(workdir):
    lines, two = lines_of(2), Layout(8, 2)
    undisturbed = Undisturbed.of(two, workdir, lines)

    def add(lines: list[str], code: int = 0, resumed: int = 0) -> int:
        ledger = Ledger(undisturbed)
        ledger.add(two, workdir, 0, lines_of(2), 0)
        return ledger.add(two, workdir, resumed, lines, code)

    assert add(lines) == 40
    assert add([LOADED, f"[1] {LOADED}", *lines], resumed=30) == 10
    with pytest.raises(AssertionError, match=r"steps \[5\] had other rows"):
        add(lines_of(2, rows_5="0:00000006"), -9)
    assert add(lines[:20], -9) == 40  # what it did not come to say
    with pytest.raises(AssertionError, match=r"steps \[1, 2, 3, .* had other rows"):
        add([line for line in lines if "[1] ROWS" not in line])
    with pytest.raises(AssertionError, match="processes saved different states at 20"):
        add(lines_of(2, saved_20_1="ff"))
    with pytest.raises(AssertionError, match="1 processes saved step 20"):
        add([line for line in lines if not line.startswith("[1] STATE saved 20")])
    for loaded in ([], ["STATE loaded 30 ff\n"], [LOADED, "[1] STATE loaded 20 ff\n"]):
        with pytest.raises(AssertionError, match="and step 30 was saved as"):
            add([*loaded, *lines], resumed=30)


def test_what_breaks_a_start_is_seen(workdir):
    torn = workdir / "checkpoints" / "50.orbax-checkpoint-tmp"
    torn.mkdir()
    before = drafts(workdir)
    with pytest.raises(AssertionError, match="left of before"):
        check_start(workdir, 40, 40, before)
    torn.rmdir()
    check_start(workdir, 40, 40, before)
    with pytest.raises(AssertionError, match="started from 30, and 40 was whole"):
        check_start(workdir, 30, newest_whole(workdir), {})

    for ending, code in (("term", -9), ("kill_one_saving", 134), ("stop_one", 137), (None, 75)):
        with pytest.raises(AssertionError, match=f"{ending}: ended with {code}"):
            check_code(ending, code, "")
    with subprocess.Popen(
        [sys.executable, "-c", "input()", f"--workdir={workdir}"], stdin=-1
    ) as one:
        end = time.monotonic() + 60
        while processes_of(workdir) != [one.pid]:  # its command line comes with `exec`
            assert time.monotonic() < end
        with pytest.raises(AssertionError, match=f"processes .{one.pid}. are still there"):
            check_gone(workdir, 0.0)
    check_gone(workdir, 0.0)


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_done_to_the_newest_while_another_is_good(kind, workdir):
    rng = random.Random(7)
    assert newest_whole(workdir) == 40
    assert damage(workdir, kind, rng) == 40
    assert newest_whole(workdir) == 30
    for step in (10, 20):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    shutil.rmtree(workdir / "checkpoints" / "40")
    assert damage(workdir, kind, rng) is None
    assert newest_whole(workdir) == 30
