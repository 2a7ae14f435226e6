"""How long the train step compiles, cold, and how that grows with depth: layers are scanned."""

import time

import jax

from benchmarks.model_run import random_run
from benchmarks.rows import Row, times
from benchmarks.timing import interleave
from moe import cli, programs, setup
from moe.training.state import abstract_state

CONFIG, DEPTHS = "configs/quickstart.py", (4, 16)
SECONDS, GROWTH = 20.0, 1.2  # bounds
MOST = 5  # rounds, of three compilations of many seconds each


def measure(
    repeats: int,
    overrides: tuple[tuple[str, str], ...] = (),
    depths: tuple[int, int] = DEPTHS,
) -> list[Row]:
    """Seconds of the config as it is, and the ratio of the deeper to the less deep.

    Args:
        repeats: rounds, at most MOST.
        overrides: pairs of a config key and a value in text, for smaller sizes.
        depths: the less deep and the deeper, in layers.
    """
    runs = {"as it is": random_run(cli.load_config(CONFIG, overrides))}
    for depth in depths:
        deep = (*overrides, ("model.num_layers", str(depth)))
        runs[str(depth)] = random_run(cli.load_config(CONFIG, deep))
    cold = {name: _Cold(run) for name, run in runs.items()}
    took = interleave(cold, min(repeats, MOST), warm_up=False)
    less, more = (took[str(depth)] for depth in depths)
    above = tuple(took["as it is"])
    name = "quickstart train step compiles in"
    return [
        Row(name, above, (1.0,) * len(above), SECONDS, kind="seconds"),
        times(f"compile time of {depths[1]} layers / {depths[0]}", more, less, GROWTH),
    ]


class _Cold:
    """Tracing, lowering and compilation of the train step, with every cache emptied."""

    def __init__(self, run: setup.Run):
        self._run = run

    def __call__(self) -> float:
        jax.clear_caches()
        with jax.set_mesh(self._run.mesh):
            state = abstract_state(self._run.spec, self._run.transformation, self._run.shardings)
            started = time.perf_counter()
            programs.compile_train_step(self._run, state)
            return time.perf_counter() - started
