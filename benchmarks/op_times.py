"""Where the time of a compiled step goes, by part of the model and by kind of operation.

XLA:CPU tells a profiler when each of its operations starts and ends, under the name that it has in the
program's text; that text names the Python stack behind it, of gradients too. Operations overlap on
several cores: a moment in which n of them run counts 1/n for each, so that the shares are of wall-clock
time and add up to 1. A moment in which none runs counts for the innermost loop around it, or as
`between operations`. XLA's own copies have no stack and are `unnamed`.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
import tempfile
from typing import NamedTuple

import jax
from jax.profiler import ProfileData

from benchmarks.hlo import Place, Program

IDLE = "between operations"
# Part of the model: files of which one is in the stack. The first that fits counts: attention's
# projections and the logits come through experts.py.
PARTS = {
    "optimiser": ("moe/training/optimizer.py",),
    "attention": ("moe/model/attention", "moe/model/block_attention.py"),
    "experts": ("moe/dispatch/", "moe/model/experts.py"),
    "router": ("moe/routing/", "moe/model/layer.py"),
}


class Interval(NamedTuple):
    """One run of an operation; nanoseconds."""

    name: str
    start: float
    end: float


class Shares(NamedTuple):
    """Shares of the time from the first operation of a step to its last."""

    parts: dict[str, float]  # by PARTS, "rest" of the model, "unnamed" and IDLE
    others: dict[str, float]  # the same without products of matrices


def profile(step: Callable[[], object], text: str) -> Shares:
    """Shares of one call.

    Args:
        step: runs the compiled program to its end, once; not for the first time.
        text: the program's text.

    Raises:
        RuntimeError: the profiler told of no operation of the program.
    """
    program = Program(text)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            step()
        files = [*Path(folder).rglob("*.xplane.pb")]
        told = [one for file in files for one in intervals(ProfileData.from_file(str(file)))]
    told = [one for one in told if one.name in program.instructions]
    if not told:
        raise RuntimeError("the profiler told of no operation: is the back end XLA:CPU?")
    taken = spread(told, {one.name for one in told if program.holds_others(one.name)})
    total = sum(taken.values())
    parts: dict[str, float] = defaultdict(float)
    others: dict[str, float] = defaultdict(float)
    for name, nanoseconds in taken.items():
        part = IDLE if name == IDLE else part_of(program.stack(name))
        parts[part] += nanoseconds / total
        if not program.is_product(name):
            others[part] += nanoseconds / total
    return Shares(dict(parts), dict(others))


def part_of(stack: list[Place]) -> str:
    """The part of the model that a Python stack belongs to."""
    if not stack:
        return "unnamed"
    files = [f.file for f in stack if not (f.function == "project" and "experts.py" in f.file)]
    for part, known in PARTS.items():
        if any(one in file for file in files for one in known):
            return part
    return "rest"


def intervals(data: ProfileData) -> Iterator[Interval]:
    """All runs of operations. An end is told of by an event of its own, under the same number."""
    begun: dict[tuple, tuple[str, float, float]] = {}
    ended: dict[object, float] = {}
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                about = dict(event.stats)
                if "hlo_op" in about:
                    key = (about.get("_p"), line.name, event.start_ns)
                    begun[key] = (str(about["hlo_op"]), event.start_ns, event.end_ns)
                elif event.name.startswith("end: "):
                    ended[about.get("_c")] = event.start_ns
    for (number, *_), (name, start, end) in begun.items():
        yield Interval(name, start, max(end, ended.get(number, end)))


def spread(told: Iterable[Interval], holders: set[str]) -> dict[str, float]:
    """Nanoseconds of each name, a moment divided among those that run in it.

    Args:
        told: all intervals; those of no length count for nothing.
        holders: names that only run others; the latest begun counts where nothing else runs.
    """
    lasting = [one for one in told if one.end > one.start]
    edges = [(one.start, 1, one.name) for one in lasting]
    edges = sorted([*edges, *((one.end, -1, one.name) for one in lasting)])
    taken: dict[str, float] = defaultdict(float)
    running: Counter[str] = Counter()
    around: list[str] = []
    last = edges[0][0]
    for moment, change, name in edges:
        busy = running or Counter([around[-1] if around else IDLE])
        for other, count in busy.items():
            taken[other] += (moment - last) * count / busy.total()
        last = moment
        if name not in holders:
            running[name] += change
            running = +running  # without those that ended
        elif change > 0:
            around.append(name)
        else:
            around.remove(name)
    return {name: length for name, length in taken.items() if length > 0}
