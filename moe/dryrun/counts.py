"""How often each computation of a module runs: trip counts multiplied through loops and calls."""

from collections.abc import Callable
import re
from typing import NamedTuple

from moe.dryrun.hlo import Computation, Instruction, Module

# Instructions whose called computations run once a visit. The others (reduce, sort, scatter, ...) call
# scalar functions, which hold neither products nor collectives.
CALLERS = frozenset({"fusion", "call", "async-start", "custom-call"})

# Opcodes that hand their first operand's value on.
_COPIES = frozenset({"copy", "convert", "bitcast", "reshape", "copy-start", "copy-done"})
_DEPTH = 20

Cost = Callable[[Computation, Instruction], int]


class Counts(NamedTuple):
    """Execution counts of a step.

    Args:
      times: by computation; 0 for the branches of a conditional that cost less than its dearest.
      unknown: loops whose trip count depends on data, counted as one trip each.
    """

    times: dict[str, int]
    unknown: tuple[str, ...]


class Affine(NamedTuple):
    """`carry[index] + offset` of a loop, or the constant `offset` where `index` is None."""

    index: int | None
    offset: int


def count(module: Module, cost: Cost | None = None) -> Counts:
    """Execution counts of every computation.

    Args:
      module: the compiled module.
      cost: of one execution of an instruction itself, without what it calls; a conditional counts as
        its branch of the highest total. None takes the first branch.
    """
    edges = {name: _edges(module, each) for name, each in module.computations.items()}
    totals = _totals(module, edges, cost)
    times = dict.fromkeys(module.computations, 0)
    times[module.entry.name] = 1
    for name in reversed(list(totals)):
        for called, trips in _taken(edges[name], totals):
            times[called] += times[name] * trips
    unknown = [
        each.name
        for computation in module.computations.values()
        if times[computation.name]
        for each in computation
        if each.opcode == "while" and trip_count(module, computation, each) is None
    ]
    return Counts(times, tuple(unknown))


# One call: alternatives of which one runs, each a list of `(computation, times)`.
_Edge = list[list[tuple[str, int]]]


def _edges(module: Module, computation: Computation) -> list[_Edge]:
    edges: list[_Edge] = []
    for each in computation:
        if each.opcode == "while":
            body, condition = loop_parts(each)
            trips = trip_count(module, computation, each)
            trips = 1 if trips is None else trips
            edges.append([[(body, trips), (condition, trips + 1)]])
        elif each.opcode == "conditional":
            edges.append([[(branch, 1)] for branch in each.called])
        elif each.opcode in CALLERS:
            edges.append([[(called, 1) for called in each.called]])
    return edges


def _taken(edges: list[_Edge], totals: dict[str, int]) -> list[tuple[str, int]]:
    def weight(calls: list[tuple[str, int]]) -> int:
        return sum(totals[name] * trips for name, trips in calls)

    return [call for alternatives in edges for call in max(alternatives, key=weight)]


def _totals(module: Module, edges: dict[str, list[_Edge]], cost: Cost | None) -> dict[str, int]:
    """The cost of one execution of each reachable computation, callees before their callers."""
    totals: dict[str, int] = {}

    def visit(name: str) -> None:
        if name in totals:
            return
        for alternatives in edges[name]:
            for calls in alternatives:
                for called, _ in calls:
                    visit(called)
        computation = module.computations[name]
        own = sum(cost(computation, each) for each in computation) if cost else 0
        taken = _taken(edges[name], totals)
        totals[name] = own + sum(totals[called] * trips for called, trips in taken)

    visit(module.entry.name)
    return totals


def loop_parts(loop: Instruction) -> tuple[str, str]:
    """Names of the body and the condition of a `while`."""
    name = r"%?[^\s,]+"
    body, condition = loop.attribute("body", name), loop.attribute("condition", name)
    if body is None or condition is None:
        raise ValueError(f"the loop {loop.name} names no body or no condition")
    return body.lstrip("%"), condition.lstrip("%")


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Trips of a `while` in `computation`; None where they depend on data.

    XLA:CPU and CUDA write the count into the back-end configuration. XLA:TPU does not, so it is read
    off the loop: a counter that begins at a constant, grows by a constant and is compared with one.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.backend_config)
    if known:
        return int(known.group(1))
    body, condition = (module.computations[name] for name in loop_parts(loop))
    test = _comparison(module, condition)
    if test is None:
        return None
    direction, counter, limit = test
    if counter.index is None:
        direction, counter, limit = _FLIPPED.get(direction, direction), limit, counter
    first = _at_start(module, computation, loop, counter)
    last = _at_start(module, computation, loop, limit)
    step = _step(module, body, counter.index)
    if first is None or last is None or not step:
        return None
    return _trips(direction, first, last, step)


