"""Times of several things in turn: what else the machine does then meets all of them alike."""

from collections.abc import Callable, Mapping
import time
from typing import Any

import jax

Timed = Callable[[], float]  # runs once and returns seconds


def timed(function: Callable, *arguments: Any) -> Timed:
    """Runs a compiled function to the end of its work; its result is thrown away."""

    def run() -> float:
        started = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        return time.perf_counter() - started

    return run


def interleave(
    runs: Mapping[str, Timed], rounds: int, *, warm_up: bool = True
) -> dict[str, list[float]]:
    """Seconds of each, by round, after one round of warm-up that is not told of.

    Every other round goes backwards, so that nothing always follows the same neighbour, whose data
    the caches still hold.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = [*runs]
    for _ in range(rounds + warm_up):
        for name in names:
            seconds[name].append(runs[name]())
        names.reverse()
    return {name: taken[warm_up:] for name, taken in seconds.items()}
