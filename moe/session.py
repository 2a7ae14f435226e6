"""A run that is set up: what its loop holds, where it stands, and how it goes back."""

from collections.abc import Collection, Generator
import contextlib
from pathlib import Path
import time
from typing import Any, NamedTuple

import jax

from moe import programs, setup
from moe.data import tokenizers
from moe.data.place import IDENTITY
from moe.data.tokenizers import Tokenizer
from moe.errors import DataError, DivergedError
from moe.evaluation.evaluate import EvalStep
from moe.evaluation.kept_choices import forget_after
from moe.evaluation.record import forget_records_after
from moe.model.build import ModelSize
from moe.parallel.meeting import meet
from moe.setup import Run
from moe.training import guards, history, resources, rewind
from moe.training.checkpoint import Checkpointer
from moe.training.collapse import Watch
from moe.training.guards import GuardState
from moe.training.interruption import Interruption
from moe.training.patience import Patient
from moe.training.prior_update import PriorUpdate
from moe.training.progress import Progress
from moe.training.recording import Recorder
from moe.training.resources import Spare
from moe.training.state import TrainState, abstract_state, initialize
from moe.training.step import TrainStep
from moe.training.watchdog import Watchdog
from moe.training.workdir import write_atomically, write_config

TOKENIZER_FILE = "tokenizer.json"
PENDING = "pending"  # in a checkpoint's meta: its evaluation was interrupted


def eval_file(workdir: Path, step: int) -> Path:
    """The record of the evaluation of this step."""
    return workdir / "eval" / f"valid-{step}.json"


class Programs(NamedTuple):
    """What was compiled for this run."""

    train_step: TrainStep
    eval_step: EvalStep
    prior_update: PriorUpdate | None


class Session(NamedTuple):
    """A run that is set up: what its loop runs, reads and writes."""

    run: Run
    programs: Programs
    batches: Patient
    workdir: Path
    checkpointer: Checkpointer
    recorder: Recorder
    progress: Progress
    interruption: Interruption
    watchdog: Watchdog
    spare: Spare
    events: list[dict[str, Any]]  # of history.jsonl
    watch: Watch
    size: ModelSize
    primary: bool


class Place(NamedTuple):
    """Where a run stands."""

    step: int
    state: TrainState
    pending: bool  # whether the evaluation of this state was interrupted


@contextlib.contextmanager
def explained(run: Run) -> Generator[None]:
    """An error of a disk or a memory that is too small becomes one that says what to change."""
    try:
        yield
    except Exception as error:
        told = resources.translate(error, lambda: resources.estimate(run))
        if told is None:
            raise
        raise told from error


def saved_tokenizer(workdir: Path) -> Tokenizer | None:
    """The tokenizer of a run that has started before.

    Raises:
        DataError: its file cannot be read.
    """
    path = workdir / TOKENIZER_FILE
    try:
        return tokenizers.from_json(path.read_bytes()) if path.exists() else None
    except (OSError, DataError) as error:
        raise DataError(
            f"{path} cannot be read: {str(error).rstrip('.')}. The run's tokens have the meaning that it "
            "gives them. Restore it from a copy, or remove it: the same data and config make the same one."
        ) from error


def past_rewinds(place: Place, batches: Patient, events: list[dict[str, Any]]) -> Place:
    """The place after the rewinds that led back to it."""
    found = batches.get_state()
    row = rewind.resume_row(events, place.step, found["next_row"])
    if row == found["next_row"]:
        return place
    batches.set_state({**found, "next_row": row})
    state = place.state._replace(guard=guards.rested(place.state.guard))
    return place._replace(state=state)


