"""The grouped product as loops over windows of rows, with its own gradients. For the CPU.

A group is cut into full windows and one tail. The tail's length is rounded up to the next rung of a
short ladder, so every shape is static and little is wasted; windows of equal length share a loop,
whose body is slices at a dynamic start around plain matrix products. (A `lax.switch` over the lengths
inside one loop would copy the whole output in every round.)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.dispatch.edges import vary_together

RUNGS = (1, 2, 3, 4, 6, 8)  # eighths of a full window; each costs a loop to compile
SMALLEST, LARGEST = 64, 512  # bounds of a full window, rows


class Windows(NamedTuple):
    """How the groups are cut. The tails of rung `i` are those of `order[first[i]:first[i + 1]]`."""

    tail_start: Int[Array, " E"]
    tail_size: Int[Array, " E"]
    order: Int[Array, " E"]
    first: Int[Array, " rungs"]
    full_end: Int[Array, " E"]  # running count of the full windows of all groups
    full_start: Int[Array, " E"]  # row of full window 0, were it and all after it in this group


def ladder(n: int, groups: int) -> list[int]:
    """Window lengths, ascending; the last is that of a full window and about a mean group's size."""
    mean = max(n // groups, 1)
    full = min(max(1 << (mean - 1).bit_length(), SMALLEST), LARGEST, n)
    return sorted({-(-full * eighths // 8) for eighths in RUNGS})


def cut(sizes: Int[Array, " E"], n: int) -> Windows:
    """Cuts groups of `n` rows in all. Every group has a tail, an empty group an empty one."""
    lengths = jnp.array(ladder(n, sizes.shape[0]), jnp.int32)
    full = jnp.maximum(sizes - 1, 0) // lengths[-1]  # full windows of each group
    start = jnp.cumsum(sizes) - sizes
    tail_size = sizes - full * lengths[-1]
    rung = jnp.searchsorted(lengths, tail_size, method="compare_all")
    order = jnp.argsort(rung)
    rungs = jnp.arange(lengths.shape[0] + 1)
    full_end = jnp.cumsum(full)
    return Windows(
        tail_start=start + full * lengths[-1],
        tail_size=tail_size,
        order=order,
        first=jnp.searchsorted(rung[order], rungs, method="compare_all"),
        full_end=full_end,
        full_start=start - (full_end - full) * lengths[-1],
    )


class Window(NamedTuple):
    """Rows `start`, ... of one group; `mine` is False for rows of its neighbours."""

    group: Int[Array, ""]
    start: Int[Array, ""]
    mine: Bool[Array, "length 1"]
    is_tail: bool

    def of(self, rows: Array) -> Array:
        """The window's slice of `rows`."""
        return lax.dynamic_slice_in_dim(rows, self.start, self.mine.shape[0])

    def write(self, rows: Array, new: Array) -> Array:
        """`rows` with the group's own rows of the window replaced."""
        if self.is_tail:
            new = jnp.where(self.mine, new, self.of(rows))
        return lax.dynamic_update_slice_in_dim(rows, new, self.start, 0)


def for_each_window(
    sizes: Int[Array, " E"], n: int, visit: Callable[[Any, Window], Any], results: Any
) -> Any:
    """Threads `results` through `visit(results, window)`, each group's tail before its full windows."""
    lengths = ladder(n, sizes.shape[0])
    windows = cut(sizes, n)

    def tails(length: int) -> Callable[[Array, Any], Any]:
        def body(i: Array, results: Any) -> Any:
            group = windows.order[i]
            begin = windows.tail_start[group]
            start = jnp.minimum(begin, n - length)  # pulled back at the end of the rows
            row = start + jnp.arange(length)
            mine = (row >= begin) & (row < begin + windows.tail_size[group])
            return visit(results, Window(group, start, mine[:, None], True))

        return body

    def full(i: Array, results: Any) -> Any:
        group = jnp.searchsorted(windows.full_end, i, side="right", method="compare_all")
        start = windows.full_start[group] + i * lengths[-1]
        return visit(results, Window(group, start, jnp.ones((lengths[-1], 1), bool), False))

    for rung, length in enumerate(lengths):
        bounds = windows.first[rung], windows.first[rung + 1]
        results = lax.fori_loop(*bounds, tails(length), results)
    return lax.fori_loop(0, windows.full_end[-1], full, results)


@jax.custom_vjp
def blocks_matmul(
    rows: Float[Array, "N X"], weights: Float[Array, "E X Y"], sizes: Int[Array, " E"]
) -> Float[Array, "N Y"]:
    """The grouped product; rows beyond the last group give zero and receive none, NaN included."""

    def visit(out: Array, window: Window) -> Array:
        matrix = lax.dynamic_index_in_dim(weights, window.group, keepdims=False)
        return window.write(out, window.of(rows) @ matrix)

    out, _ = vary_together(jnp.zeros((rows.shape[0], weights.shape[2]), rows.dtype), rows)
    return for_each_window(sizes, rows.shape[0], visit, out)


def _forward(rows: Array, weights: Array, sizes: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return blocks_matmul(rows, weights, sizes), (rows, weights, sizes)


def _backward(
    saved: tuple[Array, Array, Array], cotangent: Float[Array, "N Y"]
) -> tuple[Array, Array, None]:
    """Both gradients in one pass. A tail writes its group's weight gradient, full windows add to it."""
    rows, weights, sizes = saved

    def visit(results: tuple[Array, Array], window: Window) -> tuple[Array, Array]:
        d_rows, d_weights = results
        matrix = lax.dynamic_index_in_dim(weights, window.group, keepdims=False)
        right = window.of(cotangent)
        d_rows = window.write(d_rows, lax.dot_general(right, matrix, (((1,), (1,)), ((), ()))))
        left = window.of(rows)
        if window.is_tail:  # both, for rows of no group may hold NaN
            left, right = (jnp.where(window.mine, part, 0) for part in (left, right))
        new = jnp.matmul(left.T, right, preferred_element_type=jnp.float32)
        if not window.is_tail:
            new += lax.dynamic_index_in_dim(d_weights, window.group, keepdims=False)
        return d_rows, lax.dynamic_update_index_in_dim(d_weights, new, window.group, 0)

    zeros = jnp.zeros_like(rows), jnp.zeros(weights.shape, jnp.float32)
    *zeros, _ = vary_together(*zeros, rows)
    d_rows, d_weights = for_each_window(sizes, rows.shape[0], visit, tuple(zeros))
    return d_rows, d_weights.astype(weights.dtype), None


blocks_matmul.defvjp(_forward, _backward)
