"""The collectives of a compiled module: bytes, devices, mesh axes, and the line of our code.

Bytes are those of one device. `wire_bytes` is what one device sends in the bandwidth-optimal algorithm
of its group of `n` (ring or direct; Chan et al. 2007, "Collective communication: theory, practice, and
experience"):

| collective | bytes sent a device |
|---|---|
| all-gather | output (n - 1) / n |
| reduce-scatter | input (n - 1) / n |
| all-reduce | 2 input (n - 1) / n |
| all-to-all | input (n - 1) / n |
| ragged-all-to-all | smaller of input and output (n - 1) / n |
| collective-permute | input |
| collective-broadcast | input |

The rows that a ragged all-to-all moves are data. One side of it has room for any skew, the other holds
just the rows: its figure holds if these are all sent and spread evenly over the group.
"""

from collections.abc import Iterable
import re
from typing import NamedTuple

from moe.dryrun.counts import count
from moe.dryrun.flops import phase
from moe.dryrun.hlo import Computation, Instruction, Module, Source
from moe.dryrun.replica_groups import Groups, axes_of, parse_groups, spanned_axes
from moe.dryrun.shapes import Shape, leaves

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_ROUNDS = {"all-reduce": 2.0}


class Collective(NamedTuple):
    """One collective of the module, as one device sees it.

    Args:
      name: of the instruction.
      kind: one of `KINDS`.
      op_name: JAX's path to the primitive.
      phase: as in `moe.dryrun.flops`.
      source: the line of our code; None where no frame is ours.
      count: executions a step.
      shapes: of the operands.
      operand_bytes: read by one execution.
      output_bytes: written by one execution.
      group_size: devices that take part together.
      groups: numbers of the devices in the flattened mesh; pairs (from, to) of a permute.
      axes: mesh axes along which a group's devices differ, outermost first; empty without a mesh.
      whole_axes: whether the groups are exactly these axes, not a part of one.
      wire_bytes: sent by one device in one execution.
      is_async: whether other work may run while it does.
    """

    name: str
    kind: str
    op_name: str
    phase: str
    source: Source | None
    count: int
    shapes: tuple[Shape, ...]
    operand_bytes: int
    output_bytes: int
    group_size: int
    groups: Groups
    axes: tuple[str, ...]
    whole_axes: bool
    wire_bytes: int
    is_async: bool

    @property
    def total_wire_bytes(self) -> int:
        """Sent by one device in all executions of a step."""
        return self.wire_bytes * self.count


def collectives(module: Module, mesh_shape: dict[str, int] | None = None) -> list[Collective]:
    """Every collective that runs, the one that sends most first.

    Args:
      module: the compiled module.
      mesh_shape: size of each mesh axis, outermost first; None leaves `axes` empty.

    Raises:
      ValueError: the mesh has not as many devices as the module.
    """

    def cost(computation: Computation, each: Instruction) -> int:
        return sum(shape.bytes for shape in each.shapes) if kind_of(each) else 0

    times = count(module, cost).times
    found = [
        _collective(module, computation, each, times[computation.name], mesh_shape or {})
        for computation in module.computations.values()
        if times[computation.name]
        for each in computation
        if kind_of(each) and _begins(computation, each)
    ]
    return sorted(found, key=lambda each: -each.total_wire_bytes)


def by_axes(found: Iterable[Collective]) -> dict[tuple[str, tuple[str, ...]], int]:
    """Bytes that one device sends in a step, by kind and mesh axes, the largest first."""
    sums: dict[tuple[str, tuple[str, ...]], int] = {}
    for each in found:
        key = (each.kind, each.axes)
        sums[key] = sums.get(key, 0) + each.total_wire_bytes
    return dict(sorted(sums.items(), key=lambda pair: -pair[1]))


