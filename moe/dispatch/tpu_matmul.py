"""The grouped product as Pallas kernels for TPU, with its own gradients.

The scheme is that of MegaBlocks (Gale et al. 2022, https://arxiv.org/abs/2211.15841), as in the kernels
of `jax.experimental.pallas.ops.tpu.megablox`: rows are cut into tiles, a tile that several groups share is
visited once by each, and a schedule computed from the group sizes drives the grid. The kernels here differ in
what training across a mesh needs: they take any number of rows without padding it, write zeros beyond the
last group and for empty groups themselves, and say over which mesh axes their output varies, which
`jax.shard_map` asks of every kernel.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe.dispatch.tpu_tiles import Tiles, chip, gradient_tiles, product_tiles

LARGEST_N = 2**31 - 1  # rows are counted in int32
Index = Any  # a traced int32, or a reference to one
Mask = Callable[[Array], Array]


class How(NamedTuple):
    """What is the same for a product and its gradients."""

    tiles: Tiles | None
    interpret: bool


class Visits(NamedTuple):
    """Which tile of rows is multiplied for which group; the kernels read it from scalar memory."""

    group: Int[Array, " visits"]
    tile: Int[Array, " visits"]  # ascending, so an output tile is finished before the next begins
    start: Int[Array, " groups"]  # first row of each group
    end: Int[Array, " groups"]


def tpu_matmul(
    rows: Float[Array, "N X"],
    weights: Float[Array, "E X Y"],
    sizes: Int[Array, " E"],
    *,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "N Y"]:
    """The grouped product; rows beyond the last group give zero and receive none, NaN included.

    Sums are float32. XLA's cost analysis counts `2 * N * X * Y` for it and for each gradient, whatever the
    sizes; `tpu_tiles.padded_rows` counts the rows that are really multiplied.

    Args:
      rows: sorted by group; bfloat16 or float32.
      weights: one matrix a group, of the same dtype as `rows`.
      sizes: int32; a group may be empty.
      tiles: of all three products; None chooses by shape and by the chip that is compiled for.
      interpret: runs on any platform, slowly; for tests.

    Raises:
      ValueError: more rows than int32 counts, unlike dtypes, or a summed axis that `tiles` do not divide.
    """
    if rows.shape[0] > LARGEST_N:
        raise ValueError(
            f"The grouped product on TPU counts rows in int32 and {rows.shape[0]} rows are more than "
            f"{LARGEST_N}: use a smaller batch a device, or chunks."
        )
    if rows.dtype != weights.dtype:
        raise ValueError(
            f"Rows are {rows.dtype} and weights {weights.dtype}: cast one to the other."
        )
    return _matmul(rows, weights, sizes.astype(jnp.int32), How(tiles, interpret))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _matmul(rows: Array, weights: Array, sizes: Array, how: How) -> Array:
    return product(rows, weights, sizes, how)


def _forward(
    rows: Array, weights: Array, sizes: Array, how: How
) -> tuple[Array, tuple[Array, Array, Array]]:
    return product(rows, weights, sizes, how), (rows, weights, sizes)


def _backward(
    how: How, saved: tuple[Array, Array, Array], cotangent: Float[Array, "N Y"]
) -> tuple[Array, Array, None]:
    rows, weights, sizes = saved
    d_rows = product(cotangent, weights, sizes, how, transpose=True)
    return d_rows, weight_gradient(rows, cotangent, sizes, weights.dtype, how), None


_matmul.defvjp(_forward, _backward)


def schedule(
    sizes: Int[Array, " groups"], N: int, tile: int, *, visit_empty: bool
) -> tuple[Visits, Array]:
    """The visits in order of rows, and how many there are; the entries after these mean nothing.

    Args:
      sizes: rows of each group, int32.
      N: rows.
      tile: rows of a tile.
      visit_empty: an empty group has one visit, which gives it the chance to write zeros.
    """
    groups, tiles = sizes.shape[0], pl.cdiv(N, tile)
    end = jnp.cumsum(sizes)
    start = end - sizes
    first = jnp.minimum(start // tile, tiles - 1)
    # Not (end + tile - 1) // tile, which overflows at the largest N.
    visits = end // tile + (end % tile > 0) - first
    visits = jnp.where(sizes > 0, visits, int(visit_empty))
    last = jnp.cumsum(visits)
    index = jnp.arange(tiles + groups - 1, dtype=jnp.int32)  # each group shares its first tile
    group = jnp.searchsorted(last, index, side="right", method="compare_all").astype(jnp.int32)
    group = jnp.minimum(group, groups - 1)
    tile_of = jnp.minimum((first - last + visits)[group] + index, tiles - 1)
    return Visits(group, tile_of.astype(jnp.int32), start, end), last[-1]


def product(
    rows: Float[Array, "N X"],
    weights: Float[Array, "E _ _"],
    sizes: Int[Array, " E"],
    how: How,
    *,
    transpose: bool = False,
) -> Float[Array, "N Y"]:
    """Rows times the matrix of their group: `[E X Y]`, or with `transpose` `[E Y X]`.

    The rows beyond the last group are one more group, whose visits write zeros and read nothing.
    """
    N, X = rows.shape
    E, Y = weights.shape[0], weights.shape[1 if transpose else 2]
    tiles = (how.tiles or product_tiles(X, Y, rows.dtype.itemsize)).clip(N, X, Y)
    if X % tiles.x:
        raise ValueError(f"A tile of {tiles.x} does not divide the summed axis of {X}.")
    parts, columns = X // tiles.x, pl.cdiv(Y, tiles.y)
    beyond = N - sizes.sum(keepdims=True, dtype=jnp.int32)
    visits, count = schedule(jnp.concatenate([sizes, beyond]), N, tiles.rows, visit_empty=False)

    def row_block(y: Index, visit: Index, part: Index, visits: Visits) -> tuple[Index, Index]:
        # Beyond the last group: the block that is there already, so that nothing is copied.
        is_beyond = visits.group[visit] == E
        final = lax.div(jnp.maximum(visits.start[E] - 1, 0), tiles.rows)
        tile = jnp.where(is_beyond, final, visits.tile[visit])
        return tile, jnp.where(is_beyond, parts - 1, part)

    def matrix_block(
        y: Index, visit: Index, part: Index, visits: Visits
    ) -> tuple[Index, Index, Index]:
        part = jnp.where(visits.group[visit] == E, parts - 1, part)
        group = jnp.minimum(visits.group[visit], E - 1)
        return (group, y, part) if transpose else (group, part, y)

    def out_block(y: Index, visit: Index, part: Index, visits: Visits) -> tuple[Index, Index]:
        return visits.tile[visit], y

    matrix = (None, tiles.y, tiles.x) if transpose else (None, tiles.x, tiles.y)
    return pl.pallas_call(
        functools.partial(_product_kernel, step=tiles.step, transpose=transpose),
        name="grouped_product",
        out_shape=jax.ShapeDtypeStruct((N, Y), rows.dtype, manual_axis_type=jax.typeof(rows).mat),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(columns, count, parts),
            in_specs=[
                pl.BlockSpec((tiles.rows, tiles.x), row_block),
                pl.BlockSpec(matrix, matrix_block),
            ],
            out_specs=pl.BlockSpec((tiles.rows, tiles.y), out_block),
            scratch_shapes=[pltpu.VMEM((tiles.rows, tiles.y), jnp.float32)],
        ),
        cost_estimate=_cost(
            N * X * Y, (rows.size * columns + weights.size + N * Y) * rows.dtype.itemsize
        ),
        compiler_params=_compiler_params("parallel", "arbitrary", "arbitrary"),
        interpret=how.interpret,
    )(visits, rows, weights)


def _product_kernel(
    visits: Visits, rows: Any, matrix: Any, out: Any, total: Any, *, step: int, transpose: bool
) -> None:
    """One tile of rows for one group: `total` adds up over the tiles of the summed axis."""
    visit, part = pl.program_id(1), pl.program_id(2)

    def piece(here: Any, own: Mask | None) -> None:
        @pl.when(part == 0)
        def _() -> None:
            total[here] = jnp.zeros_like(total[here])

        @pl.when(visits.group[visit] < visits.start.shape[0] - 1)
        def _() -> None:
            total[here] += _dot(rows[here], matrix[...], ((1,), (1 if transpose else 0,)))

        @pl.when(part == pl.num_programs(2) - 1)
        def _() -> None:
            result = total[here]
            if own is not None:  # the other rows are those of the groups that share the tile
                result = jnp.where(own(result), result, out[here].astype(jnp.float32))
            out[here] = result.astype(out.dtype)

    _for_own_rows(visits, visit, rows.shape[0], step, piece)


def weight_gradient(
    rows: Float[Array, "N X"],
    cotangent: Float[Array, "N Y"],
    sizes: Int[Array, " E"],
    dtype: jax.typing.DTypeLike,
    how: How,
) -> Float[Array, "E X Y"]:
    """Each group's rows times its cotangents, summed over the rows; zero if it has none."""
    (N, X), Y, E = rows.shape, cotangent.shape[1], sizes.shape[0]
    tiles = (how.tiles or gradient_tiles(X, Y, rows.dtype.itemsize)).clip(N, X, Y)
    visits, count = schedule(sizes, N, tiles.rows, visit_empty=True)
    columns, lines = pl.cdiv(Y, tiles.y), pl.cdiv(X, tiles.x)
    read = (rows.size * columns + cotangent.size * lines) * rows.dtype.itemsize

    def row_block(y: Index, x: Index, visit: Index, visits: Visits) -> tuple[Index, Index]:
        return visits.tile[visit], x

    def cotangent_block(y: Index, x: Index, visit: Index, visits: Visits) -> tuple[Index, Index]:
        return visits.tile[visit], y

    def out_block(y: Index, x: Index, visit: Index, visits: Visits) -> tuple[Index, Index, Index]:
        return visits.group[visit], x, y

    return pl.pallas_call(
        functools.partial(_gradient_kernel, step=tiles.step),
        name="grouped_weight_gradient",
        out_shape=jax.ShapeDtypeStruct((E, X, Y), dtype, manual_axis_type=jax.typeof(rows).mat),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(columns, lines, count),
            in_specs=[
                pl.BlockSpec((tiles.rows, tiles.x), row_block),
                pl.BlockSpec((tiles.rows, tiles.y), cotangent_block),
            ],
            out_specs=pl.BlockSpec((None, tiles.x, tiles.y), out_block),
            scratch_shapes=[pltpu.VMEM((tiles.x, tiles.y), jnp.float32)],
        ),
        cost_estimate=_cost(N * X * Y, read + E * X * Y * jnp.dtype(dtype).itemsize),
        compiler_params=_compiler_params("parallel", "parallel", "arbitrary"),
        interpret=how.interpret,
    )(visits, rows, cotangent)


