"""What one worker decides: whose a trial is, when a trainer is started again, what its lines of metrics say."""

import json
import os
import signal

from optuna.trial import TrialState
import pytest

from moe.errors import RESTARTS_IN_PLACE, STARTED_AGAIN
from moe.sweep import attempts, worker
from moe.sweep import study as study_lib
from moe.sweep.curve import Curve, Pruning
from moe.sweep.load import load_sweep
from moe.sweep.trainer import Restarts
from tests.sweep.common import COMMAND, write_sweep


@pytest.fixture
def sweep(tmp_path):
    return load_sweep(write_sweep(tmp_path / "sweep.py"))


@pytest.fixture
def study(tmp_path, sweep):
    return study_lib.open_study(sweep, study_lib.default_storage(tmp_path))


def line(step: int, value: float, split: str = "valid") -> str:
    return json.dumps({"step": step, "split": split, "bits_per_byte": value}) + "\n"


def test_a_trial_that_ends_while_it_is_claimed_again_stays_ended(tmp_path, study, monkeypatch):
    claims = study_lib.Claims(study, tmp_path, local=True)
    claim = claims.next()
    assert claim is not None
    before = [t for t in attempts.point_trials(study) if t.state is TrialState.RUNNING]
    study.tell(claim.trial, 1.0)
    os.close(claim.lock)
    # The look at the study came before the end, the lock after it.
    monkeypatch.setattr(study_lib, "point_trials", lambda _: before)
    assert claims._abandoned() is None
    monkeypatch.undo()
    following = claims.next()
    assert following is not None
    assert following.trial.number == 1
    os.close(following.lock)


def test_a_result_counts_where_the_trial_is(tmp_path, sweep, study, monkeypatch, capsys):
    claims = study_lib.Claims(study, tmp_path, local=True)
    claim = claims.next()
    assert claim is not None
    job = worker.Job(sweep, tmp_path, study_lib.default_storage(tmp_path), COMMAND)
    result = worker.Result(TrialState.COMPLETE, 1.0)
    monkeypatch.setattr(worker, "run_trial", lambda *_: result)
    theirs = claim._replace(token=study_lib.new_token())  # of before another machine took it over
    worker._run_claim(job, theirs, worker.Stop())
    assert "trial 0 was taken over by another machine" in capsys.readouterr().err
    assert study.get_trials()[0].state is TrialState.RUNNING
    worker._run_claim(job, claim, worker.Stop())
    assert (study.get_trials()[0].state, study.get_trials()[0].value) == (TrialState.COMPLETE, 1.0)
    assert capsys.readouterr().err == ""
    os.close(claim.lock)


@pytest.mark.parametrize("code", sorted(STARTED_AGAIN))
def test_a_trainer_that_gets_on_is_started_again_for_ever(code):
    steps = [10, 20, 20, 30, 30, *[40] * (RESTARTS_IN_PLACE + 1)]
    restarts = Restarts(lambda: steps.pop(0))
    assert all(restarts.again(code) for _ in steps[:-1])
    assert not restarts.again(code)
    assert restarts.text() == f"started again {RESTARTS_IN_PLACE} times without getting further: "


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 6, 130, -signal.SIGINT, -signal.SIGFPE])
def test_a_trainer_whose_end_would_come_again_is_not_started_again(code):
    restarts = Restarts(lambda: 10)
    assert not restarts.again(code)
    assert restarts.text() == ""


def test_a_line_that_is_being_written_and_a_file_that_is_replaced_are_read_whole(tmp_path, sweep):
    path = tmp_path / "metrics.jsonl"
    curve = Curve(path, sweep)
    curve.update()
    assert curve.last() is None
    half = line(20, 0.5)
    path.write_text(line(10, 0.75) + line(10, 9.0, "train") + half[:12])
    curve.update()
    assert curve.points == {10: 0.75}
    with path.open("a") as file:
        file.write(half[12:])
    curve.update()
    assert curve.points == {10: 0.75, 20: 0.5}
    # A run that goes back to a checkpoint writes a shorter file in the place of the old one.
    path.with_suffix(".tmp").write_text(line(10, 0.75))
    path.with_suffix(".tmp").replace(path)
    curve.update()
    assert curve.points == {10: 0.75}


def test_a_run_without_the_metric_is_told_what_there_is(tmp_path, sweep):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 10, "split": "valid", "loss/total": 1.0}) + "\n")
    curve = Curve(path, sweep)
    curve.update()
    result = worker._final(curve, sweep)
    assert result.state is TrialState.FAIL
    assert result.error is not None
    assert result.error.endswith("metrics.jsonl: its lines have loss/total.")


def test_what_was_reported_before_a_kill_is_not_reported_again(study):
    trial = study.ask()
    assert not Pruning(trial).is_hopeless({10: 0.5})
    # Optuna warns of a step that is told twice, which fails here.
    again = Pruning(trial)
    assert not again.is_hopeless({10: 0.5})
    assert not again.is_hopeless({10: 0.5, 20: 0.25})
    assert study.get_trials()[trial.number].intermediate_values == {10: 0.5, 20: 0.25}