def kind_of(each: Instruction) -> str | None:
    """One of `KINDS`; None for anything else, the `-done` half of a pair included."""
    kind = each.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def _begins(computation: Computation, each: Instruction) -> bool:
    """Whether it is the one to count of a chain of fusions that carry one collective.

    XLA:TPU overlaps a collective with products by fusing a step of it with each of them: one copy of
    the instruction stands in the fusion that starts it, one in each product's, one in the last.
    """
    if "chain_id=" not in each.attributes:
        return True
    return any('"AsyncCollectiveStart"' in other.attributes for other in computation)


def _collective(
    module: Module,
    computation: Computation,
    each: Instruction,
    times: int,
    mesh_shape: dict[str, int],
) -> Collective:
    kind = kind_of(each) or ""
    operands = computation.operand_shapes(each)
    if kind == "ragged-all-to-all":
        # The others are the output to write into and four lists of offsets and sizes.
        operands = operands[:1]
    if kind == "all-reduce" and _is_scattered(module, computation, each):
        kind = "reduce-scatter"
    groups = _groups(module, each)
    size = 2 if kind == "collective-permute" else max(map(len, groups))
    read, written = _bytes(operands), _bytes(_outputs(each))
    if kind == "reduce-scatter":
        written = read // size
    axes = spanned_axes(groups, mesh_shape) if mesh_shape else ()
    whole = kind == "collective-permute" or axes_of(groups, mesh_shape) is not None
    named = module.described(computation, each)
    return Collective(
        each.name,
        kind,
        named.op_name,
        phase(each.name, named.op_name),
        module.source(named)
        or _reduction_source(module, each)
        or module.nearby_source(computation, each),
        times,
        operands,
        read,
        written,
        size,
        groups,
        axes,
        whole,
        _wire_bytes(kind, read, written, size),
        _is_async(each),
    )


def _wire_bytes(kind: str, read: int, written: int, size: int) -> int:
    if kind in ("collective-permute", "collective-broadcast"):
        return read
    moved = {"all-gather": written, "ragged-all-to-all": min(read, written)}.get(kind, read)
    return round(_ROUNDS.get(kind, 1.0) * moved * (size - 1) / size)


def _bytes(shapes: tuple[Shape, ...]) -> int:
    return sum(shape.bytes for shape in shapes)


def _outputs(each: Instruction) -> tuple[Shape, ...]:
    """The arrays it writes: `-start` returns (inputs, outputs, flags), but for the all-reduce's."""
    paired = each.opcode.endswith("-start") and each.opcode != "all-reduce-start"
    if paired and not isinstance(each.shape, Shape):
        return leaves(each.shape[1])
    return each.shapes


def _groups(module: Module, each: Instruction) -> Groups:
    pairs = each.attribute("source_target_pairs", r"\{\{.*?\}\}")
    if pairs is not None:
        return parse_groups(pairs, module.partitions)
    mesh = r"mesh\[[^\]]*\](?:, device_ids=\(.*?\))? \{[^}]*\}"
    listed = r"\{\{.*?\}\}|\{\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?"
    return parse_groups(
        each.attribute("replica_groups", f"{mesh}|{listed}") or "{}", module.partitions
    )


def _is_async(each: Instruction) -> bool:
    if each.opcode.endswith("-start"):
        return '"is_sync":true' not in each.backend_config
    return bool(re.search(r"chain_id=|async_collective_name=", each.attributes))


def _reduction_source(module: Module, each: Instruction) -> Source | None:
    """The line that asked for the sum, where only the scalar function of it still says so."""
    roots = (module.computations[name].root for name in each.called)
    return next(filter(None, map(module.source, roots)), None)


def _is_scattered(module: Module, computation: Computation, each: Instruction) -> bool:
    """Whether a fused all-reduce keeps one slice of its sum: XLA:TPU's form of a reduce-scatter."""
    users = computation.users(each) if module.is_fused(computation) else ()
    return bool(users) and all(computation[name].opcode == "dynamic-slice" for name in users)
