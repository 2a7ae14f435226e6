"""Trains a model from a config. Run it again with the same workdir and it goes on where it stopped.

    python3 train.py --config=configs/quickstart.py --workdir=runs/quickstart --config.router.k=4

Exit codes: 0 done, 2 config, 3 data, 4 checkpoint, 75 interrupted with the state saved.
"""

import contextlib
from pathlib import Path
import time
from typing import Any, NamedTuple

from absl import flags
import jax

from moe import cli, programs, setup
from moe.config import ConfigDict
from moe.data import tokenizers
from moe.data.batches import TrainBatches
from moe.data.router_valid import ROUTER_VALID
from moe.data.tokenizers import Tokenizer
from moe.errors import EXIT_PREEMPTED
from moe.evaluation.evaluate import Evaluation, best_rule, quality
from moe.evaluation.kept_choices import Kept, forget_after, history, keep
from moe.evaluation.record import write_json
from moe.model.build import model_size
from moe.parallel import compile_cache, distributed
from moe.parallel.host_memory import reuse_buffers
from moe.report.run import write_report
from moe.routing.metrics import summarize
from moe.setup import Run
from moe.training import throughput
from moe.training.checkpoint import Checkpointer
from moe.training.interruption import Interruption
from moe.training.progress import Progress
from moe.training.recording import Recorder
from moe.training.state import TrainState, abstract_state, initialize
from moe.training.step import StepMetrics
from moe.training.workdir import open_workdir, package_versions, write_config

FLAGS = flags.FlagValues()  # of this program: another one may import it
flags.DEFINE_string(
    "workdir", None, "Folder of the run; made if its parent exists.", flag_values=FLAGS
)
distributed.define_flags(FLAGS)
compile_cache.define_flag(FLAGS)


def main(argv: list[str]) -> int:
    """Reads the command line; everything else is `train`."""
    rest, path, overrides = cli.split_overrides(argv)
    cli.parse_flags(rest, FLAGS)
    cli.require_flags(config=path, workdir=FLAGS.workdir)
    config = cli.load_config(str(path), overrides)
    reuse_buffers()
    distributed.start_from_flags(FLAGS)
    return train(config, Path(FLAGS.workdir), FLAGS.compile_cache)


def train(config: ConfigDict, workdir: Path, cache: str | None = None) -> int:
    """The road: mesh, data, model, state, restore, step, loop, evaluation, report."""
    primary = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        workdir = stack.enter_context(open_workdir(workdir, primary=primary))
        interruption = stack.enter_context(Interruption())
        stack.enter_context(compile_cache.persistent(workdir, cache, primary=primary))

        # ---- mesh, data, shape of the model: every mistake in the config shows here
        run = setup.set_up(config, saved_tokenizer(workdir))
        stack.enter_context(jax.set_mesh(run.mesh))

        # ---- state: restored, or fresh
        best = best_rule(config.task.name)
        checkpointer = stack.enter_context(
            Checkpointer(
                workdir / "checkpoints",
                best_metric=best.metric,
                best_mode=best.mode,
                **config.checkpoint,
            )
        )
        batches = run.data.train_batches(*setup.process_block(run.mesh, config.data.batch_size))
        state, start = restore_or_start(run, checkpointer, batches)
        if start >= config.steps:
            print(f"{workdir} is done: it stands at step {start} of steps={config.steps}.")
            return 0

        # ---- outputs
        if primary:
            write_config(workdir, config.to_dict())
            (workdir / TOKENIZER_FILE).write_text(run.data.tokenizer.to_json())
        recorder = stack.enter_context(Recorder(workdir, primary=primary))
        recorder.rewind(start)
        if primary:
            forget_after(workdir, start)
        progress = Progress(config.steps, start, visible=primary)
        stack.callback(progress.close)
        for note in [*setup.notes(config), *setup.data_notes(run.data)]:
            progress.message(f"note: {note}")

        # ---- loop
        out = Outputs(workdir, checkpointer, recorder, progress, interruption, primary)
        code = loop(run, state, start, batches, out)
        if primary:
            progress.message(f"report: {write_report(workdir)}")
    return code


class Outputs(NamedTuple):
    """Where a run leaves what it finds."""

    workdir: Path
    checkpointer: Checkpointer
    recorder: Recorder
    progress: Progress
    interruption: Interruption
    primary: bool


