"""A random schedule of faults over one run; `python3 -m tests.faults.schedule` runs many."""

import random
import shutil
import subprocess
import sys
import time

import pytest

from tests.faults import schedule
from tests.faults.schedule import DAMAGES, ENDINGS, Oracle


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_every_invariant_survives_a_schedule_of_faults(tmp_path):
    oracle = Oracle.make(tmp_path, devices=1)
    told = schedule.run_seed(oracle, 0, tmp_path / "seed-0")
    assert told.faults.total() >= 4
    assert told.restarts >= 4


def test_a_seed_is_a_schedule_and_twenty_have_every_fault():
    schedules = [schedule.schedule(seed) for seed in range(20)]
    assert schedules == [schedule.schedule(seed) for seed in range(20)]
    assert {fault.ending for one in schedules for fault in one} == set(ENDINGS)
    assert {fault.damage for one in schedules for fault in one} == {None, *DAMAGES}


def test_what_breaks_an_invariant_is_seen(reference, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(reference.workdir, workdir)
    oracle = Oracle(reference, [], reference.bits)
    assert schedule.check_losses(oracle, workdir, 10) == 30
    other = oracle._replace(bits={**oracle.bits, 17: oracle.bits[18]})
    with pytest.raises(AssertionError, match=r"losses of steps \[17\] after step 10"):
        schedule.check_losses(other, workdir, 10)

    torn = workdir / "checkpoints" / "50.orbax-checkpoint-tmp"
    torn.mkdir()
    before = schedule.drafts(workdir)
    with pytest.raises(AssertionError, match="left of before"):
        schedule.check_start(workdir, 40, 40, before)
    torn.rmdir()
    schedule.check_start(workdir, 40, 40, before)
    with pytest.raises(AssertionError, match="started from 30, and 40 was whole"):
        schedule.check_start(workdir, 30, schedule.newest_whole(workdir), {})

    with pytest.raises(AssertionError, match="ended with -9"):
        schedule.check_code("term", -9, "")
    with subprocess.Popen(
        [sys.executable, "-c", "input()", f"--workdir={workdir}"], stdin=-1
    ) as one:
        end = time.monotonic() + 60
        while schedule.processes_of(workdir) != [one.pid]:  # its command line comes with `exec`
            assert time.monotonic() < end


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_done_to_the_newest_while_another_is_good(kind, reference, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(reference.workdir, workdir)
    rng = random.Random(7)
    assert schedule.newest_whole(workdir) == 40
    assert schedule.damage(workdir, kind, rng) == 40
    assert schedule.newest_whole(workdir) == 30
    for step in (10, 20):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    shutil.rmtree(workdir / "checkpoints" / "40")
    assert schedule.damage(workdir, kind, rng) is None
    assert schedule.newest_whole(workdir) == 30
