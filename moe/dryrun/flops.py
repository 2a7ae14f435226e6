"""FLOPs of the matrix products of a compiled module, by operation, phase and line of our code.

Only products are counted, 2 FLOPs a multiply-add: dot, ragged-dot, convolution (what XLA:TPU makes of
dots), cuBLAS calls and grouped Pallas kernels. Elementwise work, reductions, sorts and gathers are not:
they are bound by memory, and counting them would hide what the matrix units waste. So is a dot of two
vectors, which XLA itself makes a multiplication and a sum of.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
import math
import re
from typing import NamedTuple

import numpy as np

from moe.dryrun.counts import count
from moe.dryrun.hlo import Computation, Instruction, Module, Source
from moe.dryrun.shapes import Shape

# FLOPs of a Pallas kernel from its operands' and outputs' shapes; None for one without a product.
Kernel = Callable[[tuple[Shape, ...], tuple[Shape, ...]], int] | None

KERNEL_TARGETS = frozenset(
    "tpu_custom_call __gpu$xla.gpu.triton triton_kernel_call mosaic_gpu mosaic_gpu_v2".split()
)

PHASES = ("forward", "backward", "recompute", "unstated")


class Product(NamedTuple):
    """One matrix product of the module, on one device.

    Args:
      name: of the instruction.
      kind: `dot`, `ragged-dot`, `convolution`, `cublas`, the name of a Pallas kernel, or
        `unknown kernel` for one that is in no table and states no cost: its FLOPs are then 0.
      op_name: JAX's path to the primitive.
      phase: one of `PHASES`; `unstated` where XLA dropped the path, as for `jax.lax.ragged_dot` on TPU.
      source: the line of our code; None where no frame is ours.
      flops_each: of one execution.
      count: executions a step.
      shapes: of the operands, then of the outputs.
    """

    name: str
    kind: str
    op_name: str
    phase: str
    source: Source | None
    flops_each: int
    count: int
    shapes: tuple[Shape, ...]

    @property
    def flops(self) -> int:
        """Of all executions of a step."""
        return self.flops_each * self.count


def products(module: Module, kernels: Mapping[str, Kernel] | None = None) -> list[Product]:
    """Every matrix product that runs, the dearest first.

    Args:
      module: the compiled module.
      kernels: Pallas kernels by name, beside `KERNELS`.
    """
    table = {**KERNELS, **(kernels or {})}

    def cost(computation: Computation, each: Instruction) -> int:
        return (instruction_flops(computation, each, table) or ("", 0))[1]

    times = count(module, cost).times
    found = [
        _product(module, computation, each, times[computation.name], table)
        for computation in module.computations.values()
        if times[computation.name]
        for each in computation
    ]
    return sorted((each for each in found if each), key=lambda each: -each.flops)


def total(found: Iterable[Product]) -> int:
    """FLOPs of a step on one device."""
    return sum(each.flops for each in found)


def by_phase(found: Iterable[Product]) -> dict[str, int]:
    """FLOPs of each of `PHASES`."""
    sums = dict.fromkeys(PHASES, 0)
    for each in found:
        sums[each.phase] += each.flops
    return sums


def by_source(found: Iterable[Product]) -> dict[str, int]:
    """FLOPs by line of our code, the dearest first; products without one go by their op_name."""
    sums: dict[str, int] = {}
    for each in found:
        key = str(each.source) if each.source else each.op_name or each.name
        sums[key] = sums.get(key, 0) + each.flops
    return dict(sorted(sums.items(), key=lambda pair: -pair[1]))


def phase(name: str, op_name: str) -> str:
    """One of `PHASES`: recomputed by `jax.checkpoint` or by XLA, in a transpose, or else forward.

    Args:
      name: of the instruction; XLA marks its own rematerialisation with `.remat`.
      op_name: JAX's path.
    """
    if "rematted_computation" in op_name or re.search(r"\.remat\d*\b", name):
        return "recompute"
    if "/" not in op_name:
        return "unstated"
    return "backward" if "transpose(" in op_name else "forward"


def instruction_flops(
    computation: Computation, each: Instruction, kernels: Mapping[str, Kernel]
) -> tuple[str, int] | None:
    """`(kind, FLOPs)` of one execution; None where the instruction is no matrix product."""
    if each.opcode == "dot":
        return "dot", dot_flops(computation, each)
    if each.opcode == "ragged-dot":
        return "ragged-dot", ragged_dot_flops(computation, each)
    if each.opcode == "convolution":
        return "convolution", convolution_flops(computation, each)
    if each.opcode == "custom-call":
        return _custom_call_flops(computation, each, kernels)
    return None


def _product(
    module: Module,
    computation: Computation,
    each: Instruction,
    times: int,
    kernels: Mapping[str, Kernel],
) -> Product | None:
    found = instruction_flops(computation, each, kernels)
    if found is None:
        return None
    shapes = computation.operand_shapes(each) + each.shapes
    named = module.described(computation, each)
    place = phase(each.name, named.op_name)
    source = module.source(named) or module.nearby_source(computation, each)
    return Product(each.name, found[0], named.op_name, place, source, found[1], times, shapes)


def _array(computation: Computation, each: Instruction, operand: int) -> Shape:
    return computation[each.operands[operand]].shapes[0]


def dot_flops(computation: Computation, each: Instruction) -> int:
    """Twice the output's elements times the contracted size; batch dimensions are in the output."""
    return _contraction_flops(computation, each, each.dims("lhs_contracting_dims"))


