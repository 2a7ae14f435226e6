"""One worker of a sweep: claims trials and runs their seeds as subprocesses, one after another."""

from collections.abc import Sequence
import json
import math
import os
from pathlib import Path
import signal
import subprocess
import sys
import time
from types import FrameType
from typing import Any, NamedTuple

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from moe.errors import UserError
from moe.parallel import compile_cache
from moe.parallel.orphans import tied
from moe.sweep import attempts
from moe.sweep import study as study_lib
from moe.sweep.address import child_environment
from moe.sweep.curve import Curve, Pruning
from moe.sweep.space import Params, Sweep, to_text
from moe.sweep.storage import PATIENCE_SECONDS, explained
from moe.sweep.study import Claim
from moe.sweep.trainer import Restarts, failure_text, reached, size, terminate
from moe.training.workdir import write_atomically

POLL_SECONDS = 0.5


class Job(NamedTuple):
    """What a worker needs; plain data, which it reads as JSON from its standard input.

    Attributes:
        sweep: the checked sweep file.
        workdir: of the sweep.
        storage: an Optuna address.
        command: the trainer, to which flags are added.
        poll: seconds between looks at a running trainer.
        cores: processors that the worker and its trainers use; empty for all.
        heartbeat: seconds between signs of life.
        patience: seconds that a storage that is away is waited for.
    """

    sweep: Sweep
    workdir: Path
    storage: str
    command: Sequence[str]
    poll: float = POLL_SECONDS
    cores: Sequence[int] = ()
    heartbeat: float = study_lib.HEARTBEAT_SECONDS
    patience: float = PATIENCE_SECONDS


class Result(NamedTuple):
    """How a seed or a trial ended; `state` is None for one that was stopped and goes on later."""

    state: TrialState | None
    value: float | None = None
    error: str | None = None


class Stop:
    """SIGTERM or Ctrl-C was received."""

    def __init__(self) -> None:
        self.requested = False

    def listen(self) -> "Stop":
        """Replaces the handlers of this process."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


def start_worker(job: Job) -> "subprocess.Popen[bytes]":
    """Starts a worker as a process of its own, which dies with the caller."""
    process = subprocess.Popen(
        tied([sys.executable, "-c", f"from {__name__} import main; main()"]),
        stdin=subprocess.PIPE,
        process_group=0,  # Ctrl-C is for the caller, which passes it on once
    )
    fields = job._asdict() | {"sweep": job.sweep.to_json(), "workdir": str(job.workdir)}
    if process.stdin is not None:
        process.stdin.write(json.dumps(fields).encode())
        process.stdin.close()
    return process


def main() -> None:
    """Entry point of a worker process."""
    fields = json.loads(sys.stdin.read())
    sweep = Sweep.from_json(fields["sweep"])
    job = Job(**fields | {"sweep": sweep, "workdir": Path(fields["workdir"])})
    try:
        with explained(job.storage):
            work(job)
    except UserError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_code)


def work(job: Job) -> None:
    """The body of a worker: runs trials until every point has a result.

    XLA and BLAS size their thread pools by the processors a process may use, so workers that are
    given different ones do not fight for them.
    """
    if job.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, job.cores)
    stop = Stop().listen()
    study = study_lib.load_study(
        job.sweep, job.storage, patience=job.patience, hurry=lambda: stop.requested
    )
    local = job.storage == study_lib.default_storage(job.workdir)
    claims = study_lib.Claims(study, job.workdir, local=local, heartbeat=job.heartbeat)
    while not stop.requested:
        claim = claims.next()
        if claim is not None:
            try:
                _run_claim(job, claim, stop)
            finally:
                os.close(claim.lock)
        elif study_lib.unfinished(study):
            time.sleep(job.poll)  # others are at work; one of them may die
        else:
            return


def _run_claim(job: Job, claim: Claim, stop: Stop) -> None:
    trial = claim.trial
    try:
        result = run_trial(job, claim, stop)
        if result.state is None:
            return
        claim.beat()
        if result.error is not None:
            trial.set_user_attr(attempts.ERROR, result.error)
        trial.study.tell(trial, result.value, state=result.state, skip_if_finished=True)
    except (UpdateFinishedTrialError, study_lib.ClaimLostError):
        # This worker was silent for so long that another machine took the trial over.
        print(  # noqa: T201
            f"trial {trial.number} was taken over by another machine: this one was silent for too "
            "long. Its result counts there.",
            file=sys.stderr,
        )


def run_trial(job: Job, claim: Claim, stop: Stop) -> Result:
    """Runs the seeds of one point that have no result yet.

    Pruning looks at the first seed alone: the same steps of the same seed are compared, and a point that
    survives is worth its other seeds.
    """
    trial = claim.trial
    params = study_lib.suggest(trial, job.sweep)
    _own_directory(claim.directory, job.sweep, params)
    done: dict[str, Any] = dict(trial.user_attrs.get(attempts.SEEDS, {}))
    for position, seed in enumerate(job.sweep.seeds):
        if str(seed) in done:
            continue
        curve = Curve(claim.directory / f"seed-{seed}" / "metrics.jsonl", job.sweep)
        prune = Pruning(trial) if position == 0 else None
        result = _run_seed(job, claim, params, seed, curve, prune, stop)
        if result.state is not TrialState.COMPLETE:
            return result
        claim.beat()
        done[str(seed)] = {"value": result.value, "curve": curve.thinned()}
        trial.set_user_attr(attempts.SEEDS, done)
    values = [done[str(seed)]["value"] for seed in job.sweep.seeds]
    return Result(TrialState.COMPLETE, math.fsum(values) / len(values))


def _own_directory(directory: Path, sweep: Sweep, params: Params) -> None:
    """Moves runs of another point aside: a database that was lost numbers its trials anew."""
    note = directory / "point.json"
    point = json.dumps({"base": sweep.base, **sweep.overrides, **params}, sort_keys=True)
    if note.exists() and note.read_text(encoding="utf-8") != point:
        aside = next(
            path for n in range(1, 1 << 20) if not (path := directory / f"other-{n}").exists()
        )
        aside.mkdir()
        for path in [note, *directory.glob("seed-*")]:
            path.rename(aside / path.name)
    if not note.exists():
        write_atomically(note, point)


def _run_seed(
    job: Job,
    claim: Claim,
    params: Params,
    seed: int,
    curve: Curve,
    prune: Pruning | None,
    stop: Stop,
) -> Result:
    """Runs the trainer until it is done, or ended in a way that starting it again does not mend."""
    run = claim.directory / f"seed-{seed}"
    log = run.with_name(f"{run.name}.log")
    before = size(log)
    restarts = Restarts(lambda: reached(run))
    while True:
        code, pruned = _run_process(
            job, claim, _command(job, claim, params, seed), log, curve, prune, stop
        )
        if pruned:
            step, value = curve.last() or (0, math.nan)
            return Result(TrialState.PRUNED, error=f"pruned at step {step} with {value:.4g}")
        if code == 0:
            return _final(curve, job.sweep)
        if stop.requested:
            return Result(None)
        if not restarts.again(code):
            told = f"seed {seed}: {restarts.text()}{failure_text(code, log, before)}"
            return Result(TrialState.FAIL, error=told)


def _command(job: Job, claim: Claim, params: Params, seed: int) -> list[str]:
    values = {**job.sweep.overrides, **{k: to_text(v) for k, v in params.items()}, "seed": seed}
    return [
        *job.command,
        f"--config={job.sweep.base}",
        *(f"--config.{key}={value}" for key, value in values.items()),
        f"--workdir={claim.directory / f'seed-{seed}'}",
        *_shared_cache(job.workdir),
    ]


def _shared_cache(workdir: Path) -> list[str]:
    """Trials that differ in numbers alone run the same compiled program."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return []
    return [f"--compile_cache={workdir / compile_cache.FOLDER}"]


