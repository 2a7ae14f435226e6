"""One worker of a sweep: claims trials and runs their seeds as subprocesses, one after another."""

from collections.abc import Mapping, Sequence
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
from optuna.trial import Trial, TrialState

from moe.errors import EXIT_PREEMPTED
from moe.parallel import compile_cache
from moe.report.records import parse_record
from moe.sweep import study as study_lib
from moe.sweep.space import Params, Sweep, to_text
from moe.sweep.study import Claim

POLL_SECONDS = 0.5
KILL_SECONDS = 120.0  # between SIGTERM and SIGKILL: time to save a checkpoint
SAVES_WITHOUT_PROGRESS = 3  # then a run that stops by itself again and again has failed
CURVE_POINTS = 200  # of a learning curve kept in the storage
LOG_TAIL = 2000  # characters of a failed run's output that are kept


class Job(NamedTuple):
    """What a worker needs; plain data, which it reads as JSON from its standard input.

    Attributes:
        sweep: the checked sweep file.
        workdir: of the sweep.
        storage: an Optuna address.
        command: the trainer, to which flags are added.
        poll: seconds between looks at a running trainer.
        cores: processors that the worker and its trainers use; empty for all.
    """

    sweep: Sweep
    workdir: Path
    storage: str
    command: Sequence[str]
    poll: float = POLL_SECONDS
    cores: Sequence[int] = ()


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
    """Starts a worker as a process of its own, in the process group of the caller."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"from {__name__} import main; main()"], stdin=subprocess.PIPE
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
    work(Job(**fields | {"sweep": sweep, "workdir": Path(fields["workdir"])}))


def work(job: Job) -> None:
    """The body of a worker: runs trials until every point has a result.

    XLA and BLAS size their thread pools by the processors a process may use, so workers that are
    given different ones do not fight for them.
    """
    if job.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, job.cores)
    stop = Stop().listen()
    study = study_lib.load_study(job.sweep, job.storage)
    local = job.storage == study_lib.default_storage(job.workdir)
    claims = study_lib.Claims(study, job.workdir, local=local)
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
        if result.error is not None:
            trial.set_user_attr(study_lib.ERROR, result.error)
        trial.study.tell(trial, result.value, state=result.state, skip_if_finished=True)
    except UpdateFinishedTrialError:
        # This worker was silent for so long that another machine took the trial over and finished it.
        return


def run_trial(job: Job, claim: Claim, stop: Stop) -> Result:
    """Runs the seeds of one point that have no result yet.

    Pruning looks at the first seed alone: the same steps of the same seed are compared, and a point that
    survives is worth its other seeds.
    """
    trial = claim.trial
    params = study_lib.suggest(trial, job.sweep)
    done: dict[str, Any] = dict(trial.user_attrs.get(study_lib.SEEDS, {}))
    for position, seed in enumerate(job.sweep.seeds):
        if str(seed) in done:
            continue
        curve = Curve(claim.directory / f"seed-{seed}" / "metrics.jsonl", job.sweep)
        prune = _Pruning(trial) if position == 0 else None
        result = _run_seed(job, claim, params, seed, curve, prune, stop)
        if result.state is not TrialState.COMPLETE:
            return result
        done[str(seed)] = {"value": result.value, "curve": curve.thinned()}
        trial.set_user_attr(study_lib.SEEDS, done)
    values = [done[str(seed)]["value"] for seed in job.sweep.seeds]
    return Result(TrialState.COMPLETE, math.fsum(values) / len(values))


class Curve:
    """The metric over steps, read from a metrics.jsonl that grows.

    Args:
        path: need not exist yet.
        sweep: names the metric and the split.
    """

    def __init__(self, path: Path, sweep: Sweep):
        self._path = path
        self._metric, self._split = sweep.metric, sweep.split
        self._offset = 0
        self._file: tuple[int, int] | None = None
        self.points: dict[int, float] = {}  # NaN where the file says null
        self.keys: set[str] = set()  # of the split's lines

    def update(self) -> None:
        """Reads the lines that are new; a file that was replaced or cut is read from its start."""
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                identity = status.st_dev, status.st_ino
                if identity != self._file or status.st_size < self._offset:
                    self._file, self._offset = identity, 0
                    self.points.clear()
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            return
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.decode("utf-8", errors="replace").splitlines():
            self._read(line)

    def _read(self, line: str) -> None:
        record = parse_record(line)
        if record is None or record["split"] != self._split:
            return
        self.keys |= record.keys()
        if self._metric in record:
            value = record[self._metric]
            self.points[record["step"]] = math.nan if value is None else float(value)

    def position(self) -> tuple[tuple[int, int] | None, int]:
        """Changes whenever the run has logged something."""
        return self._file, self._offset

    def last(self) -> tuple[int, float] | None:
        """The last step and its value."""
        return max(self.points.items()) if self.points else None

    def thinned(self) -> list[list[float]]:
        """[step, value] pairs for the storage, the last one among them."""
        found = [[step, value] for step, value in sorted(self.points.items())]
        stride = -(-len(found) // CURVE_POINTS) or 1
        return found[::-1][::stride][::-1]


class _Pruning:
    """Reports a curve to Optuna and asks whether to go on."""

    def __init__(self, trial: Trial):
        self._trial = trial
        known = trial.study.get_trials(deepcopy=False)[trial.number]
        self._reported = set(known.intermediate_values)

    def is_hopeless(self, points: Mapping[int, float]) -> bool:
        """Whether the newest of the points is so bad that the trial should end."""
        new = sorted(step for step in points if step not in self._reported)
        for step in new:
            self._trial.report(points[step], step)
            self._reported.add(step)
        return bool(new) and self._trial.should_prune()


def _run_seed(
    job: Job,
    claim: Claim,
    params: Params,
    seed: int,
    curve: Curve,
    prune: _Pruning | None,
    stop: Stop,
) -> Result:
    """Runs the trainer until it is done; one that saved and stopped by itself is started again."""
    log = claim.directory / f"seed-{seed}.log"
    idle = 0
    while idle < SAVES_WITHOUT_PROGRESS:
        before = curve.position()
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
        if code != EXIT_PREEMPTED:
            return Result(TrialState.FAIL, error=f"seed {seed}: {failure_text(code, log)}")
        idle = idle + 1 if curve.position() == before else 0
    return Result(
        TrialState.FAIL,
        error=f"seed {seed}: stopped with exit code {EXIT_PREEMPTED} {idle} times without a new line of "
        "metrics.jsonl.",
    )


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
    prune: _Pruning | None,
    stop: Stop,
) -> tuple[int, bool]:
    """(exit code, whether it was pruned) of one run of the trainer, whose output goes to `log`."""
    with log.open("ab") as output:
        # The trainer keeps the claim's lock too: a trainer that outlives its worker is not doubled.
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, pass_fds=(claim.lock,)
        )
    next_beat, pruned = 0.0, False
    try:
        while process.poll() is None and not pruned and not stop.requested:
            time.sleep(job.poll)
            if time.monotonic() > next_beat:
                study_lib.beat(claim.trial)
                next_beat = time.monotonic() + study_lib.HEARTBEAT_SECONDS
            curve.update()
            pruned = prune is not None and prune.is_hopeless(curve.points)
    finally:
        code = terminate(process)
    curve.update()
    if prune is not None and not pruned:
        prune.is_hopeless(
            curve.points
        )  # too late to stop this run, but others are compared with it
    return code, pruned and code != 0


def terminate(process: subprocess.Popen[bytes]) -> int:
    """Asks a process to save and stop, waits, and kills it if it does not."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


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


def failure_text(code: int, log: Path) -> str:
    """The exit code and the end of the output, where an entry point writes its message."""
    text = log.read_bytes().decode("utf-8", errors="replace").strip()[-LOG_TAIL:]
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name} (the system kills processes when memory runs out). {text}"
    return f"exit code {code}. {text}"
