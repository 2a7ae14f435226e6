"""Sweeps of real runs: a killed worker's trial goes on from its checkpoint and ends as if nothing had been."""

from collections.abc import Generator
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys

import pytest

from moe.training import history
from tests import entry
from tests.faults import harness, postgres
from tests.faults.test_sweeps import command_line, descendants, wait_for
from tests.sweep.common import BASE, ROOT, write_sweep

STEPS, EVERY = 80, 10
CHOICES = (2, 3)  # values of router.k, a point each
HEARTBEAT = 1.0
SETTINGS = {
    "steps": STEPS,
    "log_every": 1,
    "checkpoint.every": EVERY,
    "evaluation.every": STEPS,
    "evaluation.batches": 2,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 2,
    "model.dropout": 0.1,
}


def write_file(folder: Path) -> str:
    """The sweep: a model and a text that are tiny."""
    entry.tiny_text(folder)
    flags = [*entry.MODEL_FLAGS, *entry.data_flags(folder)]
    given = dict(flag.removeprefix("--config.").split("=", 1) for flag in flags) | SETTINGS
    del given["router.k"]
    space = {"router.k": {"values": list(CHOICES)}}
    return write_sweep(folder / "sweep.py", base=BASE, overrides=given, space=space)


def start(path: str, work: Path, *flags: str) -> "subprocess.Popen[str]":
    """`scripts/sweep.py` as it is, with `train.py`."""
    return subprocess.Popen(
        [sys.executable, "scripts/sweep.py", f"--config={path}", f"--workdir={work}", *flags],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
    )


def finish(sweep: "subprocess.Popen[str]") -> None:
    text, _ = sweep.communicate(timeout=4 * harness.PATIENCE)
    assert sweep.returncode == 0, text


def run_of(work: Path, trial: int) -> Path:
    return work / "trials" / str(trial) / "seed-0"


def saved(run: Path) -> int:
    """The newest checkpoint, 0 before the first."""
    return max((int(p.name) for p in run.glob("checkpoints/*") if p.name.isdigit()), default=0)


pytestmark = [pytest.mark.slow, pytest.mark.timeout(8 * harness.PATIENCE)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The workdir of a sweep with one worker; the sweep file is beside it."""
    work = tmp_path_factory.mktemp("undisturbed") / "alone"
    with start(write_file(work.parent), work) as sweep:
        finish(sweep)
    table = (work / "results.csv").read_text()
    assert table.count("complete") == len(CHOICES), table
    return work


@pytest.fixture(params=["sqlite", "postgres"])
def storage(request) -> Generator[list[str]]:
    """Flags of the sweep: of the file in the workdir, and of a server."""
    if request.param == "sqlite":
        yield []
        return
    with postgres.postgres() as server:
        yield [f"--storage={server.storage}"]


def training(sweep: "subprocess.Popen[str]") -> tuple[int, int, int] | None:
    """Trial, worker and trainer of a run that has begun."""
    below = descendants(sweep.pid)
    for trainer in below:
        words = command_line(trainer).split(b"\0")
        for trial in range(len(CHOICES)):
            if any(
                w.endswith(f"/trials/{trial}/seed-0".encode()) for w in words if w[:3] == b"--w"
            ):
                workers = (p for p in below if b"moe.sweep.worker" in command_line(p))
                return trial, next(p for p in workers if trainer in descendants(p)), trainer
    return None


def kill_a_worker(sweep: "subprocess.Popen[str]", work: Path) -> int:
    """Kills a worker whose trial has a checkpoint and is not done; returns the trial."""
    trial, worker, trainer = wait_for(lambda: training(sweep), harness.PATIENCE)
    wait_for(lambda: saved(run_of(work, trial)), harness.PATIENCE)
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: not command_line(trainer), harness.PATIENCE)
    assert EVERY <= saved(run_of(work, trial)) < STEPS, "killed amid the run"
    return trial


def test_sweep_of_real_runs_a_killed_worker_s_trial_ends_as_if_undisturbed(
    tmp_path, undisturbed, storage
):
    work = tmp_path / "shared"
    path = str(undisturbed.with_name("sweep.py"))
    with start(path, work, "--workers=2", f"--heartbeat={HEARTBEAT}", *storage) as sweep:
        killed = kill_a_worker(sweep, work)
        finish(sweep)
    for trial in range(len(CHOICES)):
        run, expected = run_of(work, trial), run_of(undisturbed, trial)
        starts = [e["step"] for e in history.read(run) if e["event"] == "start"]
        if trial == killed:
            assert len(starts) == 2
            assert starts[0] == 0
            assert EVERY <= starts[1] < STEPS, "it went on from a checkpoint"
        else:
            assert starts == [0]
        assert harness.bits(run) == harness.bits(expected)
        assert harness.digest(run, STEPS) == harness.digest(expected, STEPS)
    # The tables have the same numbers in full; with two workers a trial keeps its number.
    assert (work / "results.csv").read_text() == (undisturbed / "results.csv").read_text()
    shutil.rmtree(work)
