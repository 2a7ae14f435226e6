"""Bytes that a step reads from and writes to main memory, from the schedule of a compiled module.

Every instruction outside fusions reads its operands and writes its output once. What is only sliced is
read in part, what is updated in place is written in part. Caches and what a TPU keeps in its vector
memory are known only where the layout says so.
"""

from moe.dryrun.buffers import HBM, scheduled
from moe.dryrun.counts import count
from moe.dryrun.hlo import Computation, Instruction, Module
from moe.dryrun.shapes import Shape, leaves

# Views, and instructions whose callees are counted themselves.
FREE = frozenset(
    {
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"),
        *("while", "conditional", "call", "partition-id", "replica-id", "opt-barrier"),
        "async-update",
    }
)
SLICES = ("dynamic-slice", "gather", "slice")


def memory_traffic(module: Module) -> int:
    """Bytes a device and a step."""
    times = count(module).times
    total = 0
    for computation in scheduled(module):
        once = sum(_bytes(module, computation, each) for each in computation)
        total += times[computation.name] * once
    return total


def _bytes(module: Module, computation: Computation, each: Instruction) -> int:
    if each.opcode in FREE or each.opcode.endswith("-done"):
        return 0
    reads = [_size(shape) for shape in computation.operand_shapes(each)]
    writes = sum(_size(shape) for shape in _outputs(each))
    if each.opcode.removesuffix("-start") in SLICES:
        return writes + min(reads[0], sum(shape.bytes for shape in _outputs(each)))
    if each.opcode == "dynamic-update-slice":
        update = computation.operand_shapes(each)[1].bytes
        return reads[1] + min(writes, update)
    if each.opcode != "fusion" or len(each.called) != 1:
        return sum(reads) + writes
    inside = module.computations[each.called[0]]
    for parameter in inside:
        if parameter.opcode != "parameter":
            continue
        number = int(parameter.operand_text)
        if number < len(reads):
            reads[number] = min(reads[number], _read(inside, parameter))
    return sum(reads) + min(writes, _written(inside))


def _outputs(each: Instruction) -> tuple[Shape, ...]:
    """The arrays it writes; a `-start` also returns what it reads, and flags."""
    if not each.opcode.endswith("-start") or isinstance(each.shape, Shape):
        return each.shapes
    if each.opcode == "all-reduce-start":
        return each.shapes
    return leaves(each.shape[0 if each.opcode == "copy-start" else 1])


def _read(inside: Computation, parameter: Instruction) -> int:
    """What a fusion reads of a parameter: all of it, or its slices where nothing else looks at it."""
    total = 0
    for user in inside:
        if parameter.name not in user.operands:
            continue
        if user.opcode in SLICES and user.operands[0] == parameter.name:
            total += sum(_size(shape) for shape in user.shapes)
        elif user.opcode == "bitcast" and not user.is_root:
            total += _read(inside, user)
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != parameter.name:
            return sum(_size(shape) for shape in parameter.shapes)
    return total


def _written(inside: Computation) -> int:
    """What a fusion writes: its root, of which only the updated part where it is an update in place."""
    roots = [inside.root]
    if inside.root.opcode == "tuple":
        roots = [inside[name] for name in inside.root.operands]
    total = 0
    for root in roots:
        while root.opcode == "bitcast":
            root = inside[root.operands[0]]
        made: tuple[Shape, ...] = root.shapes
        if root.opcode == "dynamic-update-slice":
            made = inside[root.operands[1]].shapes
        total += sum(_size(shape) for shape in made)
    return total


def _size(shape: Shape) -> int:
    return shape.bytes if shape.memory_space == HBM else 0
