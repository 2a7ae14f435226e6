"""Runs a comparison: one process an arm, which trains all its seeds; several arms at once.

A run that is finished has left `seed-<n>/result.json` and is never run again. One that was killed goes
on from its checkpoint, because its arm is started again with the seeds that have no result.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
import json
import os
from pathlib import Path
import queue
import subprocess
import time
from typing import Any, NamedTuple

from moe.errors import EXIT_PREEMPTED, ConfigError, UserError
from moe.parallel.orphans import tied
from moe.sweep.arms import Arm, Comparison, difference
from moe.sweep.run import check_place, share_of_cores
from moe.sweep.storage import FULL, GO_ON
from moe.sweep.trainer import Restarts, failure_text, reached, size, terminate
from moe.sweep.worker import Stop

RESULT = "result.json"
DAMAGED = "result.json.damaged"
POLL_SECONDS = 0.5
LARGEST = 1e100  # of a number whose square is finite, too
Results = dict[int, dict[str, Any]]  # seed -> what `measure` told
Announce = Callable[[str], None]


class ArmResult(NamedTuple):
    """What is known of one arm.

    Attributes:
        arm: which.
        results: of the seeds that are done.
        error: why it failed, "" if it did not.
    """

    arm: Arm
    results: Results
    error: str = ""


class Outcome(NamedTuple):
    """`exit_code`: 0 with every run done, 1 with a failed one, 75 when stopped before the end."""

    arms: list[ArmResult]
    exit_code: int


def run_arms(
    comparison: Comparison,
    workdir: Path,
    *,
    command: Sequence[str],
    workers: int = 1,
    announce: Announce = lambda line: None,
    poll: float = POLL_SECONDS,
) -> Outcome:
    """Runs, or goes on with, all arms.

    Args:
        comparison: from `load_comparison`.
        workdir: its parent exists. Runs are in `<arm>/seed-<n>/`.
        command: the trainer of an arm; takes `--config`, overrides, `--seeds` and `--workdir`, and
            leaves a result for each seed.
        workers: arms that train at once, each on its share of the processors.
        announce: takes a line for people when an arm ends.
        poll: seconds between looks at a running trainer.

    Raises:
        ConfigError: before anything is started; also for results of another config.
    """
    check_place(workdir, workers)
    workdir.mkdir(exist_ok=True)
    todo: queue.SimpleQueue[Arm] = queue.SimpleQueue()
    found = {
        arm.name: ArmResult(arm, read_results(arm, workdir, announce)) for arm in comparison.arms
    }
    for arm in comparison.arms:
        if set(comparison.seeds) - found[arm.name].results.keys():
            todo.put(arm)
    total = len(comparison.arms)
    if todo.qsize() < total:
        announce(f"continuing: {total - todo.qsize()} of {total} arms are done")
    stop = Stop().listen()
    job = _Job(comparison, workdir, list(command), announce, poll, stop, todo, found)
    with ThreadPoolExecutor(workers) as pool:
        runs = [pool.submit(_work, job, share_of_cores(n, workers)) for n in range(workers)]
        try:
            # Signals are handled between naps of the main thread.
            while not all(run.done() for run in runs):
                wait(runs, poll)
                for run in runs:
                    if run.done():
                        run.result()
        finally:
            stop.requested |= any(not run.done() for run in runs)
    arms = [found[arm.name] for arm in comparison.arms]
    return Outcome(arms, _exit_code(comparison, arms, stop))


class _Job(NamedTuple):
    comparison: Comparison
    workdir: Path
    command: list[str]
    announce: Announce
    poll: float
    stop: Stop
    todo: "queue.SimpleQueue[Arm]"
    found: dict[str, ArmResult]


def read_results(arm: Arm, workdir: Path, announce: Announce = lambda line: None) -> Results:
    """The results of an arm's finished runs; a damaged one is moved aside, so that it is made again.

    Raises:
        ConfigError: they are of another config.
    """
    results: Results = {}
    for path in sorted((workdir / arm.name).glob(f"seed-*/{RESULT}")):
        record = _read_result(path)
        if record is None:
            path.replace(path.with_name(DAMAGED))
            announce(
                f"{path} is damaged: it is kept as {DAMAGED}, and that seed is measured again."
            )
            continue
        key = difference(arm.settings, record["settings"])
        if key is not None:
            raise ConfigError(
                f"{path} is the result of another config: {key} differs. Give a new --workdir, or delete "
                f"{workdir / arm.name} to run this arm again."
            )
        results[record["seed"]] = record
    return results


def _read_result(path: Path) -> dict[str, Any] | None:
    """What `stored` made of that folder's seed, or None where it does not read back so."""
    try:
        record = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}. It decides which seeds are trained; make it "
            "readable, or move it away to measure that seed again."
        ) from error
    if not isinstance(record, dict) or type(record.get("seed")) is not int:
        return None
    settings, metrics = record.get("settings"), record.get("metrics")
    if path.parent.name != f"seed-{record['seed']}" or not isinstance(settings, dict):
        return None
    return record if _are_metrics(metrics) else None


