"""Which instruction fills memory that a loop writes slice by slice, such as activations kept by a scan.

The memory itself is made empty before the loop, at the line of the scan; what a reader wants to know is
the line whose values it holds.
"""

from moe.dryrun.counts import loop_parts
from moe.dryrun.hlo import Computation, Instruction, Module, Source

_PASSED_ON = frozenset({"bitcast", "reshape", "copy", "convert", "broadcast", "transpose"})
_STEPS = 8

_Place = tuple[Computation, Instruction]


def filler(module: Module, computation: Computation, maker: Instruction) -> Instruction | None:
    """What computes the slices that a loop writes into the empty memory of `maker`.

    Returns:
      An instruction of the loop's body with a line of our code other than the loop's; None where
      `maker` makes no empty memory, or nothing of the kind is found.
    """
    if not _is_empty(module, computation, maker):
        return None
    written = _written(module, computation, maker)
    slices = _slices(module, *written) if written else None
    if slices is None:
        return None
    return _computed(module, *slices, module.source(maker))


def _is_empty(module: Module, computation: Computation, maker: Instruction) -> bool:
    """Whether it makes memory without values: a TPU's own instruction, a filled constant, or its copy."""
    while maker.opcode == "copy":
        maker = computation[maker.operands[0]]
    if maker.opcode == "fusion":
        maker = module.computations[maker.called[0]].root
    return maker.opcode == "broadcast" or '"AllocateBuffer"' in maker.attributes


def _written(module: Module, computation: Computation, maker: Instruction) -> _Place | None:
    """The carry's next value in the first loop that carries the memory."""
    for name in computation.users(maker):
        carried = computation[name]
        if carried.opcode in ("copy", "bitcast"):
            return _written(module, computation, carried)
        loops = [computation[user] for user in computation.users(carried)]
        loop = next((each for each in loops if each.opcode == "while"), None)
        if carried.opcode == "tuple" and loop is not None:
            body = module.computations[loop_parts(loop)[0]]
            index = carried.operands.index(maker.name)
            return (body, body[body.root.operands[index]]) if body.root.opcode == "tuple" else None
    return None


def _slices(module: Module, body: Computation, written: Instruction) -> _Place | None:
    """The operand with the new slice of a dynamic-update-slice, fused or not."""
    index = 0
    if written.opcode == "get-tuple-element":
        index = int(written.attribute("index", r"\d+") or 0)
        written = body[written.operands[0]]
    if written.opcode == "dynamic-update-slice":
        return body, body[written.operands[1]]
    if written.opcode != "fusion":
        return None
    fused = module.computations[written.called[0]]
    root = fused[fused.root.operands[index]] if fused.root.opcode == "tuple" else fused.root
    root = _passed_on(fused, root)
    if root.opcode != "dynamic-update-slice":
        return None
    update = _passed_on(fused, fused[root.operands[1]])
    if update.opcode == "parameter":
        return body, body[written.operands[int(update.operand_text)]]
    return fused, update


def _passed_on(computation: Computation, each: Instruction) -> Instruction:
    while each.opcode in _PASSED_ON:
        each = computation[each.operands[0]]
    return each


def _computed(
    module: Module, computation: Computation, each: Instruction, loop: Source | None
) -> Instruction | None:
    """The first instruction behind `each` with a line of ours that is not the loop's own."""
    for _ in range(_STEPS):
        named = module.described(computation, each)
        found = module.source(named)
        if found and found != loop:
            return named
        if not each.operands or each.opcode == "parameter":
            return None
        each = computation[each.operands[0]]
    return None
