"""A sweep from start to table: checks, worker processes, and what is written at the end."""

from collections.abc import Callable, Sequence
import os
from pathlib import Path
import signal
import time
from typing import NamedTuple

import optuna

from moe.errors import EXIT_PREEMPTED, ConfigError
from moe.sweep import attempts, report, table
from moe.sweep import study as study_lib
from moe.sweep.space import Sweep
from moe.sweep.storage import PATIENCE_SECONDS, explained
from moe.sweep.trainer import KILL_SECONDS, terminate
from moe.sweep.worker import Job, Stop, start_worker
from moe.training.workdir import write_atomically

WATCH_SECONDS = 0.5
DEATHS = 3  # killed workers that are replaced before a point has a result


class Outcome(NamedTuple):
    """What a sweep has when it ends or is stopped.

    Attributes:
        rows: a row a point, the best first.
        exit_code: 0 with every point decided and one complete, 75 when stopped, that of a worker
            that could not go on, 1 otherwise.
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
    retry_failed: bool = False,
    announce: Callable[[str], None] = lambda line: None,
    poll: float = WATCH_SECONDS,
    heartbeat: float = study_lib.HEARTBEAT_SECONDS,
    patience: float = PATIENCE_SECONDS,
) -> Outcome:
    """Runs, or goes on with, a sweep; writes `results.csv` and `report.html` in its workdir.

    Args:
        sweep: from `load_sweep`.
        workdir: of the sweep; its parent exists. Runs are in `trials/<number>/seed-<seed>/`.
        command: the trainer, for example `[sys.executable, "train.py"]`.
        workers: processes that train at once on this machine.
        storage: an Optuna database address, for sweeps over many machines; None for a SQLite file in
            the workdir.
        retry_failed: whether points that have failed are run again, from their checkpoints.
        announce: takes a line for people when a trial ends.
        poll: seconds between looks at running trainers.
        heartbeat: seconds between signs of life in the storage; after ten without one, other
            machines take this one's trials over.
        patience: seconds that a storage that is away is waited for.

    Raises:
        ConfigError: before anything is started.
        ResourceError: no room on the disk, or a storage that is away.
        CheckpointError: a storage that is damaged.
    """
    workdir = Path(workdir).absolute()
    check_place(workdir, workers)
    if heartbeat <= 0:
        raise ConfigError(f"--heartbeat={heartbeat:g} must be above 0 seconds.")
    address = storage or study_lib.default_storage(workdir)
    with explained(address):
        workdir.mkdir(exist_ok=True)
        study = study_lib.open_study(sweep, address, retry=retry_failed)
        stop = Stop().listen()
        job = Job(sweep, workdir, address, list(command), poll, (), heartbeat, patience)
        jobs = [job._replace(cores=share_of_cores(n, workers)) for n in range(workers)]
        # Opening waited for nothing: from here on the database may be away for a while.
        study = study_lib.load_study(
            sweep, address, patience=patience, hurry=lambda: stop.requested
        )
        with Crew(jobs, announce) as crew:
            _watch(study, sweep, crew, stop, announce, poll)
        rows = table.rows(study, sweep)
        write_atomically(workdir / "results.csv", table.to_csv(rows, sweep))
        report.write_sweep_report(workdir, sweep, rows)
        return Outcome(rows, _exit_code(study, rows, stop, crew))


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


class Crew:
    """The worker processes; one that was killed is replaced, and its trial goes on.

    On the way out all are asked to stop and waited for.
    """

    def __init__(self, jobs: Sequence[Job], announce: Callable[[str], None]):
        self._announce = announce
        self._deaths = 0
        self._workers = [(job, start_worker(job)) for job in jobs]
        self.codes: list[int] = []  # of those that ended

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *error: object) -> None:
        for _, process in self._workers:
            terminate(process, seconds=2 * KILL_SECONDS)

    def ask_to_stop(self) -> None:
        """Trials save their state."""
        for _, process in self._workers:
            process.terminate()

    def is_at_work(self, *, replace: bool) -> bool:
        """Whether any is left; replaces the killed ones, unless too many died one after another."""
        for job, process in self._workers[:]:
            code = process.poll()
            if code is None:
                continue
            self._workers.remove((job, process))
            self.codes.append(code)
            if code < 0 and replace and self._deaths < DEATHS:
                self._deaths += 1
                self._announce(
                    f"a worker was killed by {signal.Signals(-code).name}: another goes on with its "
                    f"trial ({self._deaths} of {DEATHS} times before a point is decided)"
                )
                self._workers.append((job, start_worker(job)))
        return bool(self._workers)

    def has_decided(self) -> None:
        """A point has a result: the deaths before it count no more."""
        self._deaths = 0


def _watch(
    study: optuna.Study,
    sweep: Sweep,
    crew: Crew,
    stop: Stop,
    announce: Callable[[str], None],
    poll: float,
) -> None:
    """Waits for the workers; passes a request to stop on to them, once."""
    told = {t.number for t in attempts.point_trials(study) if t.state.is_finished()}
    if told:
        announce(f"continuing: {len(told)} of {sweep.points} points are done")
    asked = False
    while True:
        at_work = crew.is_at_work(replace=not stop.requested)
        for trial in attempts.point_trials(study):
            if trial.state.is_finished() and trial.number not in told:
                told.add(trial.number)
                crew.has_decided()
                announce(f"[{len(told)}/{sweep.points}] {_line(table.row(study, trial), sweep)}")
        if not at_work:
            return
        if stop.requested and not asked:
            asked = True
            announce("stopping: trials save their state; run the same command to go on")
            crew.ask_to_stop()
        time.sleep(poll)


def _line(row: table.Row, sweep: Sweep) -> str:
    point = " ".join(f"{key}={value}" for key, value in row.params.items())
    if row.interval is None:
        return f"trial {row.trial} {row.state} ({point}): {row.note}"
    interval = table.interval_text(row.interval)
    return f"trial {row.trial} ({point}): {sweep.metric} {row.interval.mean:.4f} {interval}"


def _exit_code(study: optuna.Study, rows: Sequence[table.Row], stop: Stop, crew: Crew) -> int:
    if study_lib.unfinished(study):
        return EXIT_PREEMPTED if stop.requested else max([1, *crew.codes])
    return 0 if any(row.interval is not None for row in rows) else 1
