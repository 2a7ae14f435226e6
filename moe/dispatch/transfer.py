"""Ragged all-to-all: each shard sends every other as many rows as it has for it.

`native` is the collective of the platform (TPU, GPU); `stand_in` means the same where there is none
(the CPU), and moves more than it must. Both are gathers by offsets and sizes, `Transfer`; the backward
pass is the same transfer seen from the other end.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe.dispatch.edges import vary_together

Axes = tuple[str, ...]
NATIVE_PLATFORMS = ("tpu", "gpu", "cuda", "rocm")


class Transfer(NamedTuple):
    """Where rows lie on this shard and on the `n` others, by number of the other shard."""

    input_offsets: Int[Array, " n"]  # here, of what is sent
    send_sizes: Int[Array, " n"]
    output_offsets: Int[Array, " n"]  # there, of what is sent
    recv_sizes: Int[Array, " n"]
    arrival_offsets: Int[Array, " n"]  # here, of what is received
    origin_offsets: Int[Array, " n"]  # there, of what is received


def back(transfer: Transfer) -> Transfer:
    """The way back: rows return to where they lay."""
    t = transfer
    return Transfer(
        input_offsets=t.arrival_offsets,
        send_sizes=t.recv_sizes,
        output_offsets=t.origin_offsets,
        recv_sizes=t.send_sizes,
        arrival_offsets=t.input_offsets,
        origin_offsets=t.output_offsets,
    )


def native(rows: Float[Array, "N D"], length: int, transfer: Transfer, axes: Axes) -> Array:
    """The platform's collective; rows of the result that nobody sends are 0."""
    # The collective says of its result what it is told of the buffer: that it varies as the rows do.
    output, _ = vary_together(jnp.zeros((length, *rows.shape[1:]), rows.dtype), rows)
    return lax.ragged_all_to_all(rows, output, *transfer[:4], axis_name=axes)


def stand_in(rows: Float[Array, "N D"], length: int, transfer: Transfer, axes: Axes) -> Array:
    """Gathers all rows of all shards and keeps those that are meant for this one."""
    everything = lax.all_gather(rows, axes)  # [n N D]
    row = jnp.arange(length)
    begins, sizes = transfer.arrival_offsets[:, None], transfer.recv_sizes[:, None]
    sent = (row[None] >= begins) & (row[None] < begins + sizes)  # [n R]
    sender, filled = jnp.argmax(sent, axis=0), sent.any(axis=0)
    at = transfer.origin_offsets[sender] + row - transfer.arrival_offsets[sender]
    found = everything[sender, jnp.where(filled, at, 0)]
    return jnp.where(filled[:, None], found, 0)


Collective = Callable[[Array, int, Transfer, Axes], Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _move(
    collective: Collective, length: int, axes: Axes, rows: Array, transfer: Transfer
) -> Array:
    return collective(rows, length, transfer, axes)


def _move_forward(collective, length, axes, rows, transfer):
    return _move(collective, length, axes, rows, transfer), (transfer, rows.shape[0])


def _move_backward(collective, _, axes, saved, cotangent):
    transfer, length = saved
    return collective(cotangent, length, back(transfer), axes), None


_move.defvjp(_move_forward, _move_backward)


def move(
    rows: Float[Array, "N D"], length: int, transfer: Transfer, axes: Axes, *, is_native: bool
) -> Float[Array, "R D"]:
    """Sends rows as `transfer` says, into a buffer of `length` rows; the others of it are 0.

    Args:
      rows: of this shard.
      length: `R`.
      transfer: the rows that go to each shard and come from each shard.
      axes: mesh axes of the exchange.
      is_native: whether the platform has the collective.
    """
    rows, *ends = vary_together(*vary_over(axes, rows, *transfer))
    return _move(native if is_native else stand_in, length, axes, rows, Transfer(*ends))


def vary_over(axes: Axes, *arrays: Array) -> tuple[Array, ...]:
    """Marks arrays as varying over `axes`, inside `shard_map`."""
    missing = [tuple(a for a in axes if a not in jax.typeof(x).mat.varying) for x in arrays]
    return tuple(
        lax.pcast(x, m, to="varying") if m else x for x, m in zip(arrays, missing, strict=True)
    )
