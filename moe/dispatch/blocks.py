"""The grouped product as loops over windows of rows, with its own gradients. For the CPU.

A group is cut into full windows and one tail. The tail's length is rounded up to the next step of a
short ladder, so every shape is static and little is wasted; windows of equal length share a loop,
whose body is slices at a dynamic start around one plain matrix product. (A `lax.switch` over the
lengths inside one loop would copy the whole output in every round.)
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe.dispatch.edges import vary_together

STEPS = 8  # rungs of the ladder: a tail wastes less than a rung
SMALLEST, LARGEST = 64, 1024  # bounds of a full window, rows


class Windows(NamedTuple):
    """How the groups are cut. Groups in the order of their tail's rung: `order[first[i]:first[i+1]]`."""

    tail_start: Int[Array, " E"]
    tail_size: Int[Array, " E"]
    order: Int[Array, " E"]
    first: Int[Array, " rungs"]
    full_end: Int[Array, " E"]  # running count of the full windows of all groups
    full_start: Int[Array, " E"]  # row at which full window 0 would start, were it in this group


def ladder(n: int, groups: int) -> list[int]:
    """Window lengths, ascending; the last is that of a full window and about a mean group's size."""
    mean = max(n // groups, 1)
    full = min(max(1 << (mean - 1).bit_length(), SMALLEST), LARGEST, n)
    return sorted({-(-full * i // STEPS) for i in range(1, STEPS + 1)})


def cut(sizes: Int[Array, " E"], n: int) -> Windows:
    """Cuts groups of `n` rows in all. Every group has a tail, an empty group an empty one."""
    lengths = jnp.array(ladder(n, sizes.shape[0]), jnp.int32)
    full = jnp.maximum(sizes - 1, 0) // lengths[-1]  # full windows of each group
    start = jnp.cumsum(sizes) - sizes
    tail_start = start + full * lengths[-1]
    tail_size = sizes - full * lengths[-1]
    rung = jnp.searchsorted(lengths, tail_size)
    # A tail that would run over the end of the rows goes to a loop of its own, after the last rung.
    rung = jnp.where(tail_start + lengths[rung] > n, lengths.shape[0], rung)
    order = jnp.argsort(rung)
    first = jnp.searchsorted(rung[order], jnp.arange(lengths.shape[0] + 2))
    full_end = jnp.cumsum(full)
    return Windows(
        tail_start, tail_size, order, first, full_end, start - (full_end - full) * lengths[-1]
    )


def for_each_window(
    sizes: Int[Array, " E"],
    n: int,
    total: Array,
    full: Callable[[Array, Array, Array], Array],
    tail: Callable[..., Array],
) -> Array:
    """Runs the loops and threads `total` through them.

    Args:
      sizes: rows of each group.
      n: rows in all.
      total: what the loops write to.
      full: `(total, group, start) -> total` for a full window.
      tail: `(total, group, first, begin, end, length, sure) -> total` for a window of the static
        `length` rows from row `first`, of which `[begin, end)` are the group's. The first `sure` rows
        certainly are.
    """
    lengths = ladder(n, sizes.shape[0])
    windows = cut(sizes, n)

    def tails(rung: int, length: int, sure: int, total: Array) -> Array:
        def body(i: Array, total: Array) -> Array:
            group = windows.order[i]
            begin = windows.tail_start[group]
            first = jnp.minimum(begin, n - length)
            return tail(total, group, first, begin, begin + windows.tail_size[group], length, sure)

        return lax.fori_loop(windows.first[rung], windows.first[rung + 1], body, total)

    for rung, length in enumerate(lengths):
        total = tails(rung, length, lengths[rung - 1] if rung else 0, total)
    total = tails(len(lengths), lengths[-1], 0, total)

    def body(i: Array, total: Array) -> Array:
        group = jnp.searchsorted(windows.full_end, i, side="right", method="compare_all")
        return full(total, group, windows.full_start[group] + i * lengths[-1])

    return lax.fori_loop(0, windows.full_end[-1], body, total)


def rows_product(
    rows: Float[Array, "N _"], weights: Float[Array, "E X Y"], sizes: Int[Array, " E"], side: int
) -> Float[Array, "N _"]:
    """Each row times its group's matrix; `side` of `X Y` is contracted."""
    n = rows.shape[0]
    full_length = ladder(n, sizes.shape[0])[-1]

    def product(group, first, length):
        window = lax.dynamic_slice_in_dim(rows, first, length)
        matrix = lax.dynamic_index_in_dim(weights, group, keepdims=False)
        return lax.dot_general(window, matrix, (((1,), (side,)), ((), ())))

    def full(out, group, start):
        return lax.dynamic_update_slice_in_dim(out, product(group, start, full_length), start, 0)

    def tail(out, group, first, begin, end, length, sure):
        new = product(group, first, length)
        if sure:
            out = lax.dynamic_update_slice_in_dim(out, new[:sure], first, 0)
        index = first + jnp.arange(sure, length)
        mine = ((index >= begin) & (index < end))[:, None]
        old = lax.dynamic_slice_in_dim(out, first + sure, length - sure)
        mixed = jnp.where(mine, new[sure:], old)
        return lax.dynamic_update_slice_in_dim(out, mixed, first + sure, 0)

    (out, _) = vary_together(jnp.zeros((n, weights.shape[2 - side]), rows.dtype), rows)
    return for_each_window(sizes, n, out, full, tail)


def weights_product(
    rows: Float[Array, "N X"], cotangent: Float[Array, "N Y"], sizes: Int[Array, " E"]
) -> Float[Array, "E X Y"]:
    """The gradient of each group's matrix: its rows, transposed, times their cotangents.

    Tails come first and write, so nothing need be filled with zeros; full windows add.
    """
    n, E = rows.shape[0], sizes.shape[0]
    full_length = ladder(n, E)[-1]

    def product(left, first, length):
        right = lax.dynamic_slice_in_dim(cotangent, first, length)
        return jnp.matmul(left.T, right, preferred_element_type=jnp.float32)

    def full(total, group, start):
        left = lax.dynamic_slice_in_dim(rows, start, full_length)
        old = lax.dynamic_index_in_dim(total, group, keepdims=False)
        new = old + product(left, start, full_length)
        return lax.dynamic_update_index_in_dim(total, new, group, 0)

    def tail(total, group, first, begin, end, length, sure):
        del sure
        index = first + jnp.arange(length)
        mine = ((index >= begin) & (index < end))[:, None]
        left = jnp.where(mine, lax.dynamic_slice_in_dim(rows, first, length), 0)
        return lax.dynamic_update_index_in_dim(total, product(left, first, length), group, 0)

    shape = (E, rows.shape[1], cotangent.shape[1])
    (total, _) = vary_together(lax.empty(shape, jnp.float32), rows)
    return for_each_window(sizes, n, total, full, tail).astype(rows.dtype)


@jax.custom_vjp
def blocks_matmul(
    rows: Float[Array, "N X"], weights: Float[Array, "E X Y"], sizes: Int[Array, " E"]
) -> Float[Array, "N Y"]:
    """Rows beyond the last group must be zero; what they give is not defined."""
    return rows_product(rows, weights, sizes, side=0)


def _forward(rows, weights, sizes):
    return blocks_matmul(rows, weights, sizes), (rows, weights, sizes)


def _backward(saved, cotangent):
    rows, weights, sizes = saved
    d_rows = rows_product(cotangent, weights, sizes, side=1)
    return d_rows, weights_product(rows, cotangent, sizes), None


blocks_matmul.defvjp(_forward, _backward)
