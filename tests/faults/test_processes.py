"""Runs of two processes under the launcher: one is asked to stop, killed, stopped; then two become one."""

from collections.abc import Generator
import json
import os
from pathlib import Path
import shutil
import signal
import tempfile
import time

import numpy as np
import pytest

from tests.faults.harness import (
    Child,
    Reference,
    bits,
    digest,
    only_one,
    process_ids,
    steps_saved,
)

HEARTBEAT = 10  # seconds
LIMIT = HEARTBEAT + 5 + 15  # the last are for a machine where ten others work
PATIENCE = 900.0  # seconds for what takes half a minute on a quiet machine
STEPS = 20  # of these runs: a checkpoint in the middle and one at the end

pytestmark = pytest.mark.timeout(3 * PATIENCE)


@pytest.fixture(autouse=True)
def alone() -> Generator[None]:
    """Two runs of two processes at once on two cores would wait for each other beyond gloo's patience."""
    with only_one(Path(tempfile.gettempdir()) / "moe-two-processes.lock"):
        yield


def launch(
    reference: Reference,
    workdir: Path,
    *flags: str,
    restarts: int = 0,
    faults: tuple[str, ...] = (),
) -> Child:
    """R as two processes of four devices."""
    given = [f"--config.steps={STEPS}", *flags]
    return reference.launch(workdir, *given, heartbeat=HEARTBEAT, restarts=restarts, faults=faults)


def assert_gone(ids: dict[int, int]) -> None:
    assert not [pid for pid in ids.values() if Path(f"/proc/{pid}").exists()]


@pytest.fixture(scope="module")
def pair(reference, tmp_path_factory) -> Path:
    """The workdir of a run of two processes that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("pair") / "run"
    with launch(reference, workdir) as child:
        ended = child.finish(PATIENCE)
    assert ended.code == 0, ended.text
    return workdir


def finish(child: Child, code: int = 0) -> str:
    with child:
        ended = child.finish(PATIENCE)
    assert ended.code == code, ended.text
    return ended.text


def losses(workdir: Path) -> np.ndarray:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return np.asarray([line["loss/total"] for line in lines if line["split"] == "train"])


@pytest.mark.slow
@pytest.mark.parametrize("role", [0, 1])
def test_row_02_sigterm_to_one_of_two_processes(role, reference, pair, tmp_path):
    workdir = tmp_path / "run"
    with launch(reference, workdir) as child:
        child.wait_for("step 5/", PATIENCE)
        ids = process_ids(child.pid)
        os.kill(ids[role], signal.SIGTERM)
        ended = child.finish(PATIENCE)
    assert ended.code == 75, ended.text  # of both: any other code would win
    saving = [line for line in ended.text.splitlines() if "SAVING" in line]
    (step,) = {int(line.split()[-1]) for line in saving}
    assert len(saving) == 2
    assert 5 <= step < STEPS
    assert steps_saved(workdir) == [step]
    assert_gone(ids)
    finish(launch(reference, workdir))
    assert bits(workdir) == bits(pair)
    assert digest(workdir, STEPS) == digest(pair, STEPS)


@pytest.mark.parametrize("role", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_row_04_sigkill_of_one_of_two_processes(role, reference, tmp_path):
    """The launcher starts both again; a copy of what process 0 left goes on as one process."""
    workdir, single = tmp_path / "run", tmp_path / "single"
    with launch(reference, workdir, restarts=1) as child:
        child.wait_for("step 13/", PATIENCE)
        ids = process_ids(child.pid)
        os.kill(ids[role], signal.SIGKILL)
        killed = time.monotonic()
        child.wait_for(
            f"launch: process {role} was ended by SIGKILL: start 1 of 1 again, from step"
        )
        assert time.monotonic() - killed < LIMIT
        assert_gone(ids)
        before = bits(workdir)
        if role == 0:
            shutil.copytree(workdir, single)
        ended = child.finish(PATIENCE)
    assert ended.code == 0, ended.text
    assert steps_saved(workdir) == [10, STEPS]
    after = bits(workdir)
    assert {step: after[step] for step in before} == before  # the steps done twice, too
    assert max(before) >= 13
    if role == 0:
        finish(reference.train(single, f"--config.steps={STEPS}"))
    for one in (workdir, single)[: 2 - role]:
        np.testing.assert_allclose(losses(one), losses(reference.workdir)[:STEPS], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("role", [0, 1])
def test_row_05_one_of_two_processes_hangs(role, reference, tmp_path):
    with launch(reference, tmp_path / "run") as child:
        child.wait_for("step 5/", PATIENCE)
        ids = process_ids(child.pid)
        os.kill(ids[role], signal.SIGSTOP)
        stopped = time.monotonic()
        ended = child.finish(PATIENCE)
    assert time.monotonic() - stopped < LIMIT + HEARTBEAT  # to be missed, then to be killed
    assert ended.code == 128 + signal.SIGABRT, ended.text
    assert f"launch: process {role} has outlived the others: killed" in ended.text
    assert_gone(ids)


@pytest.mark.slow
def test_row_11_and_21_two_processes_become_one_and_one_becomes_two(reference, pair, tmp_path):
    """Equal state at load (its digests are checked then), the same rows in the same order."""
    one, two = tmp_path / "one", tmp_path / "two"
    finish(launch(reference, one, "--config.steps=10"))
    assert digest(one, 10) == digest(pair, 10)
    finish(reference.train(one, f"--config.steps={STEPS}"))
    reference.until(10, two)
    finish(launch(reference, two))
    for workdir in (one, two):
        np.testing.assert_allclose(losses(workdir)[:STEPS], losses(pair), rtol=1e-5)
    # Rows in any other order would show: no two steps are so near to each other.
    values = np.sort(losses(pair)[10:])
    assert np.diff(values).min() > 3e-5 * values.max()
