"""Two machines, which have nothing in common but a PostgreSQL server, and one sweep."""

from collections import Counter
import csv
import os
from pathlib import Path
import signal
import subprocess
import time

import pytest

from moe.sweep.load import load_sweep
from moe.sweep.space import fixed_points
from tests.faults import postgres
from tests.faults.test_sweeps import (
    PATIENCE,
    SECRETS,
    command_line,
    descendants,
    noted,
    start,
    wait_for,
)
from tests.sweep.common import write_sweep

POINTS = 10
STEPS = 50
HEARTBEAT = 1.0  # after ten without one, a machine is dead


@pytest.fixture(scope="module")
def server():
    with postgres.postgres() as found:
        yield found


def sweep_file(folder: Path, name: str, **values) -> str:
    """`POINTS` points of some seconds each; the name is that of the study, one a test."""
    given = {
        "name": name,
        "overrides": {"steps": STEPS, "optimizer.learning_rate": 0.2},
        "space": {
            "router.k": {"values": [1, 2, 4, 6, 8]},
            "losses.balance": {"values": [0.0, 1.0]},
        },
    }
    return write_sweep(folder / f"{name}.py", **given | values)


def flags(server: postgres.Server) -> list[str]:
    return [f"--storage={server.storage}", f"--heartbeat={HEARTBEAT}"]


def finished(*workdirs: Path) -> Counter[str]:
    """How often the runs of each point were trained to their end, on any machine."""
    return Counter(
        point(workdir, event["run"]) for workdir in workdirs for event in noted(workdir, "finish")
    )


def point(workdir: Path, run: str) -> str:
    """The values of a run: two machines that start at once may give a point two numbers."""
    (argv,) = {tuple(e["argv"]) for e in noted(workdir, "start") if e["run"] == run}
    searched = ("--config.router.k=", "--config.losses.balance=")
    return " ".join(sorted(flag for flag in argv if flag.startswith(searched)))


def once_each(path: str) -> Counter[str]:
    """Every point of a sweep, once."""
    points = fixed_points(load_sweep(path))
    flags = ([f"--config.{key}={value}" for key, value in p.items()] for p in points)
    return Counter(" ".join(sorted(flag)) for flag in flags)


def table_of(workdir: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((workdir / "results.csv").read_text().splitlines()))


def end(sweep: "subprocess.Popen[str]", code: int = 0) -> str:
    text, _ = sweep.communicate(timeout=2 * PATIENCE)
    assert sweep.returncode == code, text
    assert not any(secret in text for secret in SECRETS)
    return text


@pytest.mark.slow
def test_sweep_two_machines_do_every_point_once(tmp_path, server):
    here, there = tmp_path / "here", tmp_path / "there"
    path = sweep_file(tmp_path, "once")
    with start(path, here, *flags(server)) as one, start(path, there, *flags(server)) as two:
        for sweep in (one, two):
            end(sweep)
    assert finished(here, there) == once_each(path)
    assert finished(here), "one machine did everything"
    assert finished(there), "one machine did everything"
    assert table_of(here) == table_of(there)
    assert [row["state"] for row in table_of(here)] == ["complete"] * POINTS


@pytest.mark.slow
def test_sweep_a_killed_machine_s_trial_is_done_by_the_other(tmp_path, server):
    here, there = tmp_path / "here", tmp_path / "there"
    path = sweep_file(tmp_path, "killed")
    with start(path, here, *flags(server)) as one, start(path, there, *flags(server)) as two:
        wait_for(lambda: noted(here, "step") and noted(there, "step"))
        wait_for(lambda: len(finished(there)) < len(noted(there, "start")))
        below = descendants(two.pid)
        os.kill(two.pid, signal.SIGKILL)
        killed = time.monotonic()
        wait_for(lambda: not any(command_line(p) for p in below), seconds=20)
        begun = {point(there, event["run"]) for event in noted(there, "start")}
        (lost,) = begun - set(finished(there))
        end(one)
        assert time.monotonic() - killed >= 10 * HEARTBEAT
    assert finished(here, there) == once_each(path)
    assert lost in finished(here)
    assert [row["state"] for row in table_of(here)] == ["complete"] * POINTS


@pytest.mark.slow
def test_sweep_a_restarted_database_is_waited_for(tmp_path, server):
    here = tmp_path / "here"
    path = sweep_file(tmp_path, "restarted", space={"router.k": {"values": [1, 2, 4]}})
    with start(path, here, *flags(server)) as sweep:
        wait_for(lambda: noted(here, "step"))
        server.stop()
        time.sleep(3.0)
        server.start()
        end(sweep)
    assert finished(here) == once_each(path)
    assert {row["state"] for row in table_of(here)} == {"complete"}


@pytest.mark.slow
def test_sweep_whose_database_is_gone_ends_and_goes_on_later(tmp_path, server):
    here = tmp_path / "here"
    path = sweep_file(tmp_path, "gone", space={"router.k": {"values": [1, 2]}})
    with start(path, here, *flags(server), "--patience=5") as sweep:
        wait_for(lambda: noted(here, "step"))
        server.stop()
        text = end(sweep, code=6)
    assert "the database is away" in text
    assert "run the same command" in text
    server.start()
    with start(path, here, *flags(server)) as sweep:
        end(sweep)
    assert finished(here) == once_each(path)
    steps = Counter((e["run"], e["step"]) for e in noted(here, "step"))
    assert set(steps.values()) == {1}, "the trainer saved and went on"
