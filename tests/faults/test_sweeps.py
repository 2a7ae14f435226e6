"""Sweeps and comparisons under faults: killed workers and trainers, failing trials, disks, databases."""

from collections.abc import Callable
import io
import json
import os
from pathlib import Path
import shutil
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from moe.errors import CheckpointError, ConfigError, ResourceError
from moe.sweep import storage, table, worker
from moe.sweep import study as study_lib
from moe.sweep.arm_runner import DAMAGED, RESULT, run_arms
from moe.sweep.arms import load_comparison
from moe.sweep.load import load_sweep
from moe.sweep.run import run_sweep
from tests.sweep.common import BASE, COMMAND, FILE, ROOT, events, write_sweep

ARM = [sys.executable, str(ROOT / "tests/sweep/fake_arm.py")]
PATIENCE = 120.0  # seconds for what takes a few on a quiet machine
SECRETS = ("hush", "hush2")

# `scripts/sweep.py` with a trainer that does nothing, as a process of its own, so that it can be killed.
PROGRAM = f"""
from pathlib import Path
from moe import cli
from scripts import sweep
sweep.TRAIN = Path({COMMAND[1]!r})
cli.run(sweep.main)
"""


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MB, which can be filled."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def start(path: str, workdir: Path, *flags: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, f"--config={path}", f"--workdir={workdir}", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
    )


def wait_for(condition: Callable[[], object], seconds: float = PATIENCE):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
    return found


def noted(workdir: Path, kind: str) -> list[dict]:
    return events(workdir, kind) if (workdir / "log.jsonl").exists() else []


