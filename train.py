"""Trains a model from a config. Run it again with the same workdir and it goes on where it stopped.

    python3 train.py --config=configs/quickstart.py --workdir=runs/quickstart --config.router.k=4

Exit codes: 0 done, 2 config, 3 data, 4 checkpoint, 5 diverged, 6 disk or memory, 70 stuck, 75 interrupted with
the state saved.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from moe import early_signals

    early_signals.listen()

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
import jax

from moe import cli, programs, setup
from moe.config import ConfigDict
from moe.data.place import IDENTITY
from moe.data.router_valid import ROUTER_VALID
from moe.errors import EXIT_PREEMPTED
from moe.evaluation.evaluate import Evaluation, EvaluationStopped, best_rule
from moe.evaluation.kept_choices import Kept, keep
from moe.evaluation.kept_choices import history as kept_history
from moe.evaluation.record import write_json
from moe.model.build import model_size
from moe.parallel import compile_cache, distributed
from moe.parallel.host_memory import reuse_buffers
from moe.report.lines import describe, train_values
from moe.report.run import write_report
from moe.session import (
    PENDING,
    Place,
    Session,
    compile_programs,
    eval_file,
    explained,
    forget,
    go_back,
    heeded,
    past_rewinds,
    restore_or_start,
    saved_tokenizer,
    write_start,
)
from moe.setup import Run
from moe.training import history, throughput, watchdog
from moe.training.checkpoint import Checkpointer
from moe.training.collapse import Watch
from moe.training.interruption import Interruption
from moe.training.patience import Interrupted, Patient
from moe.training.progress import Progress
from moe.training.recording import Recorder
from moe.training.resources import Spare
from moe.training.state import TrainState
from moe.training.step import StepMetrics
from moe.training.watchdog import Watchdog
from moe.training.workdir import open_workdir, package_versions

FLAGS = flags.FlagValues()  # of this program: another one may import it
flags.DEFINE_string(
    "workdir", None, "Folder of the run; made if its parent exists.", flag_values=FLAGS
)
flags.DEFINE_list(
    "allow_change",
    [],
    f"What of the data may differ from the run's checkpoint: {', '.join(IDENTITY)}. Recorded in "
    "history.jsonl.",
    flag_values=FLAGS,
)
distributed.define_flags(FLAGS)
compile_cache.define_flag(FLAGS)
watchdog.define_flag(FLAGS)


class How(NamedTuple):
    """Flags that change no number of a run."""

    compile_cache: str | None = None
    stuck_after: float | int = 0
    allow_change: tuple[str, ...] = ()


def main(argv: list[str]) -> int:
    """Reads the command line; everything else is `train`."""
    rest, path, overrides = cli.split_overrides(argv)
    cli.parse_flags(rest, FLAGS)
    cli.require_flags(config=path, workdir=FLAGS.workdir)
    config = cli.load_config(str(path), overrides)
    reuse_buffers()
    distributed.start_from_flags(FLAGS)
    how = How(FLAGS.compile_cache, FLAGS.stuck_after, tuple(FLAGS.allow_change))
    return train(config, Path(FLAGS.workdir), how)


def train(config: ConfigDict, workdir: Path, how: How) -> int:
    """The road: mesh, data, model, state, restore, step, loop, evaluation, report."""
    primary = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        workdir = enter(open_workdir(workdir, primary=primary))
        interruption, dog, spare = enter(Interruption()), enter(Watchdog(how.stuck_after)), Spare()
        enter(compile_cache.persistent(workdir, how.compile_cache, primary=primary))
        with interruption.nothing_to_lose(), dog.patient("the set-up"):
            # ---- mesh, data, shape of the model: every mistake in the config shows here
            run = setup.set_up(config, saved_tokenizer(workdir))
            enter(jax.set_mesh(run.mesh))
            enter(explained(run))

            # ---- state: restored, or fresh
            best = best_rule(config.task.name)
            checkpointer = enter(
                Checkpointer(
                    workdir / "checkpoints",
                    best_metric=best.metric,
                    best_mode=best.mode,
                    **config.checkpoint,
                )
            )
            block = setup.process_block(run.mesh, config.data.batch_size)
            reader = run.data.train_batches(*block)
            batches = enter(Patient(reader, lambda: interruption.asked))
            place, changes = restore_or_start(run, checkpointer, batches, workdir, how.allow_change)
            events = history.read(workdir)
            place = past_rewinds(place, batches, events)
            if place.step >= config.steps and not place.pending:
                print(f"{workdir} is done: it stands at step {place.step} of steps={config.steps}.")
                return 0

            # ---- outputs
            recorder = enter(Recorder(workdir, primary=primary))
            forget(workdir, place.step, recorder, primary=primary)
            if primary:
                write_start(run, workdir, place.step, changes, spare)
            progress = Progress(config.steps, place.step, visible=primary)
            stack.callback(progress.close)
            for note in [*setup.notes(config), *setup.data_notes(run.data)]:
                progress.message(f"note: {note}")
            reader.start()  # reads ahead while the programs compile
            compiled = compile_programs(run, place.state, progress)

        # ---- loop
        session = Session(
            run=run,
            programs=compiled,
            batches=batches,
            workdir=workdir,
            checkpointer=checkpointer,
            recorder=recorder,
            progress=progress,
            interruption=interruption,
            watchdog=dog,
            spare=spare,
            events=events,
            watch=Watch(config.guards),
            size=model_size(run.spec, config.data.sequence_length),
            primary=primary,
        )
        if place.pending and not finish_evaluation(session, place):
            return stopped(session, place.step)
        code = loop(session, place)
        if primary and (page := spare("the report", write_report, workdir)) is not None:
            progress.message(f"report: {page}")
    return code


def loop(s: Session, place: Place) -> int:
    """Steps to the end of the run, or to an interruption; the exit code."""
    config = s.run.config
    put, key = setup.to_device(s.run.mesh), setup.root_key(config.seed, 1)
    hyper = programs.hyper(s.run)
    clock = throughput.Clock(s.size, throughput.peak_flops(), config.data.sequence_length)
    milestones = (config.log_every, config.evaluation.every, config.checkpoint.every)
    step, state, _ = place

    while step < config.steps:
        try:
            with clock.waiting():
                batch = put(next(s.batches))
        except Interrupted:
            return stopped(s, step, state if step > place.step else None)
        state, told = s.programs.train_step(state, batch, key, hyper)
        step += 1
        s.watchdog.beat(f"step {step}")
        state = update_prior(s, step, state)
        if is_due(s, step, config.log_every):
            log(s, step, told, clock)
        if is_due(s, step, *milestones) and heeded(s, step, told.guard) == "rewind":
            del state  # makes room for the one that is restored
            step, state, _ = place = go_back(s, step, told.guard)
        elif finish_step(s, step, state, clock):
            return stopped(s, step)
    s.checkpointer.wait()
    return 0


def is_due(s: Session, step: int, *every: int) -> bool:
    """Whether something is done at this step: at every so many, and at the last."""
    return step == s.run.config.steps or any(step % one == 0 for one in every)


def finish_step(s: Session, step: int, state: TrainState, clock: throughput.Clock) -> bool:
    """Evaluates and saves where that is due; whether the run has to stop here, short of its end."""
    found, pending = None, False
    if is_due(s, step, s.run.config.evaluation.every):
        with clock.paused(state):
            found = evaluate(s, step, state)
        pending = found is None
    stop = pending or s.interruption.requested()
    if stop or is_due(s, step, s.run.config.checkpoint.every):
        with clock.paused(state):
            save(s, step, state, found, pending=pending)
    return pending or (stop and step < s.run.config.steps)


def log(s: Session, step: int, told: StepMetrics, clock: throughput.Clock) -> None:
    """Records a step, and looks at the save in the background: a failure is told at once."""
    values = train_values(told)  # waits for the step
    values |= clock.lap(s.run.config.data.batch_size)
    s.recorder.write(step, "train", values)
    s.progress.update(step, values)
    s.checkpointer.poll()


def stopped(s: Session, step: int, unsaved: TrainState | None = None) -> int:
    """Says where the run stands, once the state is on disk."""
    if unsaved is not None:
        save(s, step, unsaved)
    s.checkpointer.wait()
    s.progress.message(f"stopped at step {step}, state saved; run it again to go on")
    return EXIT_PREEMPTED


def update_prior(s: Session, step: int, state: TrainState) -> TrainState:
    """The state with the router's prior of this step, where one is due."""
    update = s.programs.prior_update
    if update is None or not update.due(step):
        return state
    router, judged = update(step, state.params, state.router)
    s.recorder.write(step, ROUTER_VALID, judged)
    return state._replace(router=router)


