"""The grouped product as Pallas kernels for GPU, compiled by Triton, with its own gradients.

Each group's rows are cut into tiles of their own, the last one partly empty, so no tile belongs to two
groups and none needs to be written twice. How many tiles there can be is known from the shapes; which
rows they hold is computed from the group sizes, and the programs of tiles that do not exist end at once.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.dispatch.edges import vary_together
from moe.dispatch.gpu_tiles import STAGES, Tiles, gradient_tiles, product_tiles

LARGEST_N = 2**31 - 2**16  # rows, and the last tile's rows beyond them, are counted in int32
BAND = 8  # tiles of rows that run beside one another, so that they find their matrix in the cache

Ref = Any
Index = Any  # a traced int32, or an int


class Visits(NamedTuple):
    """The rows `start`, ..., `end - 1` of one group that one program multiplies; none if equal."""

    group: Int[Array, " visits"]  # E for the rows beyond the last group
    start: Int[Array, " visits"]
    end: Int[Array, " visits"]


def triton_matmul(
    rows: Float[Array, "N X"],
    weights: Float[Array, "E X Y"],
    sizes: Int[Array, " E"],
    *,
    interpret: bool = False,
) -> Float[Array, "N Y"]:
    """The grouped product; rows beyond the last group give zero and receive none, NaN included.

    Sums are float32. Products of float32 are rounded to TF32 first unless `jax_default_matmul_precision`
    says otherwise, like every other product on GPU. `gpu_tiles.padded_rows` counts the rows
    that are multiplied.

    Args:
      rows: sorted by group; bfloat16, float16 or float32.
      weights: one matrix a group, of the same dtype as `rows`.
      sizes: int32; a group may be empty.
      interpret: runs on any platform, slowly; for tests.

    Raises:
      ValueError: more rows than int32 counts, or unlike dtypes.
    """
    if rows.shape[0] > LARGEST_N:
        raise ValueError(
            f"The grouped product on GPU counts rows in int32 and {rows.shape[0]} rows are more than "
            f"{LARGEST_N}: use a smaller batch a device, or chunks."
        )
    if rows.dtype != weights.dtype:
        raise ValueError(
            f"Rows are {rows.dtype} and weights {weights.dtype}: cast one to the other."
        )
    rows, weights, sizes = vary_together(rows, weights, sizes)
    return _matmul(rows, weights, sizes.astype(jnp.int32), interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _matmul(rows: Array, weights: Array, sizes: Array, interpret: bool) -> Array:
    return product(rows, weights, sizes, interpret=interpret)


def _forward(
    rows: Array, weights: Array, sizes: Array, interpret: bool
) -> tuple[Array, tuple[Array, Array, Array]]:
    return product(rows, weights, sizes, interpret=interpret), (rows, weights, sizes)


def _backward(
    interpret: bool, saved: tuple[Array, Array, Array], cotangent: Float[Array, "N Y"]
) -> tuple[Array, Array, None]:
    rows, weights, sizes = saved
    d_rows = product(cotangent, weights, sizes, transpose=True, interpret=interpret)
    return d_rows, weight_gradient(rows, cotangent, sizes, interpret=interpret), None


_matmul.defvjp(_forward, _backward)


def schedule(sizes: Int[Array, " E"], N: int, tile: int) -> Visits:
    """The tiles of every group, then those of the rows beyond the last one, then empty ones."""
    sizes = jnp.append(sizes, N - sizes.sum(dtype=jnp.int32))
    tiles = pl.cdiv(sizes, tile)
    end, last = jnp.cumsum(sizes), jnp.cumsum(tiles)
    most = pl.cdiv(pl.cdiv(N, tile) + sizes.shape[0], BAND) * BAND
    index = jnp.arange(most, dtype=jnp.int32)
    group = jnp.searchsorted(last, index, side="right", method="compare_all").astype(jnp.int32)
    group = jnp.minimum(group, sizes.shape[0] - 1)
    start = jnp.minimum((end - sizes)[group] + (index - (last - tiles)[group]) * tile, N)
    return Visits(group, start, jnp.minimum(end[group], start + tile))


class Span(NamedTuple):
    """`length` positions from `start`; those from `end` on are not there. None: all are."""

    start: Index
    length: int
    end: Index | None

    @property
    def inside(self) -> Bool[Array, " length"]:
        """Which of the positions are there."""
        return self.start + jnp.arange(self.length, dtype=jnp.int32) < self.end


def _span(start: Index, length: int, size: int) -> Span:
    """Of an axis of `size`, in steps of `length` from 0, which may not divide it."""
    return Span(start, length, size if size % length else None)


def product(
    rows: Float[Array, "N X"],
    weights: Float[Array, "E _ _"],
    sizes: Int[Array, " E"],
    *,
    transpose: bool = False,
    interpret: bool = False,
) -> Float[Array, "N Y"]:
    """Rows times the matrix of their group: `[E X Y]`, or with `transpose` `[E Y X]`.

    The rows beyond the last group are one more group, whose programs write zeros and read nothing.
    """
    N, E, Y = rows.shape[0], weights.shape[0], weights.shape[1 if transpose else 2]
    tiles = product_tiles(N, E, Y, rows.dtype.itemsize)
    visits = schedule(sizes, N, tiles.rows)
    out = jax.ShapeDtypeStruct((N, Y), rows.dtype, manual_axis_type=jax.typeof(rows).mat)
    # The first axis of the grid runs fastest.
    grid = (BAND, pl.cdiv(Y, tiles.columns), visits.group.shape[0] // BAND)
    kernel = functools.partial(_product_kernel, tiles=tiles, transpose=transpose)
    call = _call(kernel, "grouped_product", out, grid, tiles, interpret)
    return call(*visits, rows, weights)


def _product_kernel(*refs: Ref, tiles: Tiles, transpose: bool) -> None:
    """One tile of rows by one tile of columns."""
    group_ref, start_ref, end_ref, rows_ref, weights_ref, out_ref = refs
    X, Y = rows_ref.shape[1], out_ref.shape[1]
    visit = pl.program_id(2) * BAND + pl.program_id(0)
    group, rows = group_ref[visit], Span(start_ref[visit], tiles.rows, end_ref[visit])
    columns = _span(pl.program_id(1) * tiles.columns, tiles.columns, Y)

    def step(i: Index, total: Array) -> Array:
        summed = _span(i * tiles.summed, tiles.summed, X)
        matrix = (columns, summed) if transpose else (summed, columns)
        left = _load(rows_ref, rows, summed)
        right = _load(weights_ref, *matrix, group)
        return total + plgpu.dot(left, right, trans_b=transpose)

    @pl.when(rows.start < rows.end)
    def _() -> None:
        is_real = (group < weights_ref.shape[0]).astype(jnp.int32)
        steps = is_real * pl.cdiv(X, tiles.summed)
        total = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
        _store(out_ref, rows, columns, lax.fori_loop(0, steps, step, total))


def weight_gradient(
    rows: Float[Array, "N X"],
    cotangent: Float[Array, "N Y"],
    sizes: Int[Array, " E"],
    *,
    interpret: bool = False,
) -> Float[Array, "E X Y"]:
    """Each group's rows times its cotangents, summed over the rows; zero if it has none."""
    X, Y, E = rows.shape[1], cotangent.shape[1], sizes.shape[0]
    tiles = gradient_tiles(X, Y, rows.dtype.itemsize)
    end = jnp.cumsum(sizes)
    out = jax.ShapeDtypeStruct((E, X, Y), rows.dtype, manual_axis_type=jax.typeof(rows).mat)
    grid = (pl.cdiv(X, tiles.rows), pl.cdiv(Y, tiles.columns), E)
    kernel = functools.partial(_gradient_kernel, tiles=tiles)
    call = _call(kernel, "grouped_weight_gradient", out, grid, tiles, interpret)
    return call(end - sizes, end, rows, cotangent)


