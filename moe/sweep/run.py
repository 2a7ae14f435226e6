"""A sweep from start to table: checks, worker processes, and what is written at the end."""

from collections.abc import Callable, Sequence
import os
from pathlib import Path
import subprocess
import time
from typing import NamedTuple

import optuna

from moe.errors import EXIT_PREEMPTED, ConfigError
from moe.sweep import report, table
from moe.sweep import study as study_lib
from moe.sweep.space import Sweep
from moe.sweep.worker import Job, Stop, start_worker

WATCH_SECONDS = 0.5


class Outcome(NamedTuple):
    """What a sweep has when it ends or is stopped.

    Attributes:
        rows: a row a point, the best first.
        exit_code: 0 with every point decided and one complete, 1 otherwise, 75 when stopped.
    """

    rows: list[table.Row]
    exit_code: int


def run_sweep(
    sweep: Sweep,
    workdir: str | os.PathLike[str],
    *,
    command: Sequence[str],
    workers: int = 1,
    storage: str | None = None,
    announce: Callable[[str], None] = lambda line: None,
    poll: float = WATCH_SECONDS,
) -> Outcome:
    """Runs, or goes on with, a sweep; writes `results.csv` and `report.html` in its workdir.

    Args:
        sweep: from `load_sweep`.
        workdir: of the sweep; its parent exists. Runs are in `trials/<number>/seed-<seed>/`.
        command: the trainer, for example `[sys.executable, "train.py"]`.
        workers: processes that train at once on this machine.
        storage: an Optuna database address, for sweeps over many machines; None for a SQLite file in
            the workdir.
        announce: takes a line for people when a trial ends.
        poll: seconds between looks at running trainers.

    Raises:
        ConfigError: before anything is started.
    """
    workdir = Path(workdir).absolute()
    check_place(workdir, workers)
    workdir.mkdir(exist_ok=True)
    address = storage or study_lib.default_storage(workdir)
    study = study_lib.open_study(sweep, address)
    stop = Stop().listen()
    job = Job(sweep, workdir, address, list(command), poll)
    processes = [
        start_worker(job._replace(cores=share_of_cores(n, workers))) for n in range(workers)
    ]
    _watch(study, sweep, processes, stop, announce, poll)
    rows = table.rows(study, sweep)
    (workdir / "results.csv").write_text(table.to_csv(rows, sweep), encoding="utf-8")
    report.write_sweep_report(workdir, sweep, rows)
    return Outcome(rows, _exit_code(study, rows, stop))


def check_place(workdir: Path, workers: int) -> None:
    """Raises ConfigError unless so many workers can write there."""
    if workers < 1:
        raise ConfigError(f"--workers={workers} must be at least 1.")
    where = workdir if workdir.exists() else workdir.parent
    if not where.is_dir():
        raise ConfigError(f"--workdir={workdir}: {where} is no directory: make it first.")
    if not os.access(where, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--workdir={workdir}: {where} cannot be written: choose another workdir."
        )


def share_of_cores(index: int, workers: int) -> list[int]:
    """The processors of one of several workers; empty where it may use all."""
    if workers == 1 or not hasattr(os, "sched_getaffinity"):
        return []
    cores = sorted(os.sched_getaffinity(0))
    return cores[index % len(cores) :: min(workers, len(cores))]


def _watch(
    study: optuna.Study,
    sweep: Sweep,
    processes: Sequence["subprocess.Popen[bytes]"],
    stop: Stop,
    announce: Callable[[str], None],
    poll: float,
) -> None:
    """Waits for the workers; passes a request to stop on to them, once."""
    told = {t.number for t in study_lib.point_trials(study) if t.state.is_finished()}
    if told:
        announce(f"continuing: {len(told)} of {sweep.points} points are done")
    asked = False
    while True:
        alive = any(process.poll() is None for process in processes)
        for trial in study_lib.point_trials(study):
            if trial.state.is_finished() and trial.number not in told:
                told.add(trial.number)
                announce(f"[{len(told)}/{sweep.points}] {_line(table.row(trial), sweep)}")
        if not alive:
            return
        if stop.requested and not asked:
            asked = True
            announce("stopping: trials save their state; run the same command to go on")
            for process in processes:
                process.terminate()
        time.sleep(poll)


def _line(row: table.Row, sweep: Sweep) -> str:
    point = " ".join(f"{key}={value}" for key, value in row.params.items())
    if row.interval is None:
        return f"trial {row.trial} {row.state} ({point}): {row.note}"
    interval = table.interval_text(row.interval)
    return f"trial {row.trial} ({point}): {sweep.metric} {row.interval.mean:.4f} {interval}"


def _exit_code(study: optuna.Study, rows: Sequence[table.Row], stop: Stop) -> int:
    if study_lib.unfinished(study):
        return EXIT_PREEMPTED if stop.requested else 1
    return 0 if any(row.interval is not None for row in rows) else 1
