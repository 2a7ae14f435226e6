"""The grouped product by NumPy's BLAS: one call a group, on exactly its rows. For the CPU.

XLA:CPU can multiply a part of an array only after copying it out, and writes a product only to an array
of its own, to be copied into place: that is a fifth of the time of few large groups, and most of it of
many small ones. BLAS reads and writes in place.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
import functools
import os

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int
import numpy as np
from threadpoolctl import threadpool_limits

from moe.dispatch import host_call
from moe.dispatch.edges import vary_together

PREFIX = "moe_"  # of the operations' names, followed by those of the functions below


WINDOW = 1024  # most rows of one call: pieces that threads share out

_Piece = tuple[int, slice]  # a group, and some of its rows or of its matrix


def grouped_product(
    rows: np.ndarray, weights: np.ndarray, sizes: np.ndarray, out: np.ndarray
) -> None:
    """`out[i] = rows[i] @ weights[group of i]`, 0 beyond the last group."""
    pieces = [(e, piece) for e, part in _parts(sizes) for piece in _cut(part, WINDOW)]
    _share_out(lambda e, part: np.matmul(rows[part], weights[e], out=out[part]), pieces)
    out[sizes.sum() :] = 0


def grouped_product_transposed(
    rows: np.ndarray, weights: np.ndarray, sizes: np.ndarray, out: np.ndarray
) -> None:
    """`out[i] = rows[i] @ weights[group of i].T`, 0 beyond the last group."""
    grouped_product(rows, weights.swapaxes(1, 2), sizes, out)


def grouped_weight_gradient(
    rows: np.ndarray, cotangent: np.ndarray, sizes: np.ndarray, out: np.ndarray
) -> None:
    """`out[e] = rows_e.T @ cotangent_e`, 0 for an empty group."""
    parts = dict(_parts(sizes))
    # Whole matrices where there are enough to share out, else bands of them.
    band = max(rows.shape[1] * len(parts) // (2 * _threads()), 64)
    pieces = [(e, piece) for e in parts for piece in _cut(slice(0, rows.shape[1]), band)]

    def work(e: int, columns: slice) -> None:
        np.matmul(rows[parts[e], columns].T, cotangent[parts[e]], out=out[e, columns])

    _share_out(work, pieces)
    out[sizes == 0] = 0


def _parts(sizes: np.ndarray) -> list[_Piece]:
    """Number and rows of every group that has any."""
    ends = np.cumsum(sizes).tolist()
    return [
        (e, slice(end - n, end)) for e, (n, end) in enumerate(zip(sizes, ends, strict=True)) if n
    ]


def _cut(part: slice, size: int) -> list[slice]:
    starts = range(part.start, part.stop, size)
    return [slice(start, min(start + size, part.stop)) for start in starts]


def _share_out(work: Callable[[int, slice], object], pieces: Iterable[_Piece]) -> None:
    """Does all pieces, on this thread and those of the pool; NumPy lets go of Python meanwhile."""
    left = iter(pieces)  # that each thread takes the next of

    def some() -> None:
        for piece in left:
            work(*piece)

    helpers = [_pool().submit(some) for _ in range(_threads() - 1)]
    try:
        some()
    finally:  # none may write on once XLA has taken its buffers back
        wait(helpers)
    for helper in helpers:
        helper.result()


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """Threads for single-threaded BLAS: its own would spin for a while after each call, on XLA's cores."""
    threadpool_limits(1, user_api="blas")
    return ThreadPoolExecutor(max(_threads() - 1, 1), "grouped product")


@functools.cache
def _register() -> None:
    for function in (grouped_product, grouped_product_transposed, grouped_weight_gradient):
        host_call.register(PREFIX + function.__name__, function)


def _call(function, shape: tuple[int, ...], *operands: Array) -> Array:
    _register()
    kind = jax.typeof(operands[0])
    inside = {}
    if (
        kind.mat.varying
    ):  # of shard_map: what the result varies over, and the mesh that this refers to
        whole = NamedSharding(kind.sharding.mesh, PartitionSpec())
        inside = {"manual_axis_type": kind.mat, "sharding": whole}
    result = jax.ShapeDtypeStruct(shape, kind.dtype, **inside)
    call = jax.ffi.ffi_call(PREFIX + function.__name__, result, vmap_method="sequential")
    return call(*operands)


def blas_matmul(
    rows: Float[Array, "N X"], weights: Float[Array, "E X Y"], sizes: Int[Array, " E"]
) -> Float[Array, "N Y"]:
    """The grouped product; rows beyond the last group give zero and receive none, NaN included.

    In float32 whatever is narrower, and back: BLAS has no bfloat16 that NumPy would call.
    """
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    product = _matmul(rows.astype(wide), weights.astype(wide), sizes.astype(jnp.int32))
    return product.astype(rows.dtype)


@jax.custom_vjp
def _matmul(rows: Array, weights: Array, sizes: Array) -> Array:
    return _call(grouped_product, (rows.shape[0], weights.shape[2]), rows, weights, sizes)


def _forward(rows: Array, weights: Array, sizes: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return _matmul(rows, weights, sizes), (rows, weights, sizes)


def _backward(
    saved: tuple[Array, Array, Array], cotangent: Float[Array, "N Y"]
) -> tuple[Array, Array, None]:
    rows, weights, sizes = saved
    cotangent, rows, weights, sizes = vary_together(cotangent, rows, weights, sizes)
    d_rows = _call(grouped_product_transposed, rows.shape, cotangent, weights, sizes)
    return d_rows, _call(grouped_weight_gradient, weights.shape, rows, cotangent, sizes), None


_matmul.defvjp(_forward, _backward)
