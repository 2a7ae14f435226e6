"""Trains a model from a config. Run it again with the same workdir and it goes on where it stopped.

    python3 train.py --config=configs/quickstart.py --workdir=runs/quickstart --config.router.k=4

Exit codes: 0 done, 2 config, 3 data, 4 checkpoint, 5 diverged, 6 disk or memory, 70 stuck, 75 interrupted with
the state saved.
"""

from collections.abc import Collection, Generator
import contextlib
from pathlib import Path
import time
from typing import Any, NamedTuple

from absl import flags
import jax

from moe import cli, programs, setup
from moe.config import ConfigDict
from moe.data import tokenizers
from moe.data.router_valid import ROUTER_VALID
from moe.data.tokenizers import Tokenizer
from moe.errors import EXIT_PREEMPTED
from moe.evaluation.evaluate import EvalStep, Evaluation, EvaluationStopped, best_rule
from moe.evaluation.kept_choices import Kept, forget_after, keep
from moe.evaluation.kept_choices import history as kept_history
from moe.evaluation.record import write_json
from moe.model.build import ModelSize, model_size
from moe.parallel import compile_cache, distributed
from moe.parallel.host_memory import reuse_buffers
from moe.report.lines import describe, train_values
from moe.report.run import write_report
from moe.setup import Run
from moe.training import guards, history, resources, throughput, watchdog
from moe.training.checkpoint import Checkpointer
from moe.training.interruption import Interruption
from moe.training.patience import Interrupted, Patient
from moe.training.prior_update import PriorUpdate
from moe.training.progress import Progress
from moe.training.recording import Recorder
from moe.training.resources import Spare
from moe.training.state import TrainState, abstract_state, initialize
from moe.training.step import StepMetrics, TrainStep
from moe.training.watchdog import Watchdog
from moe.training.workdir import open_workdir, package_versions, write_atomically, write_config

FLAGS = flags.FlagValues()  # of this program: another one may import it
flags.DEFINE_string(
    "workdir", None, "Folder of the run; made if its parent exists.", flag_values=FLAGS
)
flags.DEFINE_list(
    "allow_change",
    [],
    "What of the data may differ from the run's checkpoint: seed, fingerprint, weights, "
    "sequence_length, code. Recorded in history.jsonl.",
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
    size: ModelSize
    primary: bool


class Place(NamedTuple):
    """Where a run stands."""

    step: int
    state: TrainState
    pending: bool  # whether the evaluation of this state was interrupted


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
            batches = enter(Patient(run.data.train_batches(*block), lambda: interruption.asked))
            place, changes = restore_or_start(run, checkpointer, batches, workdir, how.allow_change)
            if place.step >= config.steps and not place.pending:
                print(f"{workdir} is done: it stands at step {place.step} of steps={config.steps}.")
                return 0
            resources.check_disk(workdir, resources.state_bytes(place.state))

            # ---- outputs
            recorder = enter(Recorder(workdir, primary=primary))
            recorder.rewind(place.step)
            if primary:
                forget_after(workdir, place.step)
                write_start(run, workdir, place.step, changes, spare)
            progress = Progress(config.steps, place.step, visible=primary)
            stack.callback(progress.close)
            for note in [*setup.notes(config), *setup.data_notes(run.data)]:
                progress.message(f"note: {note}")
            compiled = compile_programs(run, place.state, progress)

        # ---- loop
        size = model_size(run.spec, config.data.sequence_length)
        outputs = (workdir, checkpointer, recorder, progress)
        session = Session(run, compiled, batches, *outputs, interruption, dog, spare, size, primary)
        code = loop(session, place)
        if primary and (page := spare("the report", write_report, workdir)) is not None:
            progress.message(f"report: {page}")
    return code


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


def loop(s: Session, place: Place) -> int:
    """Steps to the end of the run, or to an interruption; the exit code."""
    config = s.run.config
    put, key = setup.to_device(s.run.mesh), setup.root_key(config.seed, 1)
    hyper = programs.hyper(s.run)
    clock = throughput.Clock(s.size, throughput.peak_flops(), config.data.sequence_length)
    step, state = place.step, place.state
    if place.pending and not finish_evaluation(s, place):
        return EXIT_PREEMPTED

    while step < config.steps:
        try:
            with clock.waiting():
                batch = put(next(s.batches))
        except Interrupted:
            if step > place.step:
                save(s, step, state)
            return stopped(s, step)
        state, told = s.programs.train_step(state, batch, key, hyper)
        step += 1
        s.watchdog.beat(f"step {step}")
        state = update_prior(s, step, state)
        if is_due(s, step, config.log_every):
            log(s, step, told, clock)
        if finish_step(s, step, state, clock):
            return stopped(s, step)
    s.checkpointer.wait()
    return 0


def is_due(s: Session, step: int, every: int) -> bool:
    """Whether something is done at this step: at every so many, and at the last."""
    return step % every == 0 or step == s.run.config.steps


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


def stopped(s: Session, step: int) -> int:
    """Says where the run stands, once the state is on disk."""
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


TOKENIZER_FILE = "tokenizer.json"


def saved_tokenizer(workdir: Path) -> Tokenizer | None:
    """The tokenizer of a run that has started before."""
    path = workdir / TOKENIZER_FILE
    return tokenizers.from_json(path.read_text()) if path.exists() else None


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
    if restored is None:
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
    return compiled


PENDING = "pending"  # in a checkpoint's meta: its evaluation was interrupted


def eval_file(workdir: Path, step: int) -> Path:
    """The record of the evaluation of this step."""
    return workdir / "eval" / f"valid-{step}.json"


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