def _gradient_kernel(*refs: Ref, tiles: Tiles) -> None:
    """One tile of one group's matrix, over all rows of the group."""
    start_ref, end_ref, rows_ref, cotangent_ref, out_ref = refs
    X, Y = rows_ref.shape[1], cotangent_ref.shape[1]
    group = pl.program_id(2)
    start, end = start_ref[group], end_ref[group]
    lines = _span(pl.program_id(0) * tiles.rows, tiles.rows, X)
    columns = _span(pl.program_id(1) * tiles.columns, tiles.columns, Y)

    def step(i: Index, total: Array) -> Array:
        # Both sides are masked: a zero times a NaN, which rows of no group may hold, is a NaN.
        rows = Span(start + i * tiles.summed, tiles.summed, end)
        left, right = _load(rows_ref, rows, lines), _load(cotangent_ref, rows, columns)
        return total + plgpu.dot(left, right, trans_a=True)

    total = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
    total = lax.fori_loop(0, pl.cdiv(end - start, tiles.summed), step, total)
    _store(out_ref, lines, columns, total, group)


def _call(
    kernel: Callable[..., None],
    name: str,
    out: jax.ShapeDtypeStruct,
    grid: tuple[int, int, int],
    tiles: Tiles,
    interpret: bool,
) -> Callable[..., Array]:
    """The kernel over the grid; groups begin anywhere, so it cuts its windows out of the whole arrays."""
    params = plgpu.CompilerParams(num_warps=tiles.warps, num_stages=STAGES)
    return pl.pallas_call(
        kernel, out, grid=grid, name=name, compiler_params=params, interpret=interpret
    )


def _window(lines: Span, columns: Span, group: Index | None) -> tuple[Any, Array | None]:
    """Index of a window `[lines columns]`, of one group's matrix if given, and which of it is there."""
    index = tuple(pl.ds(span.start, span.length) for span in (lines, columns))
    masks = [None if span.end is None else span.inside for span in (lines, columns)]
    mask = None
    for axis, inside in enumerate(masks):
        if inside is not None:
            inside = jnp.broadcast_to(
                jnp.expand_dims(inside, 1 - axis), (lines.length, columns.length)
            )
            mask = inside if mask is None else mask & inside
    return index if group is None else (group, *index), mask


def _load(ref: Ref, lines: Span, columns: Span, group: Index | None = None) -> Array:
    index, mask = _window(lines, columns, group)
    return plgpu.load(ref.at[index], mask=mask, other=None if mask is None else 0)


def _store(ref: Ref, lines: Span, columns: Span, value: Array, group: Index | None = None) -> None:
    index, mask = _window(lines, columns, group)
    plgpu.store(ref.at[index], value.astype(ref.dtype), mask=mask)