def evaluate(s: Session, step: int, state: TrainState) -> dict[str, Any] | None:
    """The record of an evaluation, left in all outputs; None if the run was asked to stop in it."""

    def stop() -> bool:
        s.watchdog.beat(f"a batch of the evaluation at step {step}")
        return s.interruption.requested()

    try:
        found, evaluation = setup.evaluate_split(
            s.run,
            s.programs.eval_step,
            state.params,
            state.router,
            split="valid",
            step=step,
            size=s.size,
            stop=stop,
        )
    except EvaluationStopped:
        return None
    leave(s, found, evaluation)
    if (advice := s.watch.look(found["metrics"])) is not None:
        s.progress.message(f"warning: {advice}")
    return found


def finish_evaluation(s: Session, place: Place) -> bool:
    """Makes up for an evaluation that was interrupted; False if it was again."""
    found = evaluate(s, place.step, place.state)
    if found is None:
        return False
    s.spare("the score of a checkpoint", s.checkpointer.rate, place.step, score(s.run, found))
    return True


def score(run: Run, found: dict[str, Any]) -> dict[str, Any]:
    """What the best checkpoint is chosen by."""
    name = best_rule(run.config.task.name).metric
    return {name: found["metrics"][name]}


def leave(s: Session, record: dict[str, Any], evaluation: Evaluation) -> None:
    """Records an evaluation, with how its choices differ from those of the evaluations before."""
    step, split = record["step"], record["split"]
    if s.primary and evaluation.choices is not None:
        experts = len(record["metrics"]["routing/load"][0])
        s.spare("kept choices", keep, s.workdir, split, Kept(step, evaluation.choices, experts))
        churn, curve = kept_history(s.workdir, split, step)
        record["metrics"] |= churn
        record |= {"saturation": curve} if step == s.run.config.steps else {}
    s.recorder.write(step, split, record["metrics"])
    s.progress.message(describe(record))
    if s.primary:
        s.spare("the record of an evaluation", write_json, eval_file(s.workdir, step), record)


def save(
    s: Session,
    step: int,
    state: TrainState,
    found: dict[str, Any] | None = None,
    *,
    pending: bool = False,
) -> None:
    """Starts a checkpoint; `found` is the evaluation of this very state, if there was one."""
    heeded(s, step, state.guard)  # a state that ends the run is not saved, whoever asks
    meta = {
        "config": s.run.config.to_dict(),
        "versions": package_versions(),
        "tokenizer": s.run.data.tokenizer.to_json(),
    }
    if pending:
        meta["evaluation"] = PENDING
    best = None if found is None else score(s.run, found)
    s.checkpointer.save(step, state._asdict(), s.batches.get_state(), meta, best)


if __name__ == "__main__":
    cli.run(main)