def _gradient_kernel(
    visits: Visits, rows: Any, cotangent: Any, out: Any, total: Any, *, step: int
) -> None:
    """One tile of rows for one group: `total` adds up over the visits of the group."""
    visit, final = pl.program_id(2), pl.num_programs(2) - 1
    group = visits.group[visit]

    @pl.when((visit == 0) | (visits.group[jnp.maximum(visit - 1, 0)] != group))
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    def piece(here: Any, own: Mask | None) -> None:
        left, right = rows[here], cotangent[here]
        if own is not None:  # both, for rows of no group may hold NaN
            left, right = (
                jnp.where(own(x), x.astype(jnp.float32), 0).astype(x.dtype) for x in (left, right)
            )
        total[...] += _dot(left, right, ((0,), (0,)))

    _for_own_rows(visits, visit, rows.shape[0], step, piece)

    @pl.when((visit == final) | (visits.group[jnp.minimum(visit + 1, final)] != group))
    def _() -> None:
        out[...] = total[...].astype(out.dtype)


def _for_own_rows(
    visits: Visits, visit: Index, tile: int, step: int, piece: Callable[[Any, Mask | None], None]
) -> None:
    """Calls `piece(here, own)` for slices of the tile that hold all rows of the visit's group in it.

    That is the whole tile, of which no mask is needed, or as few slices of `step` rows as there are, with a
    mask like the array that it is given. So the matrix unit's waste does not grow with the tile.
    """
    group, first = visits.group[visit], visits.tile[visit] * tile
    start = jnp.clip(visits.start[group] - first, 0, tile)
    end = jnp.clip(visits.end[group] - first, 0, tile)
    whole = end - start == tile

    @pl.when(whole)
    def _() -> None:
        if tile == step:
            piece(pl.ds(0, tile), None)
        else:
            _loop(0, tile // step, step, lambda begin: piece(pl.ds(begin, step), None))

    def part(begin: Index) -> None:
        def own(like: Array) -> Array:
            row = begin + lax.broadcasted_iota(jnp.int32, like.shape, 0)
            return (row >= start) & (row < end)

        piece(pl.ds(begin, step), own)

    @pl.when(jnp.logical_not(whole) & (end > start))
    def _() -> None:
        if tile == step:
            part(0)
        else:
            _loop(lax.div(start, step), lax.div(end - 1, step) + 1, step, part)


def _loop(first: Index, last: Index, step: int, body: Callable[[Index], None]) -> None:
    lax.fori_loop(first, last, lambda i, _: body(pl.multiple_of(i * step, step)), None)


def _dot(left: Array, right: Array, contract: tuple[tuple[int], tuple[int]]) -> Array:
    return lax.dot_general(left, right, (contract, ((), ())), preferred_element_type=jnp.float32)


def _cost(products: int, bytes_accessed: int) -> pl.CostEstimate:
    return pl.CostEstimate(flops=2 * products, bytes_accessed=bytes_accessed, transcendentals=0)


def _compiler_params(*axes: Any) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=axes, vmem_limit_bytes=chip().vmem * 3 // 4)
