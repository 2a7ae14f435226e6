"""From the rows that a process reads to the global batch on the mesh."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
import numpy as np

from moe.data.types import BY_POSITION, Batch
from moe.parallel.mesh import batch_shards
from moe.parallel.rules import BATCH_SPEC, TOKEN_SPEC

_TEXT = ("tokens", "targets", "segments", "positions", "valid", "domain")


def batch_shardings(mesh: Mesh, like: Batch | None = None) -> Batch:
    """Where the arrays of a batch lie: rows over the batch axes, positions over `sequence`.

    Args:
        mesh: the devices.
        like: has the fields of the batch; None has those of packed text.
    """
    rows, tokens = NamedSharding(mesh, BATCH_SPEC), NamedSharding(mesh, TOKEN_SPEC)
    present = _TEXT if like is None else _fields(like)
    return Batch(**{name: tokens if name in BY_POSITION else rows for name in present})


def _fields(batch: Batch) -> tuple[str, ...]:
    return tuple(name for name, value in batch._asdict().items() if value is not None)


def batch_shapes(mesh: Mesh, rows: int, length: int, like: Batch | None = None) -> Batch:
    """Shapes, dtypes and shardings of a global batch `[rows length]`.

    Args:
        mesh: the devices.
        rows: of the global batch.
        length: positions of a row.
        like: one batch, of any number of rows; None is packed text.
    """
    shardings = batch_shardings(mesh, like)

    def leaf(name: str) -> jax.ShapeDtypeStruct:
        if like is not None:
            shape, dtype = (rows, *getattr(like, name).shape[1:]), getattr(like, name).dtype
        else:
            shape = (rows, length) if name in BY_POSITION else (rows,)
            dtype = jnp.bool_ if name == "valid" else jnp.int32
        return jax.ShapeDtypeStruct(shape, dtype, sharding=getattr(shardings, name))

    return Batch(**{name: leaf(name) for name in _fields(shardings)})


def process_block(mesh: Mesh, rows: int) -> tuple[int, int]:
    """Which block of a global batch of `rows` this process reads: `(index, count)`.

    Processes that differ only along `sequence` and `tensor` read the same rows. Where the rows of a
    process lie apart, it reads the block that holds them all.
    """
    where = NamedSharding(mesh, BATCH_SPEC).addressable_devices_indices_map((rows,))
    spans = [index[0].indices(rows)[:2] for index in where.values() if index is not None]
    return covering_block(spans, rows, batch_shards(mesh))


def covering_block(spans: Sequence[tuple[int, int]], rows: int, shards: int) -> tuple[int, int]:
    """The smallest of equal blocks of whole shards that holds all spans `(first row, end)`."""
    low, high = min(first for first, _ in spans), max(end for _, end in spans)
    for count in range(shards, 0, -1):
        size = rows // count
        if shards % count == 0 and low // size == (high - 1) // size:
            return low // size, count
    raise AssertionError("one block of all rows holds every span")


def to_device(mesh: Mesh) -> Callable[[Batch], Batch]:
    """Makes the global batch, sharded over the mesh, of the rows of this process's block."""
    block, count = process_block(mesh, batch_shards(mesh))

    def put(local: np.ndarray, sharding: NamedSharding) -> jax.Array:
        rows = local.shape[0]

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            first, end, _ = index[0].indices(rows * count)
            return local[(slice(first - block * rows, end - block * rows), *index[1:])]

        shape = (rows * count, *local.shape[1:])
        return jax.make_array_from_callback(shape, sharding, part)

    return lambda local: jax.tree.map(put, local, batch_shardings(mesh, local))
