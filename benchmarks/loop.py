"""What the training loop costs beside the bare compiled step: reading, logging, progress, bookkeeping.

    python3 benchmarks/loop.py [--config=configs/quickstart.py] [--rounds=7] [--steps=10]

Rounds alternate between the loop of `train.py` and the same executable called on one batch that lies
on the device already. Prints the median of each and the median of the ratios; at most 1.03 is the aim.
"""

from pathlib import Path
import sys
import tempfile
import time
from unittest import mock

from absl import flags
import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from moe import cli, setup
from moe.parallel.host_memory import reuse_buffers
from moe.training.checkpoint import Checkpointer
from moe.training.interruption import Interruption
from moe.training.progress import Progress
from moe.training.recording import Recorder, read_records
import train

FLAGS = flags.FLAGS
flags.DEFINE_integer("rounds", 7, "Pairs of measurements.")
flags.DEFINE_integer("steps", 10, "Steps of one measurement.")


def main(argv: list[str]) -> int:
    """Measures and prints."""
    rest, path, overrides = cli.split_overrides(argv)
    cli.parse_flags(rest)
    reuse_buffers()
    overrides = [*overrides, ("evaluation.batches", "1"), ("log_every", str(FLAGS.steps))]
    config = cli.load_config(path or "configs/quickstart.py", overrides)
    run = setup.set_up(config)
    with jax.set_mesh(run.mesh), tempfile.TemporaryDirectory() as folder:
        bare, loop = measure(run, Path(folder))
    ratios = np.array(loop) / np.array(bare)
    print(f"bare step   median {np.median(bare):.4f} s")
    print(f"loop step   median {np.median(loop):.4f} s")
    print(f"loop / bare median {np.median(ratios):.3f}  ({ratios.min():.3f} to {ratios.max():.3f})")
    return 0


def measure(run: setup.Run, folder: Path) -> tuple[list[float], list[float]]:
    """Seconds a step, bare and in the loop, round by round; the first round is a warm-up."""
    state = jax.jit(
        lambda key: train.initialize(run.spec, run.transformation, key),
        out_shardings=run.shardings,
    )(setup.root_key(0, 0))
    compiled = setup.compile_train_step(run, state)
    evaluation = setup.compile_eval_step(run, state.params, state.router)
    batches = run.data.train_batches()
    batch = setup.to_device(run.mesh)(next(batches))
    key, hyper = setup.root_key(0, 1), setup.hyper(run)
    bare, done = [], 0
    with (
        Checkpointer(folder / "checkpoints") as checkpointer,
        Recorder(folder) as recorder,
        Interruption() as interruption,
        mock.patch.object(setup, "compile_train_step", return_value=compiled),
        mock.patch.object(setup, "compile_eval_step", return_value=evaluation),
        mock.patch.object(train, "save"),  # a checkpoint is paid for by its interval, not by a step
    ):
        for _ in range(FLAGS.rounds + 1):
            started = time.perf_counter()
            for _ in range(FLAGS.steps):
                state, _ = compiled(state, batch, key, hyper)
            jax.block_until_ready(state)
            bare.append((time.perf_counter() - started) / FLAGS.steps)
            done += FLAGS.steps
            run.config.steps = done
            progress = Progress(done)
            out = train.Outputs(folder, checkpointer, recorder, progress, interruption, True)
            fresh = jax.tree.map(lambda a: a.copy(), state)  # the loop donates what it is given
            train.loop(run, fresh, done - FLAGS.steps, batches, out)
            progress.close()
    lines = [r for r in read_records(folder) if r["split"] == "train"]
    return bare[1:], [r["speed/step_seconds"] for r in lines][1:]


if __name__ == "__main__":
    cli.run(main)
