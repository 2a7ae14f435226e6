"""Dispatch into a fixed number of slots an expert; what finds no slot is dropped.

Slots are handed out in token groups: a sequence, or `group` neighbouring positions of it. A group is
named by the config, so which choices are dropped depends on no other group, on no batch size and on
no mesh.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.dispatch.edges import Edges, combine, sort_by_group, spread
from moe.dispatch.reference import batched_matmul
from moe.dispatch.types import Dispatched, ExpertFn, num_experts
from moe.errors import ConfigError
from moe.routing.types import Choices

PRIORITIES = ("token_major", "choice_major", "gate", "batch", "ntlb")


class Seating(NamedTuple):
    """How the slots of the experts are handed out."""

    capacity_factor: float | None  # None: nothing is dropped
    priority: str = "token_major"
    group: int | None = None  # positions of a token group; None: the whole row
    capacity_multiple: int = 1  # slots are rounded up to a multiple of this
    renormalize: bool = False  # kept gates of a token take over the mass of its dropped ones


class Seated(NamedTuple):
    """Choices in their token groups, `G` groups of `P` positions, and the slot of each."""

    choices: Choices  # [G P K]; valid where there is a slot, gates as they will be used
    position: Int[Array, "G P K"]  # number of the slot among those of its expert and group


def capacity(
    x: Float[Array, "B S D"],
    choices: Choices,
    params: Any,
    expert_fn: ExpertFn,
    *,
    capacity_factor: float | None,
    priority: str = "token_major",
    group: int | None = None,
    capacity_multiple: int = 1,
    renormalize: bool = False,
) -> Dispatched:
    """Each expert takes the first `C` choices of every token group.

    Args:
      x: tokens, any float dtype; the output has the same, exactly 0 for a token with no choice kept.
      choices: who goes where; entries that are not valid take no slot.
      params: the experts, every leaf with a leading `E`.
      expert_fn: what one expert does to its rows.
      capacity_factor: `C = ceil(capacity_factor * K * P / E)` for a group of `P` positions, at most
        `P`; None drops nothing (`C = P`).
      priority: `token_major` seats earlier tokens first, which is causal. The others let later tokens
        push out earlier ones: `choice_major` seats all first choices before any second one (GShard,
        Lepikhin et al. 2021), `gate` the choices of the largest gates (Megatron-LM's "probs"),
        `batch` the tokens of the largest gate, first choices first (Batch Prioritised Routing, Riquelme
        et al. 2021, arXiv:2106.05974; here within a group). `ntlb` (no token left behind, Fedus et al.
        2021, arXiv:2101.03961, appendix B) gives a token one expert, the first of its choices that has
        a slot after all tokens have tried their earlier choices; its other choices count as dropped.
      group: positions of a token group, a divisor of `S`; None, or more than `S`, is the whole row.
      capacity_multiple: `C` is rounded up to a multiple of this, also where that is more than `P`.
      renormalize: scales the kept gates of each token to the sum that they had before the drop.
    """
    seating = Seating(capacity_factor, priority, group, capacity_multiple, renormalize)
    seated, C = take_seats(choices, num_experts(params), seating)
    output = run_seated(x, seated, C, params, expert_fn)
    return Dispatched(output, seated.choices.valid.reshape(choices.valid.shape))


def run_seated(
    x: Float[Array, "B S D"], seated: Seated, C: int, params: Any, expert_fn: ExpertFn
) -> Float[Array, "B S D"]:
    """The experts on their slots, `[E G*C D]`, and the outputs back at their tokens."""
    D, E, G = x.shape[-1], num_experts(params), seated.position.shape[0]
    edges = slot_edges(seated, E, C)
    rows = spread(x.reshape(-1, D), edges)
    rows = rows.reshape(G, E, C, D).swapaxes(0, 1).reshape(E, G * C, D)
    outputs = expert_fn(params, rows, batched_matmul)
    outputs = outputs.reshape(E, G, C, D).swapaxes(0, 1).reshape(G * E * C, D)
    gate = seated.choices.gate.reshape(edges.kept.shape)
    return combine(outputs, gate, edges).reshape(x.shape)


def take_seats(choices: Choices, E: int, seating: Seating) -> tuple[Seated, int]:
    """The slot of every choice, and how many slots `C` an expert has for each group.

    Raises:
      ConfigError: groups that do not fill a row, no slot at all, or an unknown priority.
    """
    S, K = choices.expert.shape[1:]
    P = group_size(seating.group, S)
    C = slots(seating.capacity_factor, P, K, E, seating.capacity_multiple)
    choices = Choices(*(a.reshape(-1, P, K) for a in choices))
    order = seating.priority
    position = _first_free(choices, E, C) if order == "ntlb" else seat(choices, E, order)
    kept = choices.valid & (position < C)
    gate = choices.gate
    if seating.renormalize:
        gate = renormalized(choices, kept)
    return Seated(Choices(choices.expert, gate, kept), position), C


def group_size(group: int | None, S: int, shards: int = 1) -> int:
    """Positions of a token group in rows of `S` positions, cut into `shards` along the sequence.

    Raises:
      ConfigError: a group would lie on two shards, or the last one would be shorter.
    """
    size = S if group is None else min(group, S)
    if (S // shards) % size == 0 and S % shards == 0:
        return size
    part = S // shards
    best = max(d for d in range(1, part + 1) if part % d == 0 and d <= size)
    where = f"the {S} positions of a row"
    if shards > 1:
        where = f"the {part} positions of a row on one device ({S} over mesh.sequence={shards})"
    raise ConfigError(
        f"dispatch.group={group}: token groups of {size} positions do not fill {where} evenly, and the "
        f"slots of a group are handed out on one device. Use dispatch.group={best}, or another divisor "
        f"of {part}."
    )


def slots(capacity_factor: float | None, P: int, K: int, E: int, capacity_multiple: int = 1) -> int:
    """Slots `C` an expert has for a group of `P` positions.

    A token names an expert once, so `P` are enough; only rounding to a multiple goes beyond.

    Raises:
      ConfigError: no slot at all.
    """
    C = P if capacity_factor is None else min(math.ceil(capacity_factor * K * P / E), P)
    if C < 1:
        raise ConfigError(
            f"dispatch.capacity_factor={capacity_factor} leaves an expert no slot: "
            f"ceil({capacity_factor} * {K} choices * {P} positions / {E} experts) = {C}. "
            "Use a factor above 0, or none to drop nothing."
        )
    return -(-C // capacity_multiple) * capacity_multiple


def renormalized(choices: Choices, kept: Bool[Array, "G P K"]) -> Float[Array, "G P K"]:
    """Gates of the kept choices, scaled to the sum of all gates of their token."""
    before = jnp.where(choices.valid, choices.gate, 0).sum(-1, keepdims=True)
    gate = jnp.where(kept, choices.gate, 0)
    after = gate.sum(-1, keepdims=True)
    # Gates of zero, or none kept: no scale gives the mass back, and 0/0 would poison gradients.
    some = after != 0
    return jnp.where(some, gate * before / jnp.where(some, after, 1), 0)


def slot_edges(seated: Seated, E: int, C: int) -> Edges:
    """Joins choices to the rows of a `[G E C]` buffer, both flattened."""
    expert, _, kept = seated.choices
    G, P, K = expert.shape
    group = jnp.arange(G)[:, None, None]
    target = jnp.where(kept, (group * E + expert) * C + seated.position, 0).reshape(-1)
    choice = jnp.arange(G * P * K, dtype=jnp.int32)
    # A choice without a slot writes to the row after the last one, which is cut off.
    where = jnp.where(kept.reshape(-1), target, G * E * C)
    source = jnp.full(G * E * C + 1, -1, jnp.int32).at[where].set(choice)[:-1]
    return Edges(
        jnp.maximum(source, 0), source >= 0, target.reshape(G * P, K), kept.reshape(G * P, K)
    )


def seat(choices: Choices, E: int, priority: str) -> Int[Array, "G P K"]:
    """Position of each choice in the queue of its expert, within its token group.

    Raises:
      ConfigError: `priority` is not one of `PRIORITIES`.
    """
    if priority not in PRIORITIES or priority == "ntlb":  # its queues depend on the number of slots
        raise ConfigError(
            f"dispatch.priority={priority!r} is no order of seating; use one of "
            f"{', '.join(PRIORITIES)}."
        )
    expert = jnp.where(choices.valid, choices.expert, E)
    queue = expert.reshape(expert.shape[0], -1)  # [G P*K], token by token
    if priority == "token_major":
        position = jax.vmap(lambda group: rank_in_group(group, E + 1))(queue)
    else:
        order = queue_order(choices, priority)
        position = jax.vmap(lambda group, order: _seated(group, order, E + 1))(queue, order)
    return position.reshape(expert.shape)


def queue_order(choices: Choices, priority: str) -> Int[Array, "G N"]:
    """Numbers `token * K + k` of a group's choices, in the order in which they are seated."""
    G, P, K = choices.gate.shape
    gate = jax.lax.stop_gradient(jnp.where(choices.valid, choices.gate, -1.0))
    if priority == "gate":
        return jnp.argsort(-gate.reshape(G, P * K), axis=-1, stable=True)
    tokens = jnp.broadcast_to(jnp.arange(P), (G, P))
    if priority == "batch":
        tokens = jnp.argsort(-gate.max(axis=-1), axis=-1, stable=True)
    return (tokens[:, None] * K + jnp.arange(K)[None, :, None]).reshape(G, -1)


def _first_free(choices: Choices, E: int, C: int) -> Int[Array, "G P K"]:
    """Positions under `ntlb`; `C` for a choice that is not needed or finds no slot."""
    G, P, K = choices.expert.shape
    taken = jnp.zeros((G, E + 1), jnp.int32)
    waiting = jnp.ones((G, P), bool)
    positions = []
    for k in range(K):
        tries = waiting & choices.valid[..., k]
        expert = jnp.where(tries, choices.expert[..., k], E)
        rank = jax.vmap(lambda group: rank_in_group(group, E + 1))(expert)
        position = rank + jnp.take_along_axis(taken, expert, axis=1)
        seated = tries & (position < C)
        positions.append(jnp.where(seated, position, C))
        taken += jax.vmap(lambda group: jnp.bincount(group, length=E + 1))(expert)
        waiting &= ~seated
    return jnp.stack(positions, axis=-1)


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