def _are_metrics(found: Any) -> bool:
    """Whether these are a loss and other numbers, of which means and intervals can be taken."""
    if not isinstance(found, dict) or found.get("loss") is None:
        return False
    values = [value for value in found.values() if value is not None]
    return all(type(v) in (int, float) and not abs(v) > LARGEST for v in values)


def _work(job: _Job, cores: Sequence[int]) -> None:
    """The body of a worker thread.

    On Linux an affinity belongs to a thread and is inherited by what it starts, so that each
    trainer gets the processors of its worker and sizes its thread pools by them.
    """
    if cores:
        os.sched_setaffinity(0, cores)
    while not job.stop.requested:
        try:
            arm = job.todo.get_nowait()
        except queue.Empty:
            return
        result = _result(job, arm)
        job.found[arm.name] = result
        job.announce(f"[{_done(job)}/{len(job.found)}] {_line(job, result)}")


def _result(job: _Job, arm: Arm) -> ArmResult:
    """Runs an arm; what goes wrong on disk is its error and leaves the other arms alone."""
    try:
        error = _run(job, arm)
        return ArmResult(arm, read_results(arm, job.workdir, job.announce), error)
    except (UserError, OSError) as error:
        advice = f" {GO_ON}" if isinstance(error, OSError) and error.errno in FULL else ""
        return ArmResult(
            arm, job.found[arm.name].results, f"{type(error).__name__}: {error}{advice}"
        )


def _run(job: _Job, arm: Arm) -> str:
    """Runs the trainer of one arm to its end; returns the error, "" for none."""
    folder = job.workdir / arm.name
    folder.mkdir(exist_ok=True)
    log = folder / "log.txt"
    before = size(log)
    restarts = Restarts(lambda: _progress(folder))
    while True:
        missing = _missing(job, arm)
        code = _run_process(job, arm_command(job.command, arm, missing, folder), log)
        if code == 0:
            left = _missing(job, arm)
            return f"the trainer ended without {RESULT} of seeds {left}." if left else ""
        if job.stop.requested:
            return ""
        if not restarts.again(code):
            return restarts.text() + failure_text(code, log, before)


def _run_process(job: _Job, command: Sequence[str], log: Path) -> int:
    with log.open("ab") as output:
        process = subprocess.Popen(tied(command), stdout=output, stderr=output, process_group=0)
    try:
        while process.poll() is None and not job.stop.requested:
            time.sleep(job.poll)
    finally:
        code = terminate(process)
    return code


def _missing(job: _Job, arm: Arm) -> list[int]:
    done = read_results(arm, job.workdir, job.announce).keys()
    return [seed for seed in job.comparison.seeds if seed not in done]


def _progress(folder: Path) -> int:
    """Steps that an arm's runs have logged or saved, and results, which come after all steps."""
    runs = list(folder.glob("seed-*/"))
    return sum(reached(run) + (run / RESULT).exists() for run in runs)


def arm_command(command: Sequence[str], arm: Arm, seeds: Sequence[int], folder: Path) -> list[str]:
    """The trainer's command line for these seeds of an arm."""
    return [
        *command,
        f"--config={arm.config}",
        *(f"--config.{key}={value}" for key, value in arm.overrides.items()),
        f"--seeds={','.join(map(str, seeds))}",
        f"--workdir={folder}",
    ]


def _done(job: _Job) -> int:
    wanted = set(job.comparison.seeds)
    return sum(not wanted - r.results.keys() or bool(r.error) for r in job.found.values())


def _line(job: _Job, result: ArmResult) -> str:
    if result.error:
        return f"{result.arm.name} failed: {result.error.strip().splitlines()[-1]}"
    if set(job.comparison.seeds) - result.results.keys():
        return f"{result.arm.name} stopped"
    losses = [r["metrics"]["loss"] for r in result.results.values()]
    return f"{result.arm.name}: loss {' '.join(f'{v:.4f}' for v in losses)}"


def _exit_code(comparison: Comparison, arms: Sequence[ArmResult], stop: Stop) -> int:
    if all(not set(comparison.seeds) - arm.results.keys() for arm in arms):
        return 0
    return EXIT_PREEMPTED if stop.requested else 1


def stored(settings: Mapping[str, Any], seed: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What a run leaves as its result."""
    return {"seed": seed, "settings": dict(settings), "metrics": dict(metrics)}
