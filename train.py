"""Trains a model from a config. Run it again with the same workdir and it goes on where it stopped.

    python3 train.py --config=configs/quickstart.py --workdir=runs/quickstart --config.router.k=4

Exit codes: 0 done, 2 config, 3 data, 4 checkpoint, 75 interrupted with the state saved.
"""

import contextlib
from pathlib import Path
import time
from typing import Any

from absl import flags
import jax

from moe import cli
from moe.config import ConfigDict
from moe.data import tokenizers
from moe.data.tokenizers import Tokenizer
from moe.errors import EXIT_PREEMPTED
from moe.evaluation.evaluate import EvalStep, evaluate, quality
from moe.evaluation.record import evaluation_record, write_json
from moe.model.build import ModelSize, model_size
from moe.parallel import distributed
from moe.parallel.host_memory import keep_freed_memory
from moe.report.run import write_report
from moe.routing.metrics import summarize
from moe.training import setup, throughput
from moe.training.checkpoint import Checkpointer
from moe.training.interruption import Interruption
from moe.training.progress import Progress
from moe.training.recording import Recorder
from moe.training.setup import Run
from moe.training.state import TrainState, abstract_state, initialize
from moe.training.step import StepMetrics
from moe.training.workdir import open_workdir, package_versions, write_config

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "Folder of the run; made if its parent exists.")
distributed.define_flags()


def main(argv: list[str]) -> int:
    """Reads the command line; everything else is `train`."""
    rest, path, overrides = cli.split_overrides(argv)
    cli.parse_flags(rest)
    cli.require_flags(config=path, workdir=FLAGS.workdir)
    config = cli.load_config(str(path), overrides)
    keep_freed_memory()
    distributed.start_from_flags()
    return train(config, Path(FLAGS.workdir))


def train(config: ConfigDict, workdir: Path) -> int:
    """The road: mesh, data, model, state, restore, step, loop, evaluation, report."""
    primary = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        workdir = stack.enter_context(open_workdir(workdir, primary=primary))

        # ---- mesh, data, shape of the model: every mistake in the config shows here
        run = setup.set_up(config, saved_tokenizer(workdir))
        stack.enter_context(jax.set_mesh(run.mesh))

        # ---- state: restored, or fresh
        saves = config.checkpoint
        checkpointer = stack.enter_context(
            Checkpointer(
                workdir / "checkpoints",
                every=saves.every,
                keep_latest=saves.keep_latest,
                keep_best=saves.keep_best,
            )
        )
        batches = run.data.train_batches(*setup.process_block(run.mesh, config.data.batch_size))
        state, start = restore_or_start(run, checkpointer, batches)
        if start >= config.steps:
            print(f"{workdir} is done: {start} of steps={config.steps}.")
            return 0
        if primary:
            write_config(workdir, config.to_dict())
            (workdir / TOKENIZER_FILE).write_text(run.data.tokenizer.to_json())
        recorder = stack.enter_context(Recorder(workdir, primary=primary))
        recorder.rewind(start)
        interruption = stack.enter_context(Interruption())
        progress = Progress(config.steps, start, visible=primary)
        stack.callback(progress.close)

        # ---- step
        started = time.perf_counter()
        train_step, eval_step = setup.compile_train_step(run, state), setup.jit_eval_step(run)
        progress.message(f"compiled the step in {time.perf_counter() - started:.1f} s")
        size = model_size(run.spec, config.data.sequence_length)
        clock = throughput.Clock(size, throughput.peak_flops(), config.data.sequence_length)
        put, key, hyper = (
            setup.to_device(run.mesh),
            setup.root_key(config.seed, 1),
            setup.hyper(run),
        )

        # ---- loop
        for step in range(start + 1, config.steps + 1):
            with clock.waiting():
                batch = put(next(batches))
            state, told = train_step(state, batch, key, hyper)
            last = step == config.steps
            if step % config.log_every == 0 or last:
                values = train_values(told)  # waits for the step
                values |= clock.lap(config.data.batch_size)
                recorder.write(step, "train", values)
                progress.update(step, values)
            best = None
            if step % config.evaluation.every == 0 or last:
                with clock.paused(state):
                    record = evaluate_split(run, eval_step, state, step, "valid", size)
                best = {"bits_per_byte": record["metrics"]["bits_per_byte"]}
                recorder.write(step, "valid", record["metrics"])
                progress.message(describe(record))
                if primary:
                    write_json(workdir / "eval" / f"valid-{step}.json", record)
            stop = interruption.requested(step)
            if checkpointer.due(step) or last or stop:
                meta = {
                    "config": config.to_dict(),
                    "versions": package_versions(),
                    "tokenizer": run.data.tokenizer.to_json(),
                }
                with clock.paused(state):
                    checkpointer.save(step, state._asdict(), batches.get_state(), meta, best)
            if stop and not last:
                progress.message(f"stopped at step {step} with the state saved; run again to go on")
                return EXIT_PREEMPTED

        # ---- report
        checkpointer.wait()
        if primary:
            progress.message(f"report: {write_report(workdir)}")
    return 0


TOKENIZER_FILE = "tokenizer.json"


def saved_tokenizer(workdir: Path) -> Tokenizer | None:
    """The tokenizer of a run that has started before."""
    path = workdir / TOKENIZER_FILE
    return tokenizers.from_json(path.read_text()) if path.exists() else None


def restore_or_start(run: Run, checkpointer: Checkpointer, batches: Any) -> tuple[TrainState, int]:
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


def evaluate_split(
    run: Run, eval_step: EvalStep, state: TrainState, step: int, split: str, size: ModelSize
) -> dict[str, Any]:
    """Evaluates and times one split; the record is what goes to `eval/`."""
    started = time.perf_counter()
    block = setup.process_block(run.mesh, run.config.data.batch_size)
    evaluation = evaluate(
        eval_step,
        state.params,
        state.router,
        run.data.eval_batches(split, *block),
        setup.root_key(run.config.seed, 2),
        domains=run.data.domains,
        to_device=setup.to_device(run.mesh),
        limit=run.config.evaluation.batches,
    )
    seconds = time.perf_counter() - started
    speed = {"speed/tokens_per_second": evaluation.metrics["tokens"] / seconds}
    return evaluation_record(
        evaluation,
        step=step,
        split=split,
        domains=run.data.domains,
        tokenizer=run.data.tokenizer,
        size=size,
        speed=speed | throughput.memory(),
    )


def describe(record: dict[str, Any]) -> str:
    """One line of an evaluation."""
    m = record["metrics"]
    text = (
        f"{record['split']} at step {record['step']}: {m['bits_per_byte']:.4f} bits per byte, "
        f"cross-entropy {m['loss/cross_entropy']:.4f}, accuracy {m['accuracy']:.4f}"
    )
    if "routing/max_violation" in m:
        text += f", max violation {m['routing/max_violation']:.2f}"
    return text


if __name__ == "__main__":
    cli.run(main)
