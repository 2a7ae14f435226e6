"""Which instructions of a scheduled computation make memory, and which only name some that exists."""

from functools import lru_cache
import re
from typing import NamedTuple

from moe.dryrun.hlo import Computation, Instruction, Module
from moe.dryrun.shapes import Shape, leaf_place, leaves

# They return (parts of) their operands without moving anything.
_VIEWS = frozenset(
    "bitcast tuple get-tuple-element optimization-barrier domain add-dependency after-all while".split()
)
# They write into the memory of one operand, by its place.
_IN_PLACE = {
    "dynamic-update-slice": 0,
    "scatter": 0,
    "sort": 0,
    "all-reduce": 0,
    "all-reduce-start": 0,
    "ragged-all-to-all": 1,
}
_WRITTEN_THROUGH = frozenset({"bitcast", "reshape", "copy", "convert", "get-tuple-element"})
# Opcodes of one pass over their operands: the output may take the place of an operand that ends there.
_ELEMENTWISE = frozenset(
    """abs add and ceil clamp compare convert copy cosine divide exponential exponential-minus-one floor
    log log-plus-one logistic maximum minimum multiply negate not or power remainder rsqrt select sign
    sine sqrt subtract tanh xor""".split()
)


class Memory(NamedTuple):
    """A piece of memory: the instruction that asks for it and the shape it holds."""

    maker: Instruction
    shape: Shape


class Values(NamedTuple):
    """Where the arrays of a computation lie.

    Args:
      memories: by number.
      of: numbers of the memories that hold an instruction's arrays, in the order of its leaves.
      given: numbers of the memories that come from outside: parameters, constants and the root's.
    """

    memories: list[Memory]
    of: dict[str, tuple[int, ...]]
    given: frozenset[int]


def place_values(module: Module, computation: Computation) -> Values:
    """Follows views, in-place updates and loop carries through one computation.

    The output of a called computation, and of the whole module, lies in memory of its caller.
    """
    memories: list[Memory] = []
    of: dict[str, tuple[int, ...]] = {}
    given: set[int] = set()
    for each in computation:
        shared = _shared(module, computation, each, of)
        placed = []
        for place, shape in enumerate(each.shapes):
            number = shared.get(place)
            if number is None:
                number = len(memories)
                memories.append(Memory(each, shape))
            placed.append(number)
        of[each.name] = tuple(placed)
        if each.opcode in ("parameter", "constant"):
            given.update(placed)
    given.update(of[computation.root.name])
    return Values(memories, of, frozenset(given))


def is_elementwise(each: Instruction) -> bool:
    """Whether its output may take the place of an operand of the same size."""
    return each.opcode in _ELEMENTWISE or (
        each.opcode == "fusion" and "kind=kLoop" in each.attributes
    )


def _shared(
    module: Module, computation: Computation, each: Instruction, of: dict[str, tuple[int, ...]]
) -> dict[int, int]:
    """Leaves of the output that lie in existing memory, and in which."""
    if each.opcode == "get-tuple-element":
        return _part(computation, each, int(each.attribute("index", r"\d+") or 0), of)
    if each.opcode.endswith("-done"):
        return _finished(computation, each, of)
    if each.opcode in _VIEWS:
        return dict(enumerate(number for name in each.operands for number in of[name]))
    if each.opcode.endswith("-start") and each.opcode not in _IN_PLACE:
        return _started(each, of)
    stated = _stated(computation, each)
    if each.opcode == "fusion":
        stated = {**_updated_in_place(module, each.called[0]), **stated}
    if each.opcode in _IN_PLACE:
        first = _IN_PLACE[each.opcode]
        stated = {place: (first + place, 0) for place in range(len(each.shapes))}
    return {
        place: of[each.operands[operand]][leaf]
        for place, (operand, leaf) in stated.items()
        if operand < len(each.operands) and _fits(computation, each, place, operand, leaf)
    }


def _fits(computation: Computation, each: Instruction, place: int, operand: int, leaf: int) -> bool:
    source = computation[each.operands[operand]].shapes[leaf]
    return source.padded_bytes == each.shapes[place].padded_bytes


def _part(
    computation: Computation, each: Instruction, index: int, of: dict[str, tuple[int, ...]]
) -> dict[int, int]:
    source = computation[each.operands[0]]
    first = leaf_place(source.shape, (index,))
    return dict(enumerate(of[source.name][first : first + len(each.shapes)]))


def _finished(
    computation: Computation, each: Instruction, of: dict[str, tuple[int, ...]]
) -> dict[int, int]:
    """The result of a `-done`: the first part of a copy's tuple, the second of the others'."""
    source = computation[each.operands[0]]
    if each.opcode == "all-reduce-done" or isinstance(source.shape, Shape):
        return dict(enumerate(of[source.name]))
    return _part(computation, each, 0 if each.opcode == "copy-done" else 1, of)


def _started(each: Instruction, of: dict[str, tuple[int, ...]]) -> dict[int, int]:
    """A `-start` returns (operands, result, flags), a copy's (result, operand, flags)."""
    if isinstance(each.shape, Shape):
        return {}
    operands = [number for name in each.operands for number in of[name]]
    first = len(leaves(each.shape[0])) if each.opcode == "copy-start" else 0
    return {first + place: number for place, number in enumerate(operands)}


def _stated(computation: Computation, each: Instruction) -> dict[int, tuple[int, int]]:
    """`output_to_operand_aliasing={{0}: (2, {})}`: output leaf to (operand, its leaf)."""
    text = each.attribute("output_to_operand_aliasing", r"\{.*?\)\}")
    found = {}
    for out, operand, part in re.findall(r"\{([\d, ]*)\}: \((\d+), \{([\d, ]*)\}", text or ""):
        source = computation[each.operands[int(operand)]]
        place = leaf_place(each.shape, _integers(out))
        found[place] = (int(operand), leaf_place(source.shape, _integers(part)))
    return found


@lru_cache(maxsize=65536)
def _updated_in_place(module: Module, name: str) -> dict[int, tuple[int, int]]:
    """Outputs of a fusion that are an operand with a slice of it replaced."""
    computation = module.computations[name]
    root = computation.root
    outputs = root.operands if root.opcode == "tuple" else (root.name,)
    found = {}
    for place, output in enumerate(outputs):
        written = _behind(computation, output)
        if written.opcode not in ("dynamic-update-slice", "scatter", "parameter"):
            continue
        while written.opcode in ("dynamic-update-slice", "scatter"):
            written = _behind(computation, written.operands[0])
        if written.opcode == "parameter" and written is not _behind(computation, output):
            found[place] = (int(written.operand_text), 0)
    return found


def _behind(computation: Computation, name: str) -> Instruction:
    each = computation[name]
    while each.opcode in _WRITTEN_THROUGH:
        each = computation[each.operands[0]]
    return each


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))
