"""Tile sizes of the TPU kernels, by shape and chip, and what tiles waste.

The matrix unit multiplies 128 x 128 (256 x 256 since v6e), memory is laid out in lanes of 128, and a kernel
waits for memory unless it does several hundred operations for each byte it reads. A product reads its rows
once for each tile of `Y`; a weight gradient reads both its operands once for each tile of the other's axis.
So tiles of `X` and `Y` are as large as the chip's vector memory allows.
"""

from collections.abc import Callable, Iterable
import itertools
import math
from typing import NamedTuple

from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Int

LANES = 128
ROWS = 512  # of a tile
STEP = (
    128  # rows of a tile that are multiplied at once where groups meet; with fewer the unit idles
)
LENGTHS = (1024, 512, 256, 128)  # of a tile of X or Y, the first that fits
FLOAT32 = 4


class Tiles(NamedTuple):
    """Rows, `X` and `Y` of a tile. In a product `X` is the summed axis, which `x` must divide."""

    rows: int
    x: int
    y: int
    step: int = STEP  # divides `rows`

    def clip(self, N: int, X: int, Y: int) -> "Tiles":
        """No tile is longer than its axis."""
        rows = min(self.rows, N)
        step = rows if rows % self.step else self.step
        return Tiles(rows, min(self.x, X), min(self.y, Y), step)


class Chip(NamedTuple):
    """What the choice depends on."""

    vmem: int  # bytes of vector memory a core
    cores: int  # that share one kernel, each its own tiles of `Y`


def chip() -> Chip:
    """The TPU that is compiled for, as the mesh in force names it; a v5p where none does.

    Of the generations since v5 the v5p has the least vector memory and the most cores, so its tiles suit all.
    """
    if not pltpu.is_tpu_device():
        return Chip(vmem=64 * 2**20, cores=2)
    info = pltpu.get_tpu_info()
    return Chip(info.vmem_capacity_bytes, info.num_cores)


def product_tiles(X: int, Y: int, itemsize: int) -> Tiles:
    """Of `[N X]` by `[E X Y]`: all of `X` if it fits, so that a group reads its matrix once a tile of `Y`."""
    target = chip()

    def memory(tiles: Tiles) -> int:
        blocks = tiles.rows * tiles.x + tiles.x * tiles.y + tiles.rows * tiles.y
        return 2 * blocks * itemsize + 2 * tiles.rows * tiles.y * FLOAT32

    summed = (divisor(X, limit) for limit in (X, 4096, 2048, *LENGTHS))
    columns = [even_part(Y, limit, target.cores) for limit in LENGTHS[:3]]
    return _first_that_fits(summed, columns, memory, target.vmem)


def gradient_tiles(X: int, Y: int, itemsize: int) -> Tiles:
    """Of the sum over rows `[N X]` by `[N Y]`: as square as fits."""
    target = chip()

    def memory(tiles: Tiles) -> int:
        operands = tiles.rows * (tiles.x + tiles.y)  # in two buffers each, and masked in float32
        return operands * (2 * itemsize + FLOAT32) + 4 * tiles.x * tiles.y * FLOAT32

    lengths = (even_part(X, limit) for limit in LENGTHS)
    columns = [even_part(Y, limit, target.cores) for limit in LENGTHS]
    return _first_that_fits(lengths, columns, memory, target.vmem)


def divisor(size: int, limit: int) -> int:
    """The largest multiple of 128 up to `limit` that divides `size`; all of it where there is none."""
    if size <= limit:
        return size
    fitting = [n for n in range(LANES, limit + 1, LANES) if size % n == 0]
    return max(fitting, default=size)


def even_part(size: int, limit: int, cores: int = 1) -> int:
    """A tile up to `limit` that leaves little over at the end, with as many tiles for each core."""

    def covered(tile: int) -> int:
        return math.ceil(size / tile / cores) * cores * tile

    lengths = [n for n in range(LANES, limit + 1, LANES) if n * 4 >= limit and n < size]
    if size <= limit:
        lengths.append(size)
    return min(lengths, key=lambda tile: (covered(tile), -tile))


def padded_rows(sizes: Int[Array, " E"], step: int = STEP) -> Int[Array, ""]:
    """Rows that the matrix unit multiplies: every `step` of them once for each group that has one there.

    Twice this times `X * Y` are the operations of the product, and of each of its gradients. At most
    `E * step` are more than `sizes.sum()`.
    """
    end = jnp.cumsum(sizes)
    first, last = (end - sizes) // step, (end - 1) // step
    return (jnp.where(sizes > 0, last - first + 1, 0) * step).sum()


def _first_that_fits(
    lengths: Iterable[int],
    columns: Iterable[int],
    memory: Callable[[Tiles], int],
    vmem: int,
) -> Tiles:
    """Half of the memory is left to the compiler's own temporaries. Shrinks `y` before `x`."""
    tiles = [Tiles(ROWS, x, y) for x, y in itertools.product(lengths, columns)]
    return next((t for t in tiles if memory(t) <= vmem // 2), tiles[-1])