def ragged_dot_flops(computation: Computation, each: Instruction) -> int:
    """Each row meets one group's matrix only, whether rows are kept or contracted.

    Rows kept: `[N X] x [E X Y] -> [N Y]`; rows contracted: `[N X] x [N Y] -> [E X Y]`. Both are
    `2 N X Y` if every row lies in a group, which is the upper bound that a static text can give.
    """
    contracting, ragged = each.dims("lhs_contracting_dims"), each.dims("lhs_ragged_dims")
    return _contraction_flops(computation, each, contracting, ragged)


def _contraction_flops(
    computation: Computation,
    each: Instruction,
    contracting: tuple[int, ...],
    ragged: tuple[int, ...] = (),
) -> int:
    lhs, out = _array(computation, each, 0), each.shapes[0]
    flops = 2 * out.elements * math.prod(lhs.dims[dim] for dim in contracting)
    # The output of contracted groups has one matrix a group, each of which meets its own rows only.
    return flops // out.dims[0] if set(ragged) & set(contracting) else flops


def convolution_flops(computation: Computation, each: Instruction) -> int:
    """FLOPs of a convolution, counting only taps that meet an input element.

    XLA:TPU writes a batched dot as a convolution over a dilated or padded spatial dimension, where
    most taps meet a zero between elements: those are not multiplied and not counted.
    """
    lhs, rhs, out = _array(computation, each, 0), _array(computation, each, 1), each.shapes[0]
    labels = re.fullmatch(
        r"(\w+)_(\w+)->(\w+)", each.attribute("dim_labels", r"[\w?]+->[\w?]+") or ""
    )
    if labels is None:
        raise ValueError(f"the convolution {each.name} has no dim_labels")
    inputs, kernel, output = labels.groups()
    window = each.attribute("window", r"\{[^}]*\}") or "{}"
    taps = 1
    for axis, digit in enumerate(sorted(filter(str.isdigit, output))):
        taps *= valid_taps(
            lhs.dims[inputs.index(digit)], out.dims[output.index(digit)], *_window(window, axis)
        )
    batch_groups = int(each.attribute("batch_group_count", r"\d+") or 1)
    features = rhs.dims[kernel.index("i")] * out.dims[output.index("f")]
    batch = lhs.dims[inputs.index("b")] // batch_groups
    return 2 * taps * features * batch


def _window(window: str, axis: int) -> tuple[int, int, int, int, int]:
    """Size, stride, low padding, input dilation and kernel dilation of one spatial dimension."""

    def part(key: str, default: str) -> str:
        found = re.search(rf"\b{key}=([\dx_\-]+)", window)
        return found.group(1).split("x")[axis] if found else default

    size, stride = int(part("size", "1")), int(part("stride", "1"))
    low = int(part("pad", "0_0").split("_")[0])
    return size, stride, low, int(part("lhs_dilate", "1")), int(part("rhs_dilate", "1"))


