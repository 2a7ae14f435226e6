"""Shapes as the text of a compiled module prints them: dtype, dimensions and layout."""

from functools import lru_cache
import math
import re
from typing import NamedTuple

# Bits of the dtypes whose name does not hold their width.
UNNUMBERED_BITS = {"pred": 8, "token": 0, "opaque": 0}

_TOKEN = re.compile(r"(\()|(\))|([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
_TILE = re.compile(r"T\(([\d,*]+)\)")
_SPACE = re.compile(r"S\((\d+)\)")


class Shape(NamedTuple):
    """One array, such as `bf16[8,128]{1,0:T(8,128)(2,1)S(1)}`.

    Args:
      dtype: XLA's name, such as `bf16`.
      dims: sizes, the upper bounds of dynamic ones.
      layout: what stands between the braces; empty where the text has none.
    """

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.dims)

    @property
    def bits(self) -> int:
        """Bits of one element."""
        if self.dtype in UNNUMBERED_BITS:
            return UNNUMBERED_BITS[self.dtype]
        return int(re.findall(r"\d+", self.dtype)[0])

    @property
    def bytes(self) -> int:
        """Bytes of the elements alone."""
        return math.ceil(self.elements * self.bits / 8)

    @property
    def padded_bytes(self) -> int:
        """Bytes in memory: the minor dimensions rounded up to the layout's first tile.

        A TPU keeps `f32[4096,8]{1,0:T(8,128)}` as 4096 x 128 numbers, 16 times its elements.
        """
        tile = _TILE.search(self.layout)
        if tile is None:
            return self.bytes
        sizes = [1 if size == "*" else int(size) for size in tile.group(1).split(",")]
        order = self.layout.split(":")[0]
        minor_to_major = [int(axis) for axis in order.split(",")] if order else []
        physical = [self.dims[axis] for axis in reversed(minor_to_major)]
        physical = [1] * (len(sizes) - len(physical)) + physical
        first = len(physical) - len(sizes)
        for place, size in enumerate(sizes, start=first):
            physical[place] = math.ceil(physical[place] / size) * size
        return math.ceil(math.prod(physical) * self.bits / 8)

    @property
    def memory_space(self) -> int:
        """0 is the main memory (HBM), 1 a TPU's VMEM, 5 the host; others are scalars and flags."""
        space = _SPACE.search(self.layout)
        return int(space.group(1)) if space else 0

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@lru_cache(maxsize=65536)
def parse_shape(text: str) -> Shape | tuple:
    """A `Shape`, or nested tuples of them where the text is a tuple."""
    stack: list[list] = [[]]
    for opened, closed, dtype, dims, layout in _TOKEN.findall(text):
        if opened:
            stack.append([])
        elif closed:
            done = tuple(stack.pop())
            stack[-1].append(done)
        else:
            sizes = tuple(int(size.strip().removeprefix("<=")) for size in dims.split(",") if size)
            stack[-1].append(Shape(dtype, sizes, layout))
    if len(stack) != 1 or len(stack[0]) != 1:
        raise ValueError(f"not a shape of XLA: {text[:100]!r}")
    return stack[0][0]


def leaves(shape: Shape | tuple) -> tuple[Shape, ...]:
    """All arrays of a shape, depth first."""
    if isinstance(shape, Shape):
        return (shape,)
    return tuple(leaf for part in shape for leaf in leaves(part))


def leaf_place(shape: Shape | tuple, index: tuple[int, ...]) -> int:
    """The place among a shape's leaves where its part at `index` begins."""
    place = 0
    for step in index:
        if isinstance(shape, Shape):
            raise ValueError(f"the shape {shape} has no part {index}")
        place += sum(len(leaves(part)) for part in shape[:step])
        shape = shape[step]
    return place
