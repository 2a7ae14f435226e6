"""Rows of the matrix where a run is asked to stop, hangs, or fails of itself (1, 5, 24, 28)."""

from pathlib import Path
import random
import signal
import sys
import time

import pytest

from moe.errors import EXIT_PREEMPTED, EXIT_STUCK
from tests.faults import harness
from tests.faults.harness import ROOT, STEPS, Child, Ended, Reference, steps_saved

SLOW = 6.0  # times as long as on a quiet machine, which a bound allows


def check_same(reference: Reference, workdir: Path) -> None:
    """Every step and the final state are those of the run that nothing disturbed."""
    assert harness.bits(workdir) == reference.bits
    assert harness.digest(workdir, STEPS) == reference.digest


def go_on(reference: Reference, workdir: Path) -> Ended:
    with reference.train(workdir) as child:
        ended = child.finish()
    assert ended.code == 0, ended.text
    check_same(reference, workdir)
    return ended


def test_row_01_sigterm_at_a_random_step(reference: Reference, tmp_path: Path):
    """The step that runs is finished and saved; started again, the run is the undisturbed one."""
    seed = random.SystemRandom().randrange(1000)
    step = random.Random(seed).randrange(2, STEPS - 5)
    workdir = tmp_path / "run"
    with reference.train(workdir, faults=[f"slow_step@1-{STEPS}:0.1"]) as child:
        child.wait_for(f"step {step}/")
        child.signal(signal.SIGTERM)
        ended = child.finish()
    assert ended.code == EXIT_PREEMPTED, f"seed {seed}: {ended.text}"
    saved = steps_saved(workdir)[-1]
    assert step <= saved < STEPS, f"seed {seed}: {ended.text}"
    assert f"stopped at step {saved}, state saved" in ended.text
    assert max(harness.bits(workdir)) == saved  # not one step more than was saved
    go_on(reference, workdir)


def test_row_01_sigterm_in_the_set_up(reference: Reference, tmp_path: Path):
    """Nothing has been trained: no checkpoint, no message of one, and no empty workdir either."""
    workdir = tmp_path / "run"
    with reference.train(workdir, faults=["slow_set_up@1:600"]) as child:
        child.wait_for("SETTING UP")
        assert workdir.exists()
        began = time.monotonic()
        child.signal(signal.SIGTERM)
        ended = child.finish()
    assert ended.code == EXIT_PREEMPTED, ended.text
    assert time.monotonic() - began < 5 * SLOW
    assert "nothing to save" in ended.text
    assert not workdir.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["sigterm", "ctrl_c"])
