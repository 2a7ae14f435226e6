"""Dispatch into a fixed number of slots an expert; what finds no slot is dropped.

One group is one sequence, so which choices are dropped depends on no other sequence, on no batch
size and on no mesh. Gates are not renormalised after a drop.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.dispatch.edges import Edges, combine, sort_by_group, spread
from moe.dispatch.reference import batched_matmul
from moe.dispatch.types import Dispatched, ExpertFn, num_experts
from moe.errors import ConfigError
from moe.routing.types import Choices

PRIORITIES = ("token_major", "choice_major", "gate", "batch")


def capacity(
    x: Float[Array, "B S D"],
    choices: Choices,
    params: Any,
    expert_fn: ExpertFn,
    *,
    capacity_factor: float | None,
    priority: str = "token_major",
) -> Dispatched:
    """Each expert takes the first `C` choices of every sequence.

    Args:
      x: tokens, any float dtype; the output has the same, exactly 0 for a token with no choice kept.
      choices: who goes where; entries that are not valid take no slot.
      params: the experts, every leaf with a leading `E`.
      expert_fn: what one expert does to its rows.
      capacity_factor: `C = ceil(capacity_factor * K * S / E)`, at most `S`; None drops nothing (`C = S`).
      priority: `token_major` seats earlier tokens first, which is causal. The others let later tokens
        push out earlier ones: `choice_major` seats all first choices before any second one (GShard,
        Lepikhin et al. 2021), `gate` the choices of the largest gates (Megatron-LM's "probs"),
        `batch` the tokens of the largest gate, first choices first (Batch Prioritised Routing, Riquelme
        et al. 2021, arXiv:2106.05974; here within a sequence).
    """
    B, S, D = x.shape
    E = num_experts(params)
    C = slots(capacity_factor, S, choices.expert.shape[-1], E)
    edges = slot_edges(choices, E, C, priority)
    rows = spread(x.reshape(B * S, D), edges)
    rows = rows.reshape(B, E, C, D).swapaxes(0, 1).reshape(E, B * C, D)
    outputs = expert_fn(params, rows, batched_matmul)
    outputs = outputs.reshape(E, B, C, D).swapaxes(0, 1).reshape(B * E * C, D)
    y = combine(outputs, choices.gate.reshape(B * S, -1), edges)
    return Dispatched(y.reshape(B, S, D), edges.kept.reshape(choices.valid.shape))


def slots(capacity_factor: float | None, S: int, K: int, E: int) -> int:
    """Slots `C` an expert has for each sequence. A token names an expert once, so `S` are enough.

    Raises:
      ConfigError: no slot at all.
    """
    if capacity_factor is None:
        return S
    C = min(math.ceil(capacity_factor * K * S / E), S)
    if C < 1:
        raise ConfigError(
            f"dispatch.capacity_factor={capacity_factor} leaves an expert no slot: "
            f"ceil({capacity_factor} * {K} choices * {S} positions / {E} experts) = {C}. "
            "Use a factor above 0, or none to drop nothing."
        )
    return C


def slot_edges(choices: Choices, E: int, C: int, priority: str) -> Edges:
    """Joins choices to the rows of a `[B E C]` buffer, both flattened."""
    B, S, K = choices.expert.shape
    position = seat(choices, E, priority)  # [B S K]
    kept = choices.valid & (position < C)
    sequence = jnp.arange(B)[:, None, None]
    target = jnp.where(kept, (sequence * E + choices.expert) * C + position, 0).reshape(-1)
    choice = jnp.arange(B * S * K, dtype=jnp.int32)
    # A choice without a slot writes to the row after the last one, which is cut off.
    where = jnp.where(kept.reshape(-1), target, B * E * C)
    source = jnp.full(B * E * C + 1, -1, jnp.int32).at[where].set(choice)[:-1]
    return Edges(
        jnp.maximum(source, 0), source >= 0, target.reshape(B * S, K), kept.reshape(B * S, K)
    )


def seat(choices: Choices, E: int, priority: str) -> Int[Array, "B S K"]:
    """Position of each choice in the queue of its expert, within its sequence.

    Raises:
      ConfigError: `priority` is not one of `PRIORITIES`.
    """
    if priority not in PRIORITIES:
        raise ConfigError(
            f"dispatch.priority={priority!r} is no order of seating; use one of "
            f"{', '.join(PRIORITIES)}."
        )
    expert = jnp.where(choices.valid, choices.expert, E)
    queue = expert.reshape(expert.shape[0], -1)  # [B S*K], token by token
    if priority == "token_major":
        position = jax.vmap(lambda group: rank_in_group(group, E + 1))(queue)
    else:
        order = queue_order(choices, priority)
        position = jax.vmap(lambda group, order: _seated(group, order, E + 1))(queue, order)
    return position.reshape(expert.shape)


def queue_order(choices: Choices, priority: str) -> Int[Array, "B N"]:
    """Numbers `token * K + k` of a sequence's choices, in the order in which they are seated."""
    B, S, K = choices.gate.shape
    gate = jax.lax.stop_gradient(jnp.where(choices.valid, choices.gate, -1.0))
    if priority == "gate":
        return jnp.argsort(-gate.reshape(B, S * K), axis=-1, stable=True)
    tokens = jnp.broadcast_to(jnp.arange(S), (B, S))
    if priority == "batch":
        tokens = jnp.argsort(-gate.max(axis=-1), axis=-1, stable=True)
    return (tokens[:, None] * K + jnp.arange(K)[None, :, None]).reshape(B, -1)


def _seated(group: Int[Array, " N"], order: Int[Array, " N"], groups: int) -> Int[Array, " N"]:
    return (
        jnp.zeros_like(group)
        .at[order]
        .set(rank_in_group(group[order], groups), unique_indices=True)
    )


def rank_in_group(group: Int[Array, " N"], groups: int) -> Int[Array, " N"]:
    """How many earlier entries have the same group. By sorting, so no `[N E]` array is built."""
    order = sort_by_group(group, groups)
    ordered = group[order]
    index = jnp.arange(group.shape[0], dtype=jnp.int32)
    begins: Bool[Array, " N"] = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    start = jax.lax.cummax(jnp.where(begins, index, 0))
    return jnp.zeros_like(order).at[order].set(index - start, unique_indices=True)
