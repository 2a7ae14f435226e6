import csv
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

import optuna
import pytest

from moe.errors import ConfigError
from moe.sweep import study as study_lib
from moe.sweep.load import load_sweep
from moe.sweep.run import run_sweep
from moe.sweep.table import to_csv
from moe.training.recording import read_records
from tests.sweep.common import COMMAND, ROOT, events, write_sweep

PATIENCE = 180  # seconds for what takes a few on a quiet machine

# The sweep as a process of its own, so that it can be killed.
PROGRAM = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from moe.sweep.run import run_sweep
from moe.sweep.space import Sweep

sweep = Sweep.from_json(sys.argv[1])
workers = int(sys.argv[3])
outcome = run_sweep(sweep, sys.argv[2], command={COMMAND!r}, workers=workers, poll=0.05)
sys.exit(outcome.exit_code)
"""


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(path, workdir, **options):
    lines = []
    outcome = run_sweep(
        load_sweep(path), workdir, command=COMMAND, announce=lines.append, poll=0.05, **options
    )
    return outcome, lines


def start(tmp_path, path, workdir, workers=2):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    return subprocess.Popen(
        [sys.executable, program, load_sweep(path).to_json(), workdir, str(workers)],
        start_new_session=True,
    )


def wait_for(condition, seconds=PATIENCE):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def read_table(workdir: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((workdir / "results.csv").read_text().splitlines()))


def finished_runs(workdir: Path) -> list[str]:
    return [str(Path(e["run"]).relative_to(workdir / "trials")) for e in events(workdir, "finish")]


def has_half_done_run(workdir: Path) -> bool:
    begun = {event["run"] for event in events(workdir, "step") if event["step"] >= 20}
    return bool(begun - {event["run"] for event in events(workdir, "finish")})


def test_grid_with_failures_runs_to_its_table(tmp_path):
    modes = ["text", "fail", "nan", "preempted", "crash", "stuck"]
    space = {"data.text_feature": {"values": modes}, "router.k": {"values": [4]}}
    path = write_sweep(tmp_path / "sweep.py", space=space, seeds=[0, 3])
    outcome, lines = run(path, tmp_path / "work", workers=2)
    assert outcome.exit_code == 0
    rows = {row.params["data.text_feature"]: row for row in outcome.rows}
    assert set(rows) == set(modes)
    for mode in ("text", "preempted"):
        assert rows[mode].state == "complete"
        assert rows[mode].seeds == {0: pytest.approx(0.425), 3: pytest.approx(0.428)}
        assert rows[mode].curves[0][0] == [10, pytest.approx(0.5)]
    errors = {mode: rows[mode].note for mode in ("fail", "nan", "crash", "stuck")}
    assert "exit code 2" in errors["fail"]
    assert "router.k=9 is above" in errors["fail"]
    assert errors["nan"] == "diverged: bits_per_byte is nan at step 40."
    assert "SIGKILL" in errors["crash"]
    assert "started again 2 times without getting further: exit code 75" in errors["stuck"]
    starts = events(tmp_path / "work", "start")
    assert f"--config.data.text_feature={modes[0]}" in starts[0]["argv"]
    assert {"--config.router.k=4", "--config.steps=40", "--config.seed=0"} <= set(starts[0]["argv"])
    assert len(lines) == len(modes)
    table = read_table(tmp_path / "work")
    assert [row["state"] for row in table] == ["complete"] * 2 + ["failed"] * 4
    page = (tmp_path / "work" / "report.html").read_text()
    assert "router.k=9 is above" in page
    assert "<h2>Parameters</h2>" in page

    # The same command again changes nothing and runs nothing.
    sweep = load_sweep(path)
    before = events(tmp_path / "work", "start")
    kept = tmp_path / "kept.csv"
    kept.hardlink_to(tmp_path / "work" / "results.csv")
    again, lines = run(path, tmp_path / "work")
    assert to_csv(again.rows, sweep) == to_csv(outcome.rows, sweep)
    assert events(tmp_path / "work", "start") == before
    assert lines == ["continuing: 6 of 6 points are done"]
    assert not kept.samefile(tmp_path / "work" / "results.csv"), "never half written"


def test_killed_sweep_goes_on_where_it_was(tmp_path):
    work = tmp_path / "work"
    path = write_sweep(
        tmp_path / "sweep.py",
        overrides={"steps": 60, "optimizer.learning_rate": 0.15},
        space={"router.k": {"values": [1, 2, 3]}},
        seeds=[0, 1],
    )
    sweep = start(tmp_path, path, work)
    wait_for(lambda: (work / "log.jsonl").exists() and len(finished_runs(work)) >= 1)
    wait_for(lambda: has_half_done_run(work))
    os.killpg(sweep.pid, signal.SIGKILL)
    sweep.wait()
    assert len(finished_runs(work)) < 6

    again = start(tmp_path, path, work)
    assert again.wait(PATIENCE) == 0
    assert any(event["resumed"] for event in events(work, "start"))
    for trial in range(3):
        for seed in range(2):
            path = work / "trials" / str(trial) / f"seed-{seed}"
            records = read_records(path)
            # Every step once: nothing is missing, and nothing that was logged was done again.
            assert [r["step"] for r in records if r["split"] == "valid"] == list(range(10, 61, 10))
    runs = [path for path in work.glob("trials/*/seed-*") if path.is_dir()]
    assert len(runs) == 6
    table = read_table(work)
    assert [row["router.k"] for row in table] == ["1", "2", "3"]
    assert {row["state"] for row in table} == {"complete"}
    assert {row["n"] for row in table} == {"2"}


def test_stopped_sweep_saves_and_exits_75(tmp_path):
    work = tmp_path / "work"
    path = write_sweep(
        tmp_path / "sweep.py", overrides={"steps": 60, "optimizer.learning_rate": 0.15}
    )
    sweep = start(tmp_path, path, work, workers=1)
    wait_for(lambda: (work / "log.jsonl").exists() and events(work, "step"))
    sweep.send_signal(signal.SIGTERM)
    assert sweep.wait(PATIENCE) == 75
    assert finished_runs(work) == []
    assert (work / "results.csv").exists()
    outcome, _ = run(path, work)
    assert outcome.exit_code == 0
    assert sorted(finished_runs(work)) == ["0/seed-0", "1/seed-0"]


def test_a_trainer_that_outlives_its_worker_is_not_doubled(tmp_path):
    path = write_sweep(tmp_path / "sweep.py")
    work = tmp_path / "work"
    work.mkdir()
    storage = study_lib.default_storage(work)
    study = study_lib.open_study(load_sweep(path), storage)
    dead = study_lib.Claims(study, work, local=True).next()
    assert dead is not None
    orphan = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(dead.lock,)
    )
    os.close(dead.lock)
    claims = study_lib.Claims(study, work, local=True)
    other = claims.next()
    assert other is not None
    assert other.trial.number == 1
    assert claims.next() is None
    orphan.communicate(b"\n")
    resumed = claims.next()
    assert resumed is not None
    assert resumed.trial.number == 0
    assert resumed.directory == dead.directory
    for claim in (other, resumed):
        os.close(claim.lock)


def test_only_silence_tells_that_another_machine_is_dead(tmp_path, monkeypatch):
    path = write_sweep(tmp_path / "sweep.py", space={"router.k": {"values": [2]}})
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    study = study_lib.open_study(load_sweep(path), storage)
    theirs = study_lib.Claims(study, tmp_path / "there", local=False).next()
    assert theirs is not None
    now = [1000.0]
    monkeypatch.setattr(study_lib.time, "monotonic", lambda: now[0])
    here = study_lib.Claims(study, tmp_path / "here", local=False)
    assert here.next() is None
    silence = study_lib.SILENT_BEATS * study_lib.HEARTBEAT_SECONDS
    now[0] += silence - 1
    assert here.next() is None
    theirs.beat()
    now[0] += 2
    assert here.next() is None, "a sign of life starts the wait anew"
    now[0] += silence + 1
    taken = here.next()
    assert taken is not None
    assert taken.trial.number == theirs.trial.number
    with pytest.raises(study_lib.ClaimLostError):
        theirs.beat()
    for claim in (theirs, taken):
        os.close(claim.lock)


def test_points_enqueued_twice_run_once(tmp_path):
    sweep = load_sweep(write_sweep(tmp_path / "sweep.py"))
    study = study_lib.open_study(sweep, study_lib.default_storage(tmp_path))
    study.enqueue_trial({"router.k": 4}, user_attrs={study_lib.POINT: 1})
    outcome, _ = run(str(tmp_path / "sweep.py"), tmp_path)
    assert [row.trial for row in outcome.rows] == [0, 1]
    assert len(finished_runs(tmp_path)) == 2
    assert [t.state.name for t in study.get_trials()] == ["COMPLETE", "COMPLETE", "FAIL"]


def test_median_pruner_stops_bad_points(tmp_path):
    path = write_sweep(
        tmp_path / "sweep.py",
        overrides={"steps": 200, "optimizer.learning_rate": 0.0},
        space={"router.k": {"values": [1, 2, 3, 4, 5, 8]}},
        seeds=[0, 1],
        pruner="median",
    )
    sweep = load_sweep(path)
    work = tmp_path / "work"
    # Five quick points for the median, then a slow and bad one.
    command = [*COMMAND[:1], _slow_when_k_is_8(tmp_path)]
    outcome = run_sweep(sweep, work, command=command, poll=0.05)
    states = {row.params["router.k"]: row.state for row in outcome.rows}
    assert states == {k: "pruned" if k == 8 else "complete" for k in (1, 2, 3, 4, 5, 8)}
    bad = outcome.rows[-1]
    assert bad.note.startswith("pruned at step")
    assert bad.seeds == {}
    assert f"{bad.trial}/seed-0" not in finished_runs(work)
    assert not (work / "trials" / str(bad.trial) / "seed-1").exists()


def _slow_when_k_is_8(tmp_path: Path) -> str:
    program = tmp_path / "slow.py"
    program.write_text(
        "import os, sys\n"
        "if '--config.router.k=8' in sys.argv:\n"
        "    sys.argv.append('--config.optimizer.learning_rate=0.1')\n"
        f"exec(open({COMMAND[1]!r}).read())\n"
    )
    return str(program)


def test_tpe_makes_exactly_its_trials_and_can_be_made_longer(tmp_path):
    space = {
        "losses.balance": {"low": 1e-3, "high": 1.0, "log": True},
        "router.k": {"low": 1, "high": 4},
    }
    path = tmp_path / "sweep.py"
    overrides = {"steps": 10}
    outcomes = []
    for trials in (2, 4):
        write_sweep(path, space=space, overrides=overrides, sampler="tpe", trials=trials)
        outcomes.append(run(str(path), tmp_path / "work", workers=trials // 2)[0])
    first, longer = ({row.trial: row for row in outcome.rows} for outcome in outcomes)
    assert sorted(longer) == [0, 1, 2, 3]
    assert {n: longer[n] for n in first} == first
    assert len({row.params["losses.balance"] for row in longer.values()}) == 4
    for row in longer.values():
        expected = row.params["router.k"] / 10 + row.params["losses.balance"] + 0.1
        assert row.seeds[0] == pytest.approx(expected)


def test_another_sweep_in_the_same_workdir_is_refused(tmp_path):
    path = write_sweep(tmp_path / "sweep.py")
    study_lib.open_study(load_sweep(path), study_lib.default_storage(tmp_path))
    write_sweep(tmp_path / "sweep.py", seeds=[5])
    with pytest.raises(ConfigError, match=r"seeds=\[0\]"):
        run(path, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "at least 1"),
        ({"storage": "nosuch://user:secret@host/db"}, "nosuch://user@host/db"),
        ({"storage": "not a url"}, "cannot open"),
    ],
)
def test_what_cannot_start_is_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message) as error:
        run(write_sweep(tmp_path / "sweep.py"), tmp_path / "work", **options)
    assert "secret" not in str(error.value)


def test_missing_parent_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no directory"):
        run(write_sweep(tmp_path / "sweep.py"), tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


def test_hyperband_takes_its_brackets_from_the_base_config(tmp_path):
    sweep = load_sweep(write_sweep(tmp_path / "sweep.py", pruner="hyperband"))
    study = study_lib.open_study(sweep, study_lib.default_storage(tmp_path))
    assert isinstance(study.pruner, optuna.pruners.HyperbandPruner)
    assert (sweep.steps, sweep.evaluate_every) == (40, 100)
