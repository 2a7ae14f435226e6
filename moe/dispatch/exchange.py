"""Exchange of rows in even parts. The functions here run on one shard, in `shard_map`.

Tokens are sharded over the axes that experts lie on, so each shard sends the rows of its own tokens to
the shards that hold their experts, works on what it receives, and sends the results back the same way.
"""

import functools
import math
from typing import Any, NamedTuple

from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

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
    buffer_factor: float | None = None,
) -> Dispatched:
    """`grouped` with the experts of one shard in `params`, by parts of one size.

    A ragged exchange by an even one: counts tell which rows of a part are real, and the grouped product
    does no work on the rest. Every shard may send all of its `N = B * S * K` rows to one other, so
    without a bound the parts have `N` rows each, mostly empty, and nothing is dropped.

    Args:
      x: tokens of this shard.
      choices: who goes where, by numbers of all experts.
      params: the experts of this shard.
      expert_fn: what one expert does to its rows.
      axes: that the experts lie on.
      backend: of the grouped product.
      buffer_factor: rows of a part, relative to the `N / n` that one of `n` shards gets at balance; what
        goes beyond is dropped, the last experts' rows first.
    """
    B, S, D = x.shape
    n = lax.axis_size(axes)
    local, sizes = sorted_edges(choices, num_experts(params) * n)
    N = local.source.shape[0]
    P = N if buffer_factor is None else min(math.ceil(buffer_factor * N / n), N)
    counts = sizes.reshape(n, -1)  # rows for each of the experts of each shard
    asked = counts.sum(1)
    given = jnp.minimum(asked, P)
    local = local._replace(kept=kept_rows(local, asked, given))
    edges = send_edges(local, asked, given, P)
    rows = spread(x.reshape(B * S, D), edges)
    rows = to_experts(rows.reshape(n, P, D), axes).reshape(-1, D)
    counts = to_experts(cut_counts(counts, given), axes)
    starts = jnp.cumsum(counts, axis=1) - counts + P * jnp.arange(n)[:, None]
    arrived = arrived_edges(counts, starts, n * P)
    outputs = run_arrived(rows, arrived, params, expert_fn, backend)
    outputs = to_experts(outputs.reshape(n, P, D), axes).reshape(-1, D)
    y = combine(outputs, choices.gate.reshape(B * S, -1), edges)
    return Dispatched(y.reshape(B, S, D), local.kept.reshape(choices.valid.shape))


def kept_rows(edges: Edges, asked: Int[Array, " n"], given: Int[Array, " n"]) -> Bool[Array, "T K"]:
    """Which choices of this shard are among the rows that their receivers take."""
    start, part = _parts(edges, asked)
    return edges.kept & (edges.target - start[part] < given[part])


def cut_counts(counts: Int[Array, "n e"], given: Int[Array, " n"]) -> Int[Array, "n e"]:
    """Rows for each expert when receivers take `given`: the last experts lose first."""
    return jnp.diff(jnp.minimum(jnp.cumsum(counts, axis=1), given[:, None]), axis=1, prepend=0)


def send_edges(local: Edges, asked: Int[Array, " n"], given: Int[Array, " n"], P: int) -> Edges:
    """Splits rows sorted by expert into `n` parts of `P` rows, of which the first `given` are real."""
    N = local.source.shape[0]
    start, part = _parts(local, asked)
    index = jnp.arange(P)
    sorted_row = jnp.minimum(start[:, None] + index[None], N - 1)  # [n P]
    filled = index[None] < given[:, None]
    target = part * P + local.target - start[part]
    return Edges(
        local.source[sorted_row].reshape(-1),
        filled.reshape(-1),
        jnp.where(local.kept, target, 0),
        local.kept,
    )


def _parts(edges: Edges, asked: Int[Array, " n"]) -> tuple[Int[Array, " n"], Int[Array, "T K"]]:
    """First sorted row of each receiver's part, and the part that each choice is in."""
    ends = jnp.cumsum(asked)
    part = jnp.searchsorted(ends, edges.target, side="right", method="compare_all")
    return ends - asked, jnp.minimum(part, asked.shape[0] - 1)


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