def restore_or_start(
    run: Run,
    checkpointer: Checkpointer,
    batches: Patient,
    workdir: Path,
    allow_change: Collection[str],
) -> tuple[Place, dict[str, list[Any]]]:
    """The newest checkpoint with its place in the data, or a fresh state at step 0.

    Also what of the data was allowed to differ from the checkpoint's, `{key: [then, now]}`.
    """
    window = run.config.guards.window
    template = abstract_state(run.spec, run.transformation, run.shardings, window)
    restored = checkpointer.restore_newest(
        template._asdict(),
        fresh={"guard": jax.device_put(guards.fresh(window), run.shardings.guard)},
    )
    if restored is None or restored.step < run.config.steps:
        resources.check_disk(workdir, resources.state_bytes(template))
    if restored is None:
        # A run that goes back is elsewhere in the data.
        batches.set_state({**batches.get_state(), "next_row": 0})
        make = jax.jit(
            lambda key: initialize(run.spec, run.transformation, key, window),
            out_shardings=run.shardings,
        )
        return Place(0, make(setup.root_key(run.config.seed, 0)), False), {}
    changes = batches.set_state(restored.data_state, allow_change)
    pending = (
        restored.meta.get("evaluation") == PENDING
        and not eval_file(workdir, restored.step).exists()
    )
    return Place(restored.step, TrainState(**restored.state), pending), changes


def write_start(
    run: Run, workdir: Path, step: int, changes: dict[str, list[Any]], spare: Spare
) -> None:
    """What this run is and how it differs from its last start: for people, and for `eval.py`."""
    config = run.config.to_dict()
    event = history.started(workdir, step=step, config=config, data_changes=changes)
    spare("the history", history.append, workdir, **event)
    spare("the config", write_config, workdir, config)
    spare("the tokenizer", write_atomically, workdir / TOKENIZER_FILE, run.data.tokenizer.to_json())


def compile_programs(run: Run, state: TrainState, progress: Progress) -> Programs:
    """Every program of the loop, before its first step."""
    started = time.perf_counter()
    compiled = Programs(
        programs.compile_train_step(run, state),
        programs.compile_eval_step(run, state.params, state.router),
        programs.compile_prior_update(run, state),
    )
    progress.message(f"compiled in {time.perf_counter() - started:.1f} s")
    meet("compiled")
    return compiled


def heeded(s: Session, step: int, guard: GuardState) -> rewind.Verdict:
    """Whether the run goes on or back; raises DivergedError if it can do neither."""
    guard, limits = jax.device_get(guard), s.run.config.guards
    verdict = rewind.verdict(guard, limits, s.events)
    if verdict == "end":
        newest = s.checkpointer.latest_step()
        raise DivergedError(rewind.why(guard, limits, step, newest))
    return verdict


def go_back(s: Session, step: int, guard: GuardState) -> Place:
    """To a checkpoint from before the row of spikes and past its batches, as `moe.training.rewind` says."""
    guard, config = jax.device_get(guard), s.run.config
    row = s.batches.get_state()["next_row"]
    first = rewind.first_of_row(guard, step)
    s.checkpointer.retire_after(
        rewind.go_back_to(s.checkpointer.all_steps(), first, config.checkpoint.every)
    )
    # What has changed in the data since then was allowed when it did.
    place, _ = restore_or_start(s.run, s.checkpointer, s.batches, s.workdir, IDENTITY)
    event = rewind.plan(
        s.events,
        place.step,
        s.batches.get_state()["next_row"],
        guard=guard,
        row=row,
        batch_size=config.data.batch_size,
        limits=config.guards,
    )
    if s.primary:
        history.append(s.workdir, **event)
    s.events.append(event)
    s.recorder.close()
    forget(s.workdir, place.step, s.recorder, primary=s.primary)
    s.progress.message(
        f"warning: the loss spiked {config.guards.spikes} times in a row up to step "
        f"{step - rewind.lateness(guard, config.guards)}: back to step {place.step}, and past the batches "
        "that spiked"
    )
    return past_rewinds(place, s.batches, s.events)


def forget(workdir: Path, step: int, recorder: Recorder, *, primary: bool) -> None:
    """What was recorded after a step that the run goes on from."""
    recorder.rewind(step)
    if primary:
        forget_after(workdir, step)
        forget_records_after(workdir, step)