_FLIPPED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}


def _trips(direction: str, first: int, last: int, step: int) -> int | None:
    if direction == "NE":
        return (last - first) // step if (last - first) % step == 0 else None
    if direction not in _FLIPPED or (step > 0) != (direction in ("LT", "LE")):
        return None
    reach = last - first + ((1 if step > 0 else -1) if direction in ("LE", "GE") else 0)
    return max(0, -(-reach // step))


def _comparison(module: Module, condition: Computation) -> tuple[str, Affine, Affine] | None:
    root, scope = condition.root, _Scope(module, condition, None)
    while root.opcode == "fusion":
        scope = scope.inside(root)
        root = scope.computation.root
    if root.opcode != "compare":
        return None
    left, right = (scope.value(name) for name in root.operands)
    direction = root.attribute("direction", r"\w+")
    return (direction, left, right) if left and right and direction else None


def _at_start(
    module: Module, computation: Computation, loop: Instruction, value: Affine
) -> int | None:
    """What a condition's value is before the first trip."""
    if value.index is None:
        return value.offset
    initial = computation[loop.operands[0]]
    if initial.opcode != "tuple":
        return None
    carried = _Scope(module, computation, None).value(initial.operands[value.index])
    return carried.offset + value.offset if carried and carried.index is None else None


def _step(module: Module, body: Computation, index: int | None) -> int | None:
    """By how much a trip changes the carry's part `index`."""
    if index is None or body.root.opcode != "tuple":
        return None
    after = _Scope(module, body, None).value(body.root.operands[index])
    return after.offset if after and after.index == index else None


class _Scope:
    """Reads integers off a computation.

    Args:
      module: the module.
      computation: where names are looked up.
      arguments: what a fused computation's parameters are; None where the parameter is a loop's carry.
    """

    def __init__(
        self, module: Module, computation: Computation, arguments: list[Affine | None] | None
    ):
        self.module = module
        self.computation = computation
        self.arguments = arguments

    def inside(self, fusion: Instruction) -> "_Scope":
        """The scope of a fusion's computation."""
        arguments = [self.value(name) for name in fusion.operands]
        return _Scope(self.module, self.module.computations[fusion.called[0]], arguments)

    def value(self, name: str, depth: int = 0) -> Affine | None:
        """The instruction's value, or None where it is neither a constant nor a shifted carry."""
        each = self.computation[name]
        if depth > _DEPTH:
            return None
        if each.opcode == "constant":
            digits = re.fullmatch(r"-?\d+", each.operand_text)
            return Affine(None, int(digits.group())) if digits else None
        if each.opcode in _COPIES:
            return self.value(each.operands[0], depth + 1)
        if each.opcode in ("add", "subtract"):
            return self._sum(each, depth)
        if each.opcode == "fusion":
            inner = self.inside(each)
            return inner.value(inner.computation.root.name, depth + 1)
        return self._input(each)

    def _sum(self, each: Instruction, depth: int) -> Affine | None:
        left, right = (self.value(name, depth + 1) for name in each.operands)
        sign = 1 if each.opcode == "add" else -1
        if left is None or right is None or (left.index is not None and right.index is not None):
            return None
        if right.index is not None and sign < 0:
            return None
        index = left.index if right.index is None else right.index
        return Affine(index, left.offset + sign * right.offset)

    def _input(self, each: Instruction) -> Affine | None:
        if each.opcode == "parameter" and self.arguments is not None:
            return self.arguments[int(each.operand_text)]
        if each.opcode != "get-tuple-element" or self.arguments is not None:
            return None
        index = int(each.attribute("index", r"\d+") or 0)
        source = self.computation[each.operands[0]]
        return Affine(index, 0) if source.opcode == "parameter" else None
