"""What protection costs: guards in the training step, calls beside it, verification of a save.

    python3 benchmarks/guards.py            # three minutes; --quick: one, at sizes that show little
    python3 benchmarks/run.py --only=guards

The step without guards is the same step, compiled while the judges of `moe.training.guards` are
replaced by constants: XLA then drops the condition and the second update. A save without verification
is Orbax with the same options: no digest, no look for what is not finite, no record, no manifest.
"""

from collections.abc import Callable, Generator
import contextlib
import os
from pathlib import Path
import statistics
import sys
import tempfile
import time
from typing import Any
from unittest import mock

from absl import flags
import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import table
from benchmarks.model_run import Training, random_run
from benchmarks.rows import Row, times
from benchmarks.timing import Timed, interleave
from moe import cli
from moe.parallel.host_memory import reuse_buffers
from moe.training import guards
from moe.training.checkpoint import Checkpointer
from moe.training.interruption import Interruption
from moe.training.patience import Patient
from moe.training.store import Store
from moe.training.watchdog import Watchdog

CONFIG = "configs/quickstart.py"
STEP, SAVE = 1.03, 1.10  # bounds
MEGABYTES = 100  # of state
LEAF = 4  # megabytes of one of its leaves
CALLS = 2000  # of what is too short to be timed once
STEPS = 3  # of one round
SMALL = (("data.batch_size", "8"), ("data.sequence_length", "64"), ("model.num_layers", "2"))

FLAGS = flags.FlagValues()
flags.DEFINE_bool(
    "quick", False, "smaller sizes: whether it runs, not what it costs", flag_values=FLAGS
)
flags.DEFINE_integer("repeats", 9, "rounds", lower_bound=5, flag_values=FLAGS)


def measure(
    repeats: int, overrides: tuple[tuple[str, str], ...] = (), megabytes: int = MEGABYTES
) -> list[Row]:
    """The rows of the step, of the calls beside it, and of a save.

    Args:
        repeats: rounds.
        overrides: pairs of a config key and a value in text, for smaller sizes.
        megabytes: of the state that is saved.
    """
    return [*step_rows(repeats, overrides), *save_rows(repeats, megabytes)]


def step_rows(repeats: int, overrides: tuple[tuple[str, str], ...] = ()) -> list[Row]:
    """The step with its guards over the one without, and the share of the calls beside a step."""
    config = cli.load_config(CONFIG, overrides)
    guarded = Training(random_run(config))
    with without_guards():
        bare = Training(random_run(config))
    took = interleave({"guarded": several(guarded), "bare": several(bare)}, repeats)
    calls = {name: [timed() for _ in range(repeats)] for name, timed in host_calls().items()}
    total = [sum(rounds) for rounds in zip(*calls.values(), strict=True)]
    told = ", ".join(f"{n} {1e6 * statistics.median(t):.2f} us" for n, t in calls.items())
    return [
        times("step with guards / without", took["guarded"], took["bare"], STEP),
        Row(
            "calls of the loop for signals, watchdog and patience, of a step",
            tuple(total),
            tuple(took["bare"]),
            STEP - 1.0,
            kind="share",
            note=told,
        ),
    ]


@contextlib.contextmanager
def without_guards() -> Generator[None]:
    """A step that is compiled inside takes every update and remembers nothing."""

    def always(tree: Any) -> jax.Array:
        return jnp.asarray(True)

    def never(*arguments: Any) -> jax.Array:
        return jnp.asarray(False)

    def as_before(guard: guards.GuardState, *arguments: Any) -> guards.GuardState:
        return guard

    with (
        mock.patch.object(guards, "all_finite", always),
        mock.patch.object(guards, "is_spike", never),
        mock.patch.object(guards, "advance", as_before),
    ):
        yield


def several(training: Training) -> Timed:
    """The median of some steps: one alone may meet anything."""
    return lambda: statistics.median(training() for _ in range(STEPS))