def loop(run: Run, state: TrainState, start: int, batches: TrainBatches, out: Outputs) -> int:
    """Steps from `start` to the end of the run, or to an interruption."""
    config = run.config
    started = time.perf_counter()
    train_step = programs.compile_train_step(run, state)
    eval_step = programs.compile_eval_step(run, state.params, state.router)
    prior_update = programs.compile_prior_update(run, state)
    out.progress.message(f"compiled in {time.perf_counter() - started:.1f} s")
    size = model_size(run.spec, config.data.sequence_length)
    put, key, hyper = setup.to_device(run.mesh), setup.root_key(config.seed, 1), programs.hyper(run)
    clock = throughput.Clock(size, throughput.peak_flops(), config.data.sequence_length)

    for step in range(start + 1, config.steps + 1):
        with clock.waiting():
            batch = put(next(batches))
        state, told = train_step(state, batch, key, hyper)
        last = step == config.steps
        if prior_update is not None and prior_update.due(step):
            router, judged = prior_update(step, state.params, state.router)
            state = state._replace(router=router)
            out.recorder.write(step, ROUTER_VALID, judged)
        if step % config.log_every == 0 or last:
            values = train_values(told)  # waits for the step
            values |= clock.lap(config.data.batch_size)
            out.recorder.write(step, "train", values)
            out.progress.update(step, values)
            out.checkpointer.poll()  # a save that failed is not left for the next one to tell
        found = None
        if step % config.evaluation.every == 0 or last:
            with clock.paused(state):
                found, evaluation = setup.evaluate_split(
                    run,
                    eval_step,
                    state.params,
                    state.router,
                    split="valid",
                    step=step,
                    size=size,
                )
                leave(found, evaluation, out, last=last)
        stop = out.interruption.requested()
        if out.checkpointer.due(step) or last or stop:
            with clock.paused(state):
                save(run, step, state, batches, found, out.checkpointer)
        if stop and not last:
            out.progress.message(f"stopped at step {step}, state saved; run it again to go on")
            return EXIT_PREEMPTED
    out.checkpointer.wait()
    return 0


TOKENIZER_FILE = "tokenizer.json"


def saved_tokenizer(workdir: Path) -> Tokenizer | None:
    """The tokenizer of a run that has started before."""
    path = workdir / TOKENIZER_FILE
    return tokenizers.from_json(path.read_text()) if path.exists() else None


def restore_or_start(
    run: Run, checkpointer: Checkpointer, batches: TrainBatches
) -> tuple[TrainState, int]:
    """The newest checkpoint with its place in the data, or a fresh state at step 0."""
    latest = checkpointer.latest_step()
    if latest is None:
        make = jax.jit(
            lambda key: initialize(run.spec, run.transformation, key),
            out_shardings=run.shardings,
        )
        return make(setup.root_key(run.config.seed, 0)), 0
    template = abstract_state(run.spec, run.transformation, run.shardings)
    restored = checkpointer.restore(latest, template._asdict())
    batches.set_state(restored.data_state)
    return TrainState(**restored.state), latest


def train_values(told: StepMetrics) -> dict[str, Any]:
    """The line of metrics.jsonl of one step: quality before the update, losses, routing."""
    told = jax.device_get(told)
    values = {f"loss/{name}": float(value) for name, value in told.losses.items()}
    values |= {k: v for k, v in quality(told.rows).items() if k not in ("perplexity", "tokens")}
    values |= {"learning_rate": float(told.learning_rate), "grad_norm": float(told.grad_norm)}
    return values if told.totals is None else values | summarize(told.totals)


def leave(record: dict[str, Any], evaluation: Evaluation, out: Outputs, *, last: bool) -> None:
    """Records an evaluation, with how its choices differ from those of the evaluations before."""
    step, split = record["step"], record["split"]
    if out.primary and evaluation.choices is not None:
        experts = len(record["metrics"]["routing/load"][0])
        keep(out.workdir, split, Kept(step, evaluation.choices, experts))
        churn, curve = history(out.workdir, split, step)
        record["metrics"] |= churn
        record |= {"saturation": curve} if last else {}
    out.recorder.write(step, split, record["metrics"])
    out.progress.message(describe(record))
    if out.primary:
        write_json(out.workdir / "eval" / f"{split}-{step}.json", record)


def save(
    run: Run,
    step: int,
    state: TrainState,
    batches: TrainBatches,
    found: dict[str, Any] | None,
    checkpointer: Checkpointer,
) -> None:
    """Starts a checkpoint; `found` is the evaluation of this very state, if there was one."""
    meta = {
        "config": run.config.to_dict(),
        "versions": package_versions(),
        "tokenizer": run.data.tokenizer.to_json(),
    }
    name = best_rule(run.config.task.name).metric
    best = None if found is None else {name: found["metrics"][name]}
    checkpointer.save(step, state._asdict(), batches.get_state(), meta, best)


def describe(record: dict[str, Any]) -> str:
    """One line of an evaluation."""
    m = record["metrics"]
    text = f"{record['split']} at step {record['step']}: "
    if "bits_per_byte" in m:
        text += f"{m['bits_per_byte']:.4f} bits per byte, "
    text += f"cross-entropy {m['loss/cross_entropy']:.4f}, accuracy {m['accuracy']:.4f}"
    if "routing/max_violation" in m:
        text += f", max violation {m['routing/max_violation']:.2f}"
    if "routing/causal_gap" in m:
        text += f", causal gap {m['routing/causal_gap']:+.4f}"
    if record["causality"]["causal_form"] is False:
        text += ", no causal form: not the loss of a model that can generate"
    return text


if __name__ == "__main__":
    cli.run(main)
