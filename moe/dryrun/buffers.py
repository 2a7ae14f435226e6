"""Temporary memory of a compiled module: the largest arrays, and what is alive at the peak.

The figures are an estimate from the schedule in the text. XLA's own buffer assignment also packs
buffers into one heap (fragmentation adds) and shares memory in more cases (which takes away);
`compiled.memory_analysis().temp_size_in_bytes` is the truth for the sum, and says nothing of its parts.
Only main memory is counted (a TPU's VMEM is not), with the padding of the layout's tiles.
"""

from typing import NamedTuple

from moe.dryrun.aliases import Values, is_elementwise, place_values
from moe.dryrun.counts import count
from moe.dryrun.fillers import filler
from moe.dryrun.flops import phase
from moe.dryrun.hlo import Computation, Instruction, Module, Source
from moe.dryrun.shapes import Shape

HBM = 0
_CALLS = frozenset({"while", "conditional", "call"})


class Buffer(NamedTuple):
    """An array in main memory.

    Args:
      name: of the instruction that makes it.
      computation: where that stands.
      shape: with the layout.
      bytes: with the layout's padding.
      count: how often a step makes it.
      op_name: JAX's path to the primitive; where a loop fills it, of what computes the slices.
      phase: as in `moe.dryrun.flops`.
      source: the line of our code that `op_name` belongs to; None where no frame is ours.
    """

    name: str
    computation: str
    shape: Shape
    bytes: int
    count: int
    op_name: str
    phase: str
    source: Source | None


class Peak(NamedTuple):
    """The moment of a step that needs most temporary memory.

    Args:
      bytes: of all buffers alive then, parameters and outputs of the step apart.
      at: name of the instruction that runs then, the innermost.
      buffers: alive then, the largest first.
    """

    bytes: int
    at: str
    buffers: tuple[Buffer, ...]


def largest(module: Module, limit: int = 20) -> list[Buffer]:
    """The largest arrays that a step makes, the largest first; parameters and views are none.

    Arrays inside fusions never reach memory. Equal ones (shape, line and op_name) stand once, with
    their counts summed.
    """
    times = count(module).times
    found: dict[tuple[object, ...], Buffer] = {}
    for computation in scheduled(module):
        for each, shape in place_values(module, computation).memories:
            if each.opcode in ("parameter", "constant") or shape.memory_space != HBM:
                continue
            made = _buffer(module, computation, each, shape, times[computation.name])
            key = (made.shape.dtype, made.shape.dims, made.op_name, made.source)
            before = found[key].count if key in found else 0
            found[key] = made._replace(count=before + made.count)
    return sorted(found.values(), key=lambda each: -each.bytes)[:limit]


def peak(module: Module) -> Peak:
    """The largest sum of temporary buffers alive at once, and which they are.

    Walks the schedule of the entry and of everything it calls: a buffer lives from the instruction that
    makes it to its last reader; a loop's carry is updated in place; at a loop or a call the callee's own
    peak stands on top of what its caller keeps.
    """
    times = count(module).times
    done: dict[str, _Moment] = {}
    moment = _peak(module, module.entry, done)
    buffers = [
        _buffer(module, computation, each, shape, times[computation.name])
        for computation, each, shape in moment.alive
    ]
    return Peak(moment.bytes, moment.at, tuple(sorted(buffers, key=lambda each: -each.bytes)))


def scheduled(module: Module) -> list[Computation]:
    """The entry and what it calls outside fusions, callers first."""
    names = [module.entry.name]
    for name in names:
        for each in module.computations[name]:
            if each.opcode in _CALLS:
                names += [called for called in each.called if called not in names]
    return [module.computations[name] for name in names]


class _Moment(NamedTuple):
    bytes: int
    at: str
    alive: tuple[tuple[Computation, Instruction, Shape], ...]


_Nothing = _Moment(0, "", ())


def _buffer(
    module: Module, computation: Computation, each: Instruction, shape: Shape, times: int
) -> Buffer:
    named = filler(module, computation, each) or module.described(computation, each)
    return Buffer(
        each.name,
        computation.name,
        shape,
        shape.padded_bytes,
        times,
        named.op_name,
        phase(each.name, named.op_name),
        module.source(named) or module.nearby_source(computation, each),
    )


def _peak(module: Module, computation: Computation, done: dict[str, _Moment]) -> _Moment:
    if computation.name in done:
        return done[computation.name]
    values = place_values(module, computation)
    ends = _last_uses(computation, values)
    alive: dict[int, int] = {}
    total, best, best_alive, best_inner = 0, 0, (), _Nothing
    at = computation.root.name
    for position, each in enumerate(computation):
        ending = [
            n for n in {n for name in each.operands for n in values.of[name]} if ends[n] == position
        ]
        for number in values.of[each.name]:
            if number not in alive and _counts(values, number):
                alive[number] = values.memories[number].shape.padded_bytes
                total += alive[number]
        inner = max(
            (_peak(module, module.computations[name], done) for name in _callees(each)),
            key=lambda moment: moment.bytes,
            default=_Nothing,
        )
        now = total + inner.bytes - _taken_over(values, each, ending, alive)
        if now > best:
            best, best_alive, best_inner, at = now, tuple(alive), inner, inner.at or each.name
        for number in [*ending, *(n for n in values.of[each.name] if ends[n] <= position)]:
            total -= alive.pop(number, 0)
    held = tuple(
        (computation, values.memories[n].maker, values.memories[n].shape) for n in best_alive
    )
    done[computation.name] = _Moment(best, at, held + best_inner.alive)
    return done[computation.name]


def _callees(each: Instruction) -> tuple[str, ...]:
    return each.called if each.opcode in _CALLS else ()


def _counts(values: Values, number: int) -> bool:
    return number not in values.given and values.memories[number].shape.memory_space == HBM


def _taken_over(values: Values, each: Instruction, ending: list[int], alive: dict[int, int]) -> int:
    """Bytes of operands that end here and whose place the output takes."""
    if not is_elementwise(each):
        return 0
    free = [alive[number] for number in ending if number in alive]
    taken = 0
    for number in values.of[each.name]:
        if number not in ending and alive.get(number) in free:
            free.remove(alive[number])
            taken += alive[number]
    return taken


def _last_uses(computation: Computation, values: Values) -> dict[int, int]:
    """The position of the last instruction that reads or makes each memory, views followed."""
    ends: dict[int, int] = {}
    for position, each in enumerate(computation):
        for name in (*each.operands, each.name):
            for number in values.of[name]:
                ends[number] = position
    return ends