@lru_cache(maxsize=4096)
def valid_taps(
    inputs: int, outputs: int, size: int, stride: int, low: int, lhs_dilate: int, rhs_dilate: int
) -> int:
    """Pairs of an output position and a kernel tap that meet an input element, in one dimension."""
    span = (inputs - 1) * lhs_dilate + 1
    start = np.arange(outputs, dtype=np.int64) * stride - low
    found = 0
    for tap in range(size):
        place = start + tap * rhs_dilate
        found += int(((place >= 0) & (place < span) & (place % lhs_dilate == 0)).sum())
    return found


def _custom_call_flops(
    computation: Computation, each: Instruction, kernels: Mapping[str, Kernel]
) -> tuple[str, int] | None:
    target = each.attribute("custom_call_target", r'"[^"]*"') or ""
    target = target.strip('"')
    if target.startswith("__cublas$"):
        return "cublas", _cublas_flops(computation, each)
    if target in KERNEL_TARGETS:
        return _kernel_flops(computation, each, kernels)
    name = target.removeprefix("moe_")  # moe/dispatch/blas_matmul.py
    if name in HOST_CALLS:
        return name, HOST_CALLS[name](computation.operand_shapes(each), each.shapes)
    return None


def _cublas_flops(computation: Computation, each: Instruction) -> int:
    contracting = _config_dims(each, "lhs_contracting_dimensions")
    if not contracting:
        raise ValueError(f"the cuBLAS call {each.name} states no contracting dimensions")
    return _contraction_flops(
        computation, each, contracting, _config_dims(each, "lhs_ragged_dimensions")
    )


def _config_dims(each: Instruction, key: str) -> tuple[int, ...]:
    found = re.search(rf'"{key}":\[([^\]]*)\]', each.backend_config)
    return tuple(int(dim) for dim in re.findall(r"\d+", found.group(1))) if found else ()


def _kernel_flops(
    computation: Computation, each: Instruction, kernels: Mapping[str, Kernel]
) -> tuple[str, int] | None:
    """By the table, else by the cost that the kernel states of itself."""
    operands = computation.operand_shapes(each)
    words = re.findall(r"[A-Za-z_][\w\-]*", f"{each.op_name} {_kernel_name(each)}")
    known = next((word for word in reversed(words) if word in kernels), None)
    if known is not None:
        kernel = kernels[known]
        return (known, kernel(operands, each.shapes)) if kernel else None
    stated = re.search(r'"cost_estimate":\{"flops":"?(\d+)', each.backend_config)
    if stated:
        return _kernel_name(each) or re.sub(r"[.\d]+$", "", each.name), int(stated.group(1))
    return "unknown kernel", 0


def _kernel_name(each: Instruction) -> str:
    found = re.search(r'"(?:kernel_name|name)":"([^"]*)"', each.backend_config)
    found = found or re.search(r'\bname = "([^"]*)"', each.backend_config)
    return found.group(1) if found else ""


def grouped_product_flops(operands: tuple[Shape, ...], outputs: tuple[Shape, ...]) -> int:
    """`[N X] x [E X Y] -> [N Y]` (the matrices may be transposed): every row counts, so `2 N X Y`."""
    rows = next(each for each in operands if len(each.dims) == 2)
    return 2 * rows.elements * outputs[0].dims[-1]


def grouped_outer_flops(operands: tuple[Shape, ...], outputs: tuple[Shape, ...]) -> int:
    """`[N X] x [N Y] -> [E X Y]`: every row counts, so `2 N X Y`."""
    rows = [each for each in operands if len(each.dims) == 2][-1]
    return 2 * rows.dims[0] * math.prod(outputs[0].dims[-2:])


# XLA:TPU puts the last two in for `jax.lax.ragged_dot`. Kernels for GPU cannot state what they cost.
KERNELS: dict[str, Kernel] = {
    "grouped_product": grouped_product_flops,
    "grouped_weight_gradient": grouped_outer_flops,
    "gmm": grouped_product_flops,
    "tgmm": grouped_outer_flops,
    "ragged-dot-none": grouped_product_flops,
    "ragged-dot-metadata": None,
}

HOST_CALLS: dict[str, Callable[[tuple[Shape, ...], tuple[Shape, ...]], int]] = {
    "grouped_product": grouped_product_flops,
    "grouped_product_transposed": grouped_product_flops,
    "grouped_weight_gradient": grouped_outer_flops,
}
