"""Dispatch by one-hot products, in the global view: readable, and costly where experts are many."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from moe.axes import EXPERT, SEQUENCE
from moe.dispatch.capacity import Seating, group_size, renormalized, slots
from moe.dispatch.plans import BY_SEQUENCE, by_expert, constrain
from moe.dispatch.reference import batched_matmul
from moe.dispatch.types import Dispatched, ExpertFn, num_experts
from moe.errors import ConfigError
from moe.parallel.rules import token_spec
from moe.routing.types import Choices


def einsum(
    x: Float[Array, "B S D"],
    choices: Choices,
    params: Any,
    expert_fn: ExpertFn,
    *,
    mesh: Mesh | None = None,
    expert_axes: tuple[str, ...] = (EXPERT,),
    **seating: Any,
) -> Dispatched:
    """The same slots, drops and results as `capacity`, which has the arguments; its readable twin.

    Lepikhin et al. 2021 (arXiv:2006.16668), algorithm 1: masks `[G P E C]` of who sits where, and two
    products with them, `2 * P * E * C * D` operations a group each, which grow with the square of the
    group. The partitioner makes the all-to-all of the two constraints.

    Args:
      x: tokens, any float dtype; the output has the same.
      choices: who goes where.
      params: the experts, every leaf with a leading `E`.
      expert_fn: what one expert does to its rows.
      mesh: the devices, with the axes of `moe.axes`; None is one.
      expert_axes: mesh axes that `E` lies on.
      seating: fields of `Seating`.
    """
    how = Seating(**seating)
    (B, S, D), K, E = x.shape, choices.expert.shape[-1], num_experts(params)
    cut = 1 if mesh is None or SEQUENCE not in token_spec(mesh, S) else mesh.shape[SEQUENCE]
    P = group_size(how.group, S, cut)
    C = slots(how.capacity_factor, P, K, E, how.capacity_multiple)
    choices = Choices(*(a.reshape(-1, P, K) for a in choices))
    G = choices.expert.shape[0]
    chosen = jax.nn.one_hot(choices.expert, E, dtype=bool) & choices.valid[..., None]  # [G P K E]
    position, kept = seats(chosen, choices.gate, C, how.priority)
    gate = renormalized(choices, kept) if how.renormalize else choices.gate
    taken = jax.nn.one_hot(position, C) * kept[..., None]  # [G P K C]
    dispatch = jnp.einsum("gpke,gpkc->gpec", chosen.astype(x.dtype), taken.astype(x.dtype))
    combine = jnp.einsum("gpk,gpke,gpkc->gpec", gate, chosen.astype(gate.dtype), taken)
    rows = jnp.einsum("gpec,gpd->egcd", dispatch, x.reshape(G, P, D))
    on_experts, rest = by_expert(expert_axes)
    where = on_experts, (*rest, SEQUENCE) if cut > 1 else rest
    rows = constrain(rows, where, mesh)
    outputs = expert_fn(params, rows.reshape(E, G * C, D), batched_matmul).reshape(E, G, C, D)
    outputs = constrain(outputs, where, mesh)
    y = jnp.einsum("gpec,egcd->gpd", combine, outputs, preferred_element_type=jnp.float32)
    y = constrain(y.astype(x.dtype).reshape(B, S, D), BY_SEQUENCE, mesh)
    return Dispatched(y, kept.reshape(B, S, K))


def seats(
    chosen: Bool[Array, "G P K E"], gate: Float[Array, "G P K"], C: int, priority: str
) -> tuple[Int[Array, "G P K"], Bool[Array, "G P K"]]:
    """Number of each choice in the queue of its expert, and whether it is one of the first `C`.

    Raises:
      ConfigError: no such priority.
    """
    if priority == "ntlb":
        return _first_free(chosen, C)
    G, P, K, E = chosen.shape
    valid = chosen.any(-1)
    importance = jnp.where(valid, jax.lax.stop_gradient(gate), -1.0)
    token, k = jnp.arange(P)[:, None], jnp.arange(K)[None]  # [P 1], [1 K]
    sure = jnp.argsort(jnp.argsort(-importance.max(-1)))[..., None]  # [G P 1], 0 for the surest
    queues = {
        "token_major": token * K + k,
        "choice_major": k * P + token,
        "gate": -importance,
        "batch": (k * P)[None] + sure,
    }
    if priority not in queues:
        raise ConfigError(
            f"dispatch.priority={priority!r} is no order of seating; use one of "
            f"{', '.join([*queues, 'ntlb'])}."
        )
    key = jnp.broadcast_to(queues[priority], (G, P, K)).reshape(G, P * K)
    order = jnp.argsort(key, axis=1)  # stable
    queue = jnp.take_along_axis(chosen.reshape(G, P * K, E), order[..., None], axis=1)
    before = jnp.cumsum(queue, axis=1) - queue  # of each expert, in the order of seating
    before = jnp.take_along_axis(before, jnp.argsort(order, axis=1)[..., None], axis=1)
    position = (before.reshape(chosen.shape) * chosen).sum(-1)
    return position, valid & (position < C)


def _first_free(
    chosen: Bool[Array, "G P K E"], C: int
) -> tuple[Int[Array, "G P K"], Bool[Array, "G P K"]]:
    G, P, K, E = chosen.shape
    load, waiting = jnp.zeros((G, 1, E), jnp.int32), jnp.ones((G, P), bool)
    positions, kept = [], []
    for k in range(K):
        tries = chosen[:, :, k] & waiting[..., None]  # [G P E]
        position = ((jnp.cumsum(tries, axis=1) - tries + load) * tries).sum(-1)
        seated = tries.any(-1) & (position < C)
        load += (tries & seated[..., None]).sum(1, keepdims=True)
        waiting &= ~seated
        positions.append(position)
        kept.append(seated)
    return jnp.stack(positions, -1), jnp.stack(kept, -1)
