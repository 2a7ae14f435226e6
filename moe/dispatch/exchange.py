"""Exchange of rows in even parts. The functions here run on one shard, in `shard_map`.

Tokens are sharded over the axes that experts lie on, so each shard sends the rows of its own tokens to
the shards that hold their experts, works on what it receives, and sends the results back the same way.
"""

import functools
from typing import Any, NamedTuple

from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe.dispatch.capacity import Seating, slot_edges, take_seats
from moe.dispatch.edges import Edges, combine, spread
from moe.dispatch.grouped import sorted_edges
from moe.dispatch.grouped_matmul import grouped_matmul
from moe.dispatch.reference import batched_matmul
from moe.dispatch.types import Dispatched, ExpertFn, num_experts
from moe.routing.types import Choices

Axes = tuple[str, ...]
"""Mesh axes that `E` lies on; the first is the slowest in the number of a shard."""


def to_experts(buffer: Array, axes: Axes) -> Array:
    """`[n ...]`, part `i` for shard `i` of the axes, to `[n ...]`, part `i` from shard `i`.

    Its own inverse, and its own transpose.
    """
    return lax.all_to_all(buffer, axes, split_axis=0, concat_axis=0)


def capacity_exchange(
    x: Float[Array, "B S D"],
    choices: Choices,
    params: Any,
    expert_fn: ExpertFn,
    *,
    axes: Axes,
    **seating: Any,
) -> Dispatched:
    """`capacity` with the experts of one shard in `params`: the slot buffers change places.

    Args:
      x: tokens of this shard.
      choices: who goes where, by numbers of all experts.
      params: the experts of this shard.
      expert_fn: what one expert does to its rows.
      axes: that the experts lie on.
      seating: fields of `Seating`.
    """
    B, S, D = x.shape
    n = lax.axis_size(axes)
    E = num_experts(params) * n
    seated, C = take_seats(choices, E, Seating(**seating))
    edges = slot_edges(seated, E, C)
    G = seated.position.shape[0]
    rows = spread(x.reshape(B * S, D), edges).reshape(G, n, E // n, C, D)
    rows = to_experts(rows.transpose(1, 2, 0, 3, 4), axes)  # [n E/n G C D], part i from shard i
    rows = rows.swapaxes(0, 1).reshape(E // n, n * G * C, D)
    outputs = expert_fn(params, rows, batched_matmul)
    outputs = to_experts(outputs.reshape(E // n, n, G, C, D).swapaxes(0, 1), axes)
    outputs = outputs.transpose(2, 0, 1, 3, 4).reshape(G * E * C, D)
    y = combine(outputs, seated.choices.gate.reshape(B * S, -1), edges)
    return Dispatched(y.reshape(B, S, D), edges.kept.reshape(choices.valid.shape))


def grouped_exchange(
    x: Float[Array, "B S D"],
    choices: Choices,
    params: Any,
    expert_fn: ExpertFn,
    *,
    axes: Axes,
    backend: str,
) -> Dispatched:
    """`grouped` with the experts of one shard in `params`. Drops nothing, however uneven the load.

    A ragged exchange by an even one: every shard may send all of its `N = B * S * K` rows to one
    other, so the parts have `N` rows each, mostly empty; counts tell which rows are real, and the
    grouped product does no work on the rest. Arguments as for `capacity_exchange`, and the back end
    of the grouped product.
    """
    B, S, D = x.shape
    n = lax.axis_size(axes)
    local, sizes = sorted_edges(choices, num_experts(params) * n)
    counts = sizes.reshape(n, -1)  # rows for each of the experts of each shard
    edges = send_edges(local, counts.sum(1))
    rows = spread(x.reshape(B * S, D), edges)
    N = rows.shape[0] // n
    rows = to_experts(rows.reshape(n, N, D), axes).reshape(-1, D)
    counts = to_experts(counts, axes)
    starts = jnp.cumsum(counts, axis=1) - counts + N * jnp.arange(n)[:, None]
    arrived = arrived_edges(counts, starts, n * N)
    outputs = run_arrived(rows, arrived, params, expert_fn, backend)
    outputs = to_experts(outputs.reshape(n, N, D), axes).reshape(-1, D)
    y = combine(outputs, choices.gate.reshape(B * S, -1), edges)
    return Dispatched(y.reshape(B, S, D), choices.valid)


def send_edges(local: Edges, sizes: Int[Array, " n"]) -> Edges:
    """Splits rows sorted by expert into `n` parts of `N` rows, of which the first `sizes` are real."""
    N, n = local.source.shape[0], sizes.shape[0]
    start = jnp.cumsum(sizes) - sizes
    index = jnp.arange(N)
    sorted_row = jnp.minimum(start[:, None] + index[None], N - 1)  # [n N]
    filled = index[None] < sizes[:, None]
    part = jnp.searchsorted(jnp.cumsum(sizes), local.target, side="right")  # [T K]
    part = jnp.minimum(part, n - 1)
    target = part * N + local.target - start[part]
    return Edges(
        local.source[sorted_row].reshape(-1),
        filled.reshape(-1),
        jnp.where(local.kept, target, 0),
        local.kept,
    )


class Arrived(NamedTuple):
    """How a shard sorts what it has received."""

    edges: Edges  # between the receive buffer (K = 1) and the rows sorted by expert
    sizes: Int[Array, " e"]


def arrived_edges(counts: Int[Array, "n e"], starts: Int[Array, "n e"], R: int) -> Arrived:
    """Sorts by expert what came from `n` senders, each of whom had sorted it; without a sort.

    Args:
      counts: rows that sender `i` has for local expert `j`.
      starts: where they begin in the receive buffer; not descending from one to the next.
      R: rows of that buffer; those of no block are empty.
    """
    flat_counts, flat_starts = counts.reshape(-1), starts.reshape(-1)
    by_expert = counts.T.reshape(-1)
    by_expert_starts = jnp.cumsum(by_expert) - by_expert  # [e*n] in the sorted rows
    sorted_starts = by_expert_starts.reshape(counts.shape[::-1]).T.reshape(-1)
    row = jnp.arange(R, dtype=jnp.int32)

    block = _last_begun(flat_starts, R)
    offset = row - flat_starts[block]
    kept = (offset >= 0) & (offset < flat_counts[block])
    target = jnp.where(kept, sorted_starts[block] + offset, 0)

    block = _last_begun(by_expert_starts, R)
    arrival_starts = starts.T.reshape(-1)
    filled = row < by_expert.sum()
    source = jnp.where(filled, arrival_starts[block] + row - by_expert_starts[block], 0)
    return Arrived(Edges(source, filled, target[:, None], kept[:, None]), counts.sum(0))


def _last_begun(starts: Int[Array, " X"], R: int) -> Int[Array, " R"]:
    """For every row the last block that starts at it or before. A count, where a search is slow."""
    begun = jnp.zeros(R, jnp.int32).at[starts].add(1, mode="drop")
    return jnp.maximum(jnp.cumsum(begun) - 1, 0)


def run_arrived(
    rows: Float[Array, "R D"], arrived: Arrived, params: Any, expert_fn: ExpertFn, backend: str
) -> Float[Array, "R D"]:
    """The experts of this shard on the rows it has received; results lie where their rows lay."""
    matmul = functools.partial(grouped_matmul, sizes=arrived.sizes, backend=backend)
    outputs = expert_fn(params, spread(rows, arrived.edges), matmul)
    return spread(outputs, reverse(arrived.edges))


def reverse(edges: Edges) -> Edges:
    """The same edges seen from the other side, where each end has at most one (K = 1)."""
    return Edges(edges.target[:, 0], edges.kept[:, 0], edges.source[:, None], edges.filled[:, None])
