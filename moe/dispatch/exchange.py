"""Dispatch across the expert axis of the mesh. The functions here run on one shard, in `shard_map`.

Tokens are sharded over the expert axis too, so each shard sends the rows of its own tokens to the
shards that hold their experts, works on what it receives, and sends the results back the same way.
"""

import functools
from typing import Any, NamedTuple

from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.axes import EXPERT
from moe.dispatch.capacity import slot_edges, slots
from moe.dispatch.edges import Edges, combine, invert, sort_by_group, spread
from moe.dispatch.grouped import sorted_edges
from moe.dispatch.grouped_matmul import grouped_matmul
from moe.dispatch.reference import batched_matmul
from moe.dispatch.types import Dispatched, ExpertFn, num_experts
from moe.routing.types import Choices


def to_experts(buffer: Array) -> Array:
    """`[n ...]`, part `i` for shard `i` of the expert axis, to `[n ...]`, part `i` from shard `i`.

    Its own inverse, and its own transpose.
    """
    return lax.all_to_all(buffer, EXPERT, split_axis=0, concat_axis=0)


def capacity_exchange(
    x: Float[Array, "B S D"],
    choices: Choices,
    params: Any,
    expert_fn: ExpertFn,
    *,
    capacity_factor: float | None,
    priority: str,
) -> Dispatched:
    """`capacity` with the experts of one shard in `params`: the slot buffers change places."""
    B, S, D = x.shape
    n = lax.axis_size(EXPERT)
    E = num_experts(params) * n
    C = slots(capacity_factor, S, choices.expert.shape[-1], E)
    edges = slot_edges(choices, E, C, priority)
    rows = spread(x.reshape(B * S, D), edges).reshape(B, n, E // n, C, D)
    rows = to_experts(rows.transpose(1, 2, 0, 3, 4))  # [n E/n B C D], part i from shard i
    rows = rows.swapaxes(0, 1).reshape(E // n, n * B * C, D)
    outputs = expert_fn(params, rows, batched_matmul)
    outputs = to_experts(outputs.reshape(E // n, n, B, C, D).swapaxes(0, 1))
    outputs = outputs.transpose(2, 0, 1, 3, 4).reshape(B * E * C, D)
    y = combine(outputs, choices.gate.reshape(B * S, -1), edges)
    return Dispatched(y.reshape(B, S, D), edges.kept.reshape(choices.valid.shape))


def grouped_exchange(
    x: Float[Array, "B S D"],
    choices: Choices,
    params: Any,
    expert_fn: ExpertFn,
    *,
    backend: str | None = None,
) -> Dispatched:
    """`grouped` with the experts of one shard in `params`. Drops nothing, however uneven the load.

    A ragged all-to-all by an even one: every shard may send all of its `N = B * S * K` rows to one
    other, so the parts have `N` rows each, mostly empty; counts tell which rows are real, and the
    grouped product does no work on the rest.
    """
    B, S, D = x.shape
    n = lax.axis_size(EXPERT)
    local, sizes = sorted_edges(choices, num_experts(params) * n)
    route = send_route(local, sizes.reshape(n, -1))
    rows = spread(x.reshape(B * S, D), route.edges)
    rows = to_experts(rows.reshape(n, -1, D)).reshape(-1, D)
    arrived = arrived_edges(to_experts(route.counts), rows.shape[0] // n)
    matmul = functools.partial(grouped_matmul, sizes=arrived.sizes, backend=backend)
    outputs = expert_fn(params, spread(rows, arrived.edges), matmul)
    outputs = spread(outputs, reverse(arrived.edges))
    outputs = to_experts(outputs.reshape(n, -1, D)).reshape(-1, D)
    y = combine(outputs, choices.gate.reshape(B * S, -1), route.edges)
    return Dispatched(y.reshape(B, S, D), choices.valid)


class Route(NamedTuple):
    """What a shard sends: `n` parts of `N` rows, of which the first are real."""

    edges: Edges  # between choices and the rows of the send buffer
    counts: Int[Array, "n e"]  # rows for each of the `e` experts of each shard


def send_route(local: Edges, counts: Int[Array, "n e"]) -> Route:
    """Splits rows sorted by expert into one part for each shard of the expert axis."""
    N, n = local.source.shape[0], counts.shape[0]
    part_size = counts.sum(1)
    part_start = jnp.cumsum(part_size) - part_size
    index = jnp.arange(N)
    sorted_row = jnp.minimum(part_start[:, None] + index[None], N - 1)  # [n N]
    filled = index[None] < part_size[:, None]
    part = jnp.searchsorted(jnp.cumsum(part_size), local.target, side="right")  # [T K]
    part = jnp.minimum(part, n - 1)
    target = part * N + local.target - part_start[part]
    edges = Edges(
        local.source[sorted_row].reshape(-1),
        filled.reshape(-1),
        jnp.where(local.kept, target, 0),
        local.kept,
    )
    return Route(edges, counts)


class Arrived(NamedTuple):
    """How a shard sorts what it has received."""

    edges: Edges  # between the receive buffer (K = 1) and the rows sorted by expert
    sizes: Int[Array, " e"]


def arrived_edges(counts: Int[Array, "n e"], N: int) -> Arrived:
    """Sorts `n` parts of `N` rows, each sorted by expert already, into one; empty rows last."""
    n, e = counts.shape
    ends = jnp.cumsum(counts, axis=1)  # [n e]
    index = jnp.arange(N, dtype=jnp.int32)
    expert = (index[None, :, None] >= ends[:, None, :]).sum(-1).reshape(-1)  # e where empty
    order = sort_by_group(expert, e + 1)
    sizes = counts.sum(0)
    filled: Bool[Array, " R"] = jnp.arange(n * N) < sizes.sum()
    return Arrived(Edges(order, filled, invert(order)[:, None], (expert < e)[:, None]), sizes)


def reverse(edges: Edges) -> Edges:
    """The same edges seen from the other side, where each end has at most one (K = 1)."""
    return Edges(edges.target[:, 0], edges.kept[:, 0], edges.source[:, None], edges.filled[:, None])