@pytest.mark.parametrize("program", ["train.py", "eval.py"])
def test_row_01_signal_while_it_imports(program: str, tmp_path: Path, number: int):
    """In the middle of a long C call of the import of jax: one line, nothing touched."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "jax.py").write_text(
        "import hashlib\n"
        "print('IMPORTING', flush=True)\n"
        "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)\n"
    )
    command = [sys.executable, str(ROOT / program), f"--workdir={tmp_path / 'run'}"]
    with Child(command, {"PYTHONPATH": str(tmp_path / "path")}) as child:
        child.wait_for("IMPORTING")
        began = time.monotonic()
        child.signal(number)
        ended = child.finish()
    assert ended.code == EXIT_PREEMPTED, ended.text
    assert time.monotonic() - began < 2 * SLOW
    assert ended.text == "IMPORTING\n\nStopping: there is nothing to save.\n"
    assert [path.name for path in tmp_path.iterdir()] == ["path"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["sigterm", "ctrl_c"])
@pytest.mark.slow
def test_row_01_signal_while_it_compiles(reference: Reference, tmp_path: Path, number: int):
    """In the middle of a call of minutes: gone in seconds, and nothing half-made is in the way."""
    workdir = tmp_path / "run"
    with reference.train(workdir, faults=["slow_compile@1:100"]) as child:
        child.wait_for("COMPILING")
        time.sleep(0.5)  # into the call
        began = time.monotonic()
        child.signal(number)
        ended = child.finish()
    assert ended.code == EXIT_PREEMPTED, ended.text
    assert time.monotonic() - began < 5 * SLOW
    assert "leaving without clean-up" in ended.text
    go_on(reference, workdir)


@pytest.mark.slow
def test_row_01_sigterm_in_an_evaluation(reference: Reference, tmp_path: Path):
    """Not all its batches are waited for: the state is saved, and the next start evaluates it first."""
    workdir = tmp_path / "run"
    with reference.train(
        workdir, "--config.evaluation.batches=40", faults=["slow_eval@20:2"]
    ) as child:
        child.wait_for("step 20/")
        child.wait_for("EVALUATING")
        began = time.monotonic()
        child.signal(signal.SIGTERM)
        ended = child.finish()
    assert ended.code == EXIT_PREEMPTED, ended.text
    assert time.monotonic() - began < 8 * SLOW
    assert steps_saved(workdir)[-1] == 20
    assert not (workdir / "eval" / "valid-20.json").exists()
    text = go_on(reference, workdir).text
    assert text.index("valid at step 20") < text.index("step 21/")
    assert (workdir / "eval" / "valid-20.json").exists()


@pytest.mark.parametrize("step", [11, 15])
@pytest.mark.slow
def test_row_01_sigterm_while_it_waits_for_data(reference: Reference, tmp_path: Path, step: int):
    """Data that does not come keeps the run neither from hearing nor from leaving.

    At step 11 the state is on disk already, at step 15 it is not.
    """
    workdir = tmp_path / "run"
    with reference.train(workdir, faults=[f"hang_data@{step}"]) as child:
        child.wait_for("WAITING")
        began = time.monotonic()
        child.signal(signal.SIGTERM)
        ended = child.finish()
    assert ended.code == EXIT_PREEMPTED, ended.text
    assert time.monotonic() - began < 5 * SLOW
    assert steps_saved(workdir)[-1] == step - 1
    go_on(reference, workdir)


@pytest.mark.slow
def test_row_01_sigterm_in_a_save(reference: Reference, tmp_path: Path):
    workdir = tmp_path / "run"
    with reference.train(workdir, faults=[f"slow_step@1-{STEPS}:0.05"]) as child:
        child.wait_for("SAVING 20")
        child.signal(signal.SIGTERM)
        ended = child.finish()
    assert ended.code == EXIT_PREEMPTED, ended.text
    assert {10, 20} <= set(steps_saved(workdir))
    assert 20 <= steps_saved(workdir)[-1] < 30
    go_on(reference, workdir)


@pytest.mark.slow
def test_row_05_a_step_that_hangs(reference: Reference, tmp_path: Path):
    """The run ends itself, says where each thread was, and goes on from its last checkpoint."""
    workdir = tmp_path / "run"
    seconds = 10.0
    with reference.train(workdir, f"--stuck_after={seconds}", faults=["sleep@17:600"]) as child:
        child.wait_for("step 16/")
        began = time.monotonic()
        ended = child.finish()
    assert ended.code == EXIT_STUCK, ended.text
    assert seconds < time.monotonic() - began + 1 < seconds + 5 * SLOW
    assert "Thread MainThread:" in ended.text
    assert " in disturb" in ended.text  # where it slept
    assert "Stuck: nothing has moved" in ended.text
    assert "since step 16" in ended.text
    assert steps_saved(workdir) == [10]
    go_on(reference, workdir)


def test_row_24_an_exception_in_the_loop(reference: Reference, tmp_path: Path):
    """The cause is shown, what was being saved is complete, and the process is gone."""
    workdir = tmp_path / "run"
    with reference.train(workdir, faults=["raise@11"]) as child:
        child.wait_for("SAVING 10")  # in the background, when the next step fails
        began = time.monotonic()
        ended = child.finish()
    assert ended.code == 1, ended.text
    assert time.monotonic() - began < 20 * SLOW
    assert ended.text.rstrip().splitlines()[-1] == "RuntimeError: raised on purpose at step 11"
    assert steps_saved(workdir) == [10]
    go_on(reference, workdir)


@pytest.mark.slow
def test_row_28_ctrl_c_once_and_twice(reference: Reference, tmp_path: Path):
    """Once saves the step that runs; twice leaves at once, and the last checkpoint stands."""
    workdir = tmp_path / "run"
    with reference.train(workdir, faults=["slow_step@13:300"]) as child:
        child.wait_for("step 12/")
        child.signal(signal.SIGINT)
        child.wait_for("Stopping: saving after this step.")
        while not steps_saved(workdir) and child.process.poll() is None:
            time.sleep(0.2)  # the save of step 10 goes on in the background
        began = time.monotonic()
        child.signal(signal.SIGINT)
        ended = child.finish()
    assert ended.code == 130, ended.text
    assert time.monotonic() - began < 2 * SLOW
    assert steps_saved(workdir) == [10]
    with reference.train(workdir, faults=[f"slow_step@1-{STEPS}:0.1"]) as child:
        child.wait_for("step 15/")
        child.signal(signal.SIGINT)
        ended = child.finish()
    assert ended.code == EXIT_PREEMPTED, ended.text
    assert 15 <= steps_saved(workdir)[-1] < 30
    go_on(reference, workdir)
