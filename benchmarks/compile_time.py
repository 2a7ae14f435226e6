"""How compile time grows with depth: the same model of 4 and of 16 layers, cold, in turn.

    python3 benchmarks/compile_time.py [--config=configs/quickstart.py] [--rounds=5]

Layers are scanned, so the ratio should stay near 1; at most 1.2 is the aim.
"""

from pathlib import Path
import sys
import time

from absl import flags
import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from moe import cli, setup
from moe.training.state import abstract_state

FLAGS = flags.FLAGS
flags.DEFINE_integer("rounds", 5, "Pairs of measurements.")
DEPTHS = (4, 16)


def main(argv: list[str]) -> int:
    """Measures and prints."""
    rest, path, overrides = cli.split_overrides(argv)
    cli.parse_flags(rest)
    runs = {}
    for depth in DEPTHS:
        deep = [*overrides, ("model.num_layers", str(depth))]
        runs[depth] = setup.set_up(cli.load_config(path or "configs/quickstart.py", deep))
    seconds: dict[int, list[float]] = {depth: [] for depth in DEPTHS}
    for _ in range(FLAGS.rounds):
        for depth, run in runs.items():
            seconds[depth].append(compile_seconds(run))
    for depth in DEPTHS:
        print(f"{depth:2d} layers  median {np.median(seconds[depth]):.2f} s")
    ratios = np.array(seconds[DEPTHS[1]]) / np.array(seconds[DEPTHS[0]])
    print(f"ratio      median {np.median(ratios):.3f}  ({ratios.min():.3f} to {ratios.max():.3f})")
    return 0


def compile_seconds(run: setup.Run) -> float:
    """Tracing, lowering and compilation of the train step, with every cache emptied."""
    jax.clear_caches()
    with jax.set_mesh(run.mesh):
        state = abstract_state(run.spec, run.transformation, run.shardings)
        started = time.perf_counter()
        setup.compile_train_step(run, state)
        return time.perf_counter() - started


if __name__ == "__main__":
    cli.run(main)
