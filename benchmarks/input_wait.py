"""What the training loop costs beside the bare compiled step: reading, logging, progress, bookkeeping.

Rounds alternate between the loop of `train.py` and the same executable called on one batch that lies
on the device already.
"""

from pathlib import Path
import tempfile
import time
from unittest import mock

import jax

from benchmarks.model_run import fresh_state
from benchmarks.rows import Row, times
from moe import cli, programs, setup
from moe.model.build import model_size
from moe.session import Place, Programs, Session
from moe.training.checkpoint import Checkpointer
from moe.training.collapse import Watch
from moe.training.interruption import Interruption
from moe.training.patience import Patient
from moe.training.progress import Progress
from moe.training.recording import Recorder, read_records
from moe.training.resources import Spare
from moe.training.watchdog import Watchdog
import train

CONFIG, STEPS = "configs/quickstart.py", 10  # steps of one round
LOOP, WAIT = 1.03, 0.02  # bounds


def measure(
    repeats: int, overrides: tuple[tuple[str, str], ...] = (), steps: int = STEPS
) -> list[Row]:
    """The loop over the bare step, and the share of the loop that waits for a batch.

    Args:
        repeats: rounds.
        overrides: pairs of a config key and a value in text, for smaller sizes and other text.
        steps: of one round.
    """
    forced = (("evaluation.batches", "1"), ("log_every", str(steps)))
    run = setup.set_up(cli.load_config(CONFIG, (*overrides, *forced)))
    with jax.set_mesh(run.mesh), tempfile.TemporaryDirectory() as folder:
        bare, lines = rounds(run, Path(folder), repeats, steps)
    loop = [line["speed/step_seconds"] for line in lines]
    wait = tuple(line["speed/data_wait_seconds"] for line in lines)
    return [
        times("training loop / bare step", loop, bare, LOOP),
        Row("input wait of the loop", wait, tuple(loop), WAIT, kind="share"),
    ]


def rounds(
    run: setup.Run, folder: Path, repeats: int, steps: int
) -> tuple[list[float], list[dict]]:
    """Seconds of the bare step and the loop's records, by round; a first round is a warm-up."""
    state = fresh_state(run)
    compiled = programs.compile_train_step(run, state)
    evaluation = programs.compile_eval_step(run, state.params, state.router)
    compiled_once = Programs(compiled, evaluation, None)
    batch = setup.to_device(run.mesh)(next(run.data.train_batches()))
    key, hyper = setup.root_key(0, 1), programs.hyper(run)
    bare, done = [], 0
    with (
        Checkpointer(folder / "checkpoints") as checkpointer,
        Recorder(folder) as recorder,
        Interruption() as interruption,
        Watchdog(60) as watchdog,
        Patient(run.data.train_batches(), lambda: interruption.asked) as batches,
        mock.patch.object(train, "save"),  # a checkpoint is paid for by its interval, not by a step
    ):
        session = Session(
            run=run,
            programs=compiled_once,
            batches=batches,
            workdir=folder,
            checkpointer=checkpointer,
            recorder=recorder,
            progress=Progress(0, visible=False),
            interruption=interruption,
            watchdog=watchdog,
            spare=Spare(),
            events=[],
            watch=Watch(run.config.guards),
            size=model_size(run.spec, run.config.data.sequence_length),
            primary=True,
        )
        for _ in range(repeats + 1):
            started = time.perf_counter()
            for _ in range(steps):
                state, _ = compiled(state, batch, key, hyper)
            jax.block_until_ready(state)
            bare.append((time.perf_counter() - started) / steps)
            done += steps
            run.config.steps = done
            fresh = jax.tree.map(lambda a: a.copy(), state)  # the loop donates what it is given
            train.loop(session, Place(done - steps, fresh, pending=False))
    lines = [r for r in read_records(folder) if r["split"] == "train"]
    return bare[1:], lines[1:]
