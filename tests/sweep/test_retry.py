"""Failed points that are run again: with their parameters, from their checkpoints, the failure on record."""

import os
from pathlib import Path

from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import TrialState
import pytest

from moe.sweep import attempts, table
from moe.sweep import study as study_lib
from moe.sweep.load import load_sweep
from scripts import sweep as program
from tests.faults.test_sweeps import keep_signal_handlers, work_here  # noqa: F401
from tests.sweep.common import events, write_sweep

BALANCE = {"low": 1e-3, "high": 1.0, "log": True}


def open_again(path: str, workdir: Path):
    return study_lib.open_study(load_sweep(path), study_lib.default_storage(workdir), retry=True)


def starts(workdir: Path) -> list[tuple[str, bool]]:
    """(run, whether it went on) of each start of a trainer."""
    return [
        (str(Path(e["run"]).relative_to(workdir / "trials")), e["resumed"])
        for e in events(workdir, "start")
    ]


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_failed_points_go_on_from_where_they_were_and_stay_on_record(tmp_path):
    work = tmp_path / "work"
    modes = ["text", "exit6_once", "exit1"]
    path = write_sweep(
        tmp_path / "sweep.py", space={"data.text_feature": {"values": modes}}, seeds=[0, 1]
    )
    # The first seed of a point is done before its second one fails.
    for n in (1, 2):
        (work / "trials" / str(n) / "seed-0").mkdir(parents=True)
        (work / "trials" / str(n) / "seed-0" / "ended-once").touch()
    before = work_here(path, work)
    assert [row.state for row in before] == ["complete", "failed", "failed"]
    assert work_here(path, work) == before, "without the flag nothing runs again"

    study = open_again(path, work)
    assert [t.state.name for t in attempts.point_trials(study)] == [
        "COMPLETE",
        "WAITING",
        "WAITING",
    ]
    rows = work_here(path, work)
    assert [(row.trial, row.state) for row in rows] == [
        (0, "complete"),
        (1, "complete"),
        (2, "failed"),
    ]
    assert rows[0] == before[0]
    assert rows[1].params == before[1].params
    assert rows[1].seeds == {0: pytest.approx(0.225), 1: pytest.approx(0.226)}
    assert rows[1].note == f"attempt 1 failed: {before[1].note}"
    assert rows[2].note == f"attempt 1 failed: {before[2].note}\n{before[2].note}"
    assert "exit code 1. Trouble" in before[2].note

    study = open_again(path, work)
    again = work_here(path, work)
    assert again[:2] == rows[:2]
    assert again[2].note.splitlines()[1] == f"attempt 2 failed: {before[2].note}"
    trials = study.get_trials()
    assert [t.state for t in trials] == [TrialState.COMPLETE, *[TrialState.FAIL] * 2,
                                         TrialState.COMPLETE, *[TrialState.FAIL] * 2]  # fmt: skip
    assert all(t.user_attrs[attempts.ERROR] for t in trials if t.state is TrialState.FAIL)
    assert RetryHeartbeatStaleTrialCallback.retry_history(trials[5]) == [2, 4]
    assert RetryHeartbeatStaleTrialCallback.retried_trial_number(trials[5]) == 2


def test_seeds_that_are_done_and_values_of_tpe_are_kept(tmp_path):
    work = tmp_path / "work"
    space = {"losses.balance": BALANCE, "data.text_feature": {"values": ["exit1_once"]}}
    path = write_sweep(tmp_path / "sweep.py", space=space, sampler="tpe", trials=1, seeds=[0, 1])
    done = work / "trials" / "0" / "seed-0" / "ended-once"
    done.parent.mkdir(parents=True)
    done.touch()
    (before,) = work_here(path, work)
    assert (before.state, list(before.seeds)) == ("failed", [0])
    first = open_again(path, work).get_trials()[0]
    (row,) = work_here(path, work)
    assert row.params == before.params
    assert (row.state, list(row.seeds)) == ("complete", [0, 1])
    assert starts(work) == [("0/seed-0", False), ("0/seed-1", False), ("0/seed-1", True)]
    assert events(work, "done already") == [], "the first seed's trainer is not started"
    again = open_again(path, work).get_trials()[1]
    assert again.intermediate_values == first.intermediate_values != {}


def test_two_machines_that_retry_at_once_do_it_once(tmp_path):
    work = tmp_path / "work"
    space = {"data.text_feature": {"values": ["exit1_once"]}}
    path = write_sweep(tmp_path / "sweep.py", space=space)
    work_here(path, work)
    study = open_again(path, work)
    (waiting,) = attempts.point_trials(study)
    study.add_trial(waiting)  # the other machine saw the failure too
    claims = study_lib.Claims(study, work, local=True)
    claim = claims.next()
    assert claim is not None
    assert (claim.trial.number, claim.directory.name) == (1, "0")
    assert claims.next() is None
    # A copy whose worker died before it could put it away is nobody's.
    study.add_trial(waiting)
    study.ask()
    assert claims.next() is None
    os.close(claim.lock)
    taken = claims.next()
    assert taken is not None
    assert (taken.trial.number, taken.directory) == (1, claim.directory)
    os.close(taken.lock)
    work_here(path, work)
    assert [t.state.name for t in study.get_trials()] == ["FAIL", "COMPLETE", "FAIL", "RUNNING"]


def test_the_summary_counts_failures_and_has_the_command():
    row = table.Row(0, "failed", {}, {}, None, {}, "")
    argv = ["scripts/sweep.py", "--workdir=runs/a b", "--retry_failed=true"]
    text = program.failures([row, row._replace(state="complete")], argv)
    assert "1 of 2 points failed" in text
    assert "    python3 scripts/sweep.py '--workdir=runs/a b' --retry_failed\n" in text
    assert program.failures([row._replace(state="complete")], argv) == ""