def _run_process(
    job: Job,
    claim: Claim,
    command: Sequence[str],
    log: Path,
    curve: Curve,
    prune: Pruning | None,
    stop: Stop,
) -> tuple[int, bool]:
    """(exit code, whether it was pruned) of one run of the trainer, whose output goes to `log`."""
    with log.open("ab") as output:
        # The trainer keeps the claim's lock too: a trainer that outlives its worker is not doubled.
        process = subprocess.Popen(
            tied(command),
            stdout=output,
            stderr=subprocess.STDOUT,
            env=child_environment(),
            pass_fds=(claim.lock,),
            process_group=0,
        )
    next_beat, pruned = 0.0, False
    try:
        while process.poll() is None and not pruned and not stop.requested:
            time.sleep(job.poll)
            if time.monotonic() > next_beat:
                claim.beat()
                next_beat = time.monotonic() + job.heartbeat
            curve.update()
            pruned = prune is not None and prune.is_hopeless(curve.points)
    finally:
        code = terminate(process)
    curve.update()
    if prune is not None and not pruned:
        # Too late to stop this run, but others are compared with it.
        prune.is_hopeless(curve.points)
    return code, pruned and code != 0


def _final(curve: Curve, sweep: Sweep) -> Result:
    last = curve.last()
    if last is None:
        known = sorted(k for k in curve.keys if k not in ("step", "split"))
        have = f"its lines have {', '.join(known)}" if known else "it has no lines of that split"
        return Result(
            TrialState.FAIL,
            error=f"the run ended without {sweep.metric!r} of split {sweep.split!r} in metrics.jsonl: "
            f"{have}.",
        )
    step, value = last
    if not math.isfinite(value):
        return Result(TrialState.FAIL, error=f"diverged: {sweep.metric} is {value} at step {step}.")
    return Result(TrialState.COMPLETE, value)
