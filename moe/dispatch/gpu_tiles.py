"""Tile sizes of the GPU kernels by shape, and what tiles waste.

A program reads `rows + columns` numbers for each `rows * columns` products, so tiles are as large as the
registers of a streaming multiprocessor allow: 128 x 256 sums in float32, by two warp groups. Steps of 128
bytes of each operand, three under way at once, take 144 KiB of shared memory, which an A100 has (164 KiB), as
have its successors. Triton's matrix product for Hopper has the same (its tutorial "Persistent Matmul").
"""

from typing import NamedTuple

from jax.experimental import pallas as pl
from jaxtyping import Array, Int

ROWS = (128, 64, 32, 16)
STAGES = 3  # steps whose operands are on their way into shared memory at once


class Tiles(NamedTuple):
    """Lengths of a program's part of the output and of the steps in which it sums; powers of two."""

    rows: int
    columns: int
    summed: int

    @property
    def warps(self) -> int:
        """A warp group of 4 for each 128 x 128 part of the output: its sums fill the registers."""
        return max(4, min(8, self.rows * self.columns // 4096))


def product_tiles(N: int, E: int, Y: int, itemsize: int) -> Tiles:
    """Of `[N X]` by `[E X Y]`: at most half of the mean group in rows, since a group's last tile is padded."""
    rows = next((tile for tile in ROWS if 2 * tile * E <= N), ROWS[-1])
    return Tiles(rows, _part(Y, 256), _step(itemsize))


def gradient_tiles(X: int, Y: int, itemsize: int) -> Tiles:
    """Of the sum over rows `[N X]` by `[N Y]`."""
    return Tiles(_part(X, 128), _part(Y, 256), _step(itemsize))


def _part(size: int, limit: int) -> int:
    """The matrix units take no part shorter than 16."""
    return max(16, min(limit, pl.next_power_of_2(size)))


def _step(itemsize: int) -> int:
    """128 bytes of each operand's row: a cache line, and what one matrix instruction reads."""
    return 128 // itemsize


def padded_rows(sizes: Int[Array, " E"], tile: int) -> Int[Array, ""]:
    """Rows that are multiplied for groups of these sizes: every group's last tile is filled up.

    Twice this times `X * Y` are the operations of the product and of the rows' gradient. The weights'
    gradient fills up each group to a multiple of its `summed` step.
    """
    return (pl.cdiv(sizes, tile) * tile).sum()