def descendants(pid: int) -> set[int]:
    """Process ids below one, whose parents are alive."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            parents[int(path.parent.name)] = int(parent)
    found, new = set(), {pid}
    while new:
        new = {p for p, parent in parents.items() if parent in new}
        found |= new
    return found


def trainers(pid: int) -> list[int]:
    """Of the descendants, those that train."""
    return [p for p in descendants(pid) if b"fake_train.py" in command_line(p)]


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def fill(folder: Path) -> Path:
    path = folder / "filler"
    with path.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        write_until_full(file)
    return path


def write_until_full(file: io.RawIOBase) -> None:
    while True:
        file.write(bytes(4096))


def work_here(path: str, workdir: Path) -> list[table.Row]:
    """A sweep with its one worker in this process; the rows by trial."""
    workdir.mkdir(exist_ok=True)
    sweep, address = load_sweep(path), study_lib.default_storage(workdir)
    study = study_lib.open_study(sweep, address)
    worker.work(worker.Job(sweep, workdir, address, COMMAND, 0.02))
    return sorted(table.rows(study, sweep))


# ---- trials that fail


def test_sweep_every_end_of_a_trainer_is_started_again_or_recorded(tmp_path):
    # Exit code, or signal below 0, of the trainer -> the start of what is recorded, and its starts.
    ends = {
        "text": ("", 1),
        "exit5": ("seed 0: diverged: exit code 5. ", 1),
        "exit6": ("seed 0: out of disk or memory: exit code 6. ", 1),
        "exit70": ("seed 0: started again 2 times without getting further: stuck: exit code 70", 3),
        "exit70_once": ("", 2),
        "exit75_once": ("", 2),
        "exit-9": ("seed 0: started again 2 times without getting further: killed by SIGKILL", 3),
        "exit-9_once": ("", 2),
        "exit1": ("seed 0: exit code 1. ", 1),
    }
    path = write_sweep(tmp_path / "sweep.py", space={"data.text_feature": {"values": [*ends]}})
    rows = {row.params["data.text_feature"]: row for row in work_here(path, tmp_path / "work")}
    starts = [Path(event["run"]).parent.name for event in events(tmp_path / "work", "start")]
    for mode, (note, times) in ends.items():
        assert rows[mode].note.startswith(note), rows[mode].note
        assert rows[mode].state == ("failed" if note else "complete")
        assert starts.count(str(rows[mode].trial)) == times, mode
        if note:
            assert "no room for postgresql://me:***@db/x?password=*** free some." in rows[mode].note
    database = (tmp_path / "work" / "study.db").read_bytes().decode(errors="replace")
    assert not any(secret in database for secret in SECRETS)


def write_arms(tmp_path: Path, **modes: str) -> str:
    path = tmp_path / "arms.py"
    arms = {name: ("", {"data.text_feature": mode}) for name, mode in modes.items()}
    path.write_text(FILE.format(values={"base": BASE, "arms": arms, "seeds": [0, 1]}))
    return str(path)


def compare(tmp_path: Path, path: str, command: list[str] = ARM):
    lines = []
    outcome = run_arms(
        load_comparison(path),
        tmp_path / "out",
        command=command,
        workers=2,
        announce=lines.append,
        poll=0.02,
    )
    return {r.arm.name: r for r in outcome.arms}, outcome.exit_code, lines


def test_comparison_every_end_of_a_trainer_is_started_again_or_recorded(tmp_path):
    modes = {
        "good": "text",
        "killed": "exit-9_once",
        "again": "exit75_once",
        "oom": "exit-9",
        "diverged": "exit5",
        "full": "exit6",
    }
    found, code, lines = compare(tmp_path, write_arms(tmp_path, **modes))
    assert code == 1
    for name in ("good", "killed", "again"):
        assert (sorted(found[name].results), found[name].error) == ([0, 1], ""), name
    assert found["oom"].error.startswith("started again 2 times without getting further: killed by")
    assert found["diverged"].error.startswith("diverged: exit code 5. ")
    assert found["full"].error.startswith("out of disk or memory: exit code 6. ")
    told = json.dumps([[r.error for r in found.values()], lines])
    assert not any(secret in told for secret in SECRETS)
    log = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    again = [e["seeds"] for e in map(json.loads, log) if e["arm"] == "killed"]
    assert again == ["0,1", "1"], "the seed with a result does not run again"


@pytest.mark.parametrize(
    "damage",
    ['{"seed": 0, "sett', "", "null", '{"seed": 1, "settings": {}, "metrics": {"loss": 1}}'],
)
def test_comparison_damaged_result_is_named_and_made_again(tmp_path, damage):
    path = write_arms(tmp_path, good="text")
    before, _, _ = compare(tmp_path, path)
    result = tmp_path / "out" / "good" / "seed-0" / RESULT
    result.write_text(damage)
    found, code, lines = compare(tmp_path, path)
    assert (found, code) == (before, 0)
    assert result.with_name(DAMAGED).read_text() == damage
    assert f"{result} is damaged" in lines[0]


def test_comparison_full_disk_is_an_arm_s_error_and_nothing_is_lost(tmp_path, small_disk):
    path = write_arms(tmp_path, first="text", second="text")
    (tmp_path / "out").symlink_to(small_disk)
    before, code, _ = compare(tmp_path, path)
    assert code == 0
    shutil.rmtree(small_disk / "second")
    full = fill(small_disk)
    found, code, _ = compare(tmp_path, path)
    assert code == 1
    assert found["first"] == before["first"]
    assert found["second"].error
    full.unlink()
    found, code, _ = compare(tmp_path, path)
    assert (found, code) == (before, 0)


# ---- databases


def make_study(folder: Path) -> tuple[str, str]:
    """A sweep file and the address of a study of it."""
    path = write_sweep(folder / "sweep.py")
    address = f"sqlite:///{folder / 'study.db'}"
    study = study_lib.open_study(load_sweep(path), address)
    study._storage.remove_session()
    return path, address


def test_sweep_damaged_database_is_told_and_finished_runs_are_read_again(tmp_path):
    path = write_sweep(tmp_path / "sweep.py")
    work = tmp_path / "work"
    before = work_here(path, work)
    database = work / "study.db"
    good = database.read_bytes()
    for damage in (good[: len(good) // 3], b"not a database" * 500, good[:100] + bytes(4096)):
        database.write_bytes(damage)
        with pytest.raises(CheckpointError, match="damaged") as error:
            run_sweep(load_sweep(path), work, command=COMMAND)
        assert "move it away and run the same command" in str(error.value)
        assert database.read_bytes() == damage
    database.rename(work / "damaged.db")
    starts = noted(work, "start")
    assert work_here(path, work) == before
    assert noted(work, "start") == starts, "nothing was trained again"


def test_sweep_runs_of_another_point_are_not_taken_for_this_one(tmp_path):
    work = tmp_path / "work"
    work_here(write_sweep(tmp_path / "one.py", space={"router.k": {"values": [2]}}), work)
    (work / "study.db").unlink()
    (row,) = work_here(write_sweep(tmp_path / "two.py", space={"router.k": {"values": [4]}}), work)
    assert row.seeds[0] == pytest.approx(0.425)
    kept = work / "trials" / "0" / "other-1"
    assert json.loads((kept / "point.json").read_text())["router.k"] == 2
    assert (kept / "seed-0" / "metrics.jsonl").exists()


def test_sweep_locked_database_is_waited_for_and_then_told(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "SQLITE_SECONDS", 0.2)
    path, address = make_study(tmp_path)
    study = study_lib.load_study(load_sweep(path), address, patience=1.0)
    hurried = study_lib.load_study(load_sweep(path), address, patience=1e6, hurry=lambda: True)
    other = sqlite3.connect(tmp_path / "study.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    started = time.monotonic()
    with pytest.raises(ResourceError, match="locked"), storage.explained(address):
        study.set_user_attr("x", 1)
    assert time.monotonic() - started >= 1.0
    started = time.monotonic()
    with pytest.raises(ResourceError), storage.explained(address):
        hurried.set_user_attr("x", 1)
    assert time.monotonic() - started < PATIENCE
    other.execute("ROLLBACK")
    study.set_user_attr("x", 1)
    other.close()


def test_sweep_full_disk_ends_with_code_6_and_goes_on_later(tmp_path, small_disk):
    path, address = make_study(small_disk)
    full = fill(small_disk)
    study = study_lib.load_study(load_sweep(path), address)
    with pytest.raises(ResourceError, match="disk") as error, storage.explained(address):
        study.set_user_attr("x", "y" * 100_000)
    assert "run the same command" in str(error.value)
    full.unlink()
    study.set_user_attr("x", "y" * 100_000)


def test_sweep_database_that_is_not_there_is_refused_without_the_password(tmp_path):
    path = write_sweep(tmp_path / "sweep.py")
    address = "postgresql+psycopg://me:hush@127.0.0.1:9/x?password=hush2"
    with pytest.raises(ConfigError, match="refused") as error:
        run_sweep(load_sweep(path), tmp_path / "work", command=COMMAND, storage=address)
    assert not any(secret in str(error.value) for secret in SECRETS)


def test_sweep_a_trial_is_taken_over_by_one_of_many(tmp_path):
    path, address = make_study(tmp_path)
    study = study_lib.open_study(load_sweep(path), address)
    trial = study.ask()
    backend = study._storage._backend
    assert [backend.swap(trial._trial_id, "claim", None, n) for n in "abc"] == [True, False, False]
    assert [backend.swap(trial._trial_id, "claim", "a", n) for n in "bc"] == [True, False]


# ---- killed processes


@pytest.mark.slow
def test_sweep_killed_worker_is_replaced_and_killed_sweep_leaves_nobody(tmp_path):
    work = tmp_path / "work"
    path = write_sweep(
        tmp_path / "sweep.py", overrides={"steps": 100, "optimizer.learning_rate": 0.3}
    )
    with start(path, work) as sweep:
        assert sweep.stdout is not None
        wait_for(lambda: noted(work, "step"))
        (trainer,) = trainers(sweep.pid)
        (worker,) = (p for p in descendants(sweep.pid) if trainer in descendants(p))
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: not command_line(trainer))
        assert "a worker was killed by SIGKILL" in sweep.stdout.readline()
        wait_for(lambda: len(noted(work, "start")) == 2)
        assert noted(work, "start")[0]["run"] == noted(work, "start")[1]["run"]
        assert noted(work, "start")[1]["resumed"]
        below = descendants(sweep.pid)
        assert len(below) >= 2
        os.kill(sweep.pid, signal.SIGKILL)
        wait_for(lambda: not any(command_line(p) for p in below), seconds=20)
    with start(path, work) as sweep:
        text, _ = sweep.communicate(timeout=PATIENCE)
        assert sweep.returncode == 0, text
    assert len(noted(work, "finish")) == 2
    steps = [(event["run"], event["step"]) for event in noted(work, "step")]
    assert len(set(steps)) == 20
    assert len(steps) - 20 <= 2, "at most one evaluation a kill was done twice"


@pytest.mark.slow
def test_comparison_killed_leaves_nobody_and_goes_on(tmp_path):
    path = write_arms(tmp_path, slow="slow")
    program = (
        "import sys; from pathlib import Path\n"
        "from moe.sweep.arms import load_comparison\n"
        "from moe.sweep.arm_runner import run_arms\n"
        f"run_arms(load_comparison({path!r}), Path({str(tmp_path / 'out')!r}), command={ARM!r})\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT) as runner:
        wait_for((tmp_path / "out" / "slow" / "seed-0" / RESULT).exists)
        below = descendants(runner.pid)
        assert below
        runner.kill()
    wait_for(lambda: not any(command_line(p) for p in below), seconds=20)
    quick = [*ARM, "--config.data.text_feature=text"]
    command = [
        quick[0],
        "-c",
        f"import sys; sys.argv.append({quick[2]!r}); exec(open({ARM[1]!r}).read())",
    ]
    found, code, _ = compare(tmp_path, path, command)
    assert (sorted(found["slow"].results), code) == ([0, 1], 0)


@pytest.mark.slow
def test_sweep_on_a_disk_that_fills_up_ends_with_code_6_and_goes_on_later(tmp_path, small_disk):
    work = small_disk / "work"
    path = write_sweep(
        tmp_path / "sweep.py", overrides={"steps": 100, "optimizer.learning_rate": 0.3}
    )
    with start(path, work) as sweep:
        wait_for(lambda: noted(work, "step"))
        full = fill(small_disk)
        text, _ = sweep.communicate(timeout=PATIENCE)
    assert sweep.returncode in (1, 6), text
    assert "ResourceError" in text or "exit code" in text
    full.unlink()
    with start(path, work) as sweep:
        text, _ = sweep.communicate(timeout=PATIENCE)
    assert "[2/2]" in text or "2 of 2" in text