def host_calls() -> dict[str, Timed]:
    """Seconds of each call that the loop makes once a step, by name."""

    class Ready:
        def __next__(self) -> int:
            return 0

        def close(self) -> None:
            """Nothing is open."""

        def get_state(self) -> dict[str, Any]:
            return {}

        def set_state(self, state: dict[str, Any], *args: Any, **options: Any) -> None:
            del state

    def beat() -> float:
        with Watchdog(1800) as watchdog:
            return each(lambda: watchdog.beat("step"))

    def requested() -> float:
        with Interruption() as interruption:
            return each(interruption.requested)

    def batch() -> float:
        ready = Ready()
        with Patient(ready, lambda: False) as patient:
            return each(lambda: next(patient)) - each(lambda: next(ready))

    return {"beat": beat, "requested": requested, "Patient": batch}


def each(call: Callable[[], object]) -> float:
    """Seconds of one of many calls."""
    started = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - started) / CALLS


def save_rows(repeats: int, megabytes: int = MEGABYTES) -> list[Row]:
    """A save until the step may go on, until all of it is on disk, and until its files are hashed.

    The bound is on the second and on the third. A thread hashes the files for the manifest after the
    second, beside the steps that follow; only the next save and the end of the run wait for it.
    """
    keys = jax.random.split(jax.random.key(0), max(1, megabytes // LEAF))
    size = (256 * LEAF, 1024)  # float32
    state = {"params": {str(i): jax.random.normal(key, size) for i, key in enumerate(keys)}}
    jax.block_until_ready(state)
    took: dict[str, list[tuple[float, float, float]]] = {"verified": [], "plain": []}

    def verified(folder: Path) -> tuple[float, float, float]:
        checkpointer = Checkpointer(folder)
        started = time.perf_counter()
        checkpointer.save(1, state, {}, {})
        going_on = time.perf_counter()
        checkpointer.wait()
        on_disk = time.perf_counter()
        checkpointer.close()
        return going_on - started, on_disk - started, time.perf_counter() - started

    def plain(folder: Path) -> tuple[float, float, float]:
        store = Store(folder, read_only=False)
        started = time.perf_counter()
        store.start(1, state, {}, {}, {})
        going_on = time.perf_counter()
        store.wait(1)
        on_disk = time.perf_counter()
        store.close()
        return going_on - started, on_disk - started, time.perf_counter() - started

    def whole(save: Callable[[Path], tuple[float, float, float]], name: str) -> Timed:
        def run() -> float:
            with tempfile.TemporaryDirectory() as folder:
                took[name].append(save(Path(folder) / "checkpoints"))
                return took[name][-1][1]

        return run

    interleave({"verified": whole(verified, "verified"), "plain": whole(plain, "plain")}, repeats)
    rounds = {name: list(zip(*values[1:], strict=True)) for name, values in took.items()}
    name = f"save of {megabytes} MB"
    told = (
        (f"{name}, until the run goes on", None),
        (f"{name}, on disk, verified / plain", SAVE),
        (f"{name}, closed with its manifest / plain", SAVE),
    )
    return [
        times(text, list(rounds["verified"][i]), list(rounds["plain"][i]), bound)
        for i, (text, bound) in enumerate(told)
    ]


def main(argv: list[str]) -> int:
    """Prints the rows; the exit code is 1 where a bound is missed."""
    cli.parse_flags(argv, FLAGS)
    reuse_buffers()
    jax.config.update("jax_enable_compilation_cache", False)
    os.chdir(Path(__file__).parent.parent)  # configs are named from there
    rows = measure(5, SMALL, 20) if FLAGS.quick else measure(FLAGS.repeats)
    print(table.text(tuple(rows)))
    missed = [row.name for row in rows if row.verdict == "miss"]
    print(f"missed: {', '.join(missed)}" if missed else "all bounds hold")
    return int(bool(missed))


if __name__ == "__main__":
    cli.run(main)
