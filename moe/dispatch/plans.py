"""Dispatch of the plans that are not token choice: one path each, and a readable twin.

Written in the global view: the partitioner moves rows between devices where a constraint below says
that an array is sharded over experts and the next one says over sequences.
"""

from collections.abc import Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from moe.axes import BATCH_AXES, EXPERT
from moe.dispatch.reference import batched_matmul, mix_all
from moe.dispatch.types import Dispatch, Dispatched, ExpertFn, num_experts
from moe.routing.types import Merging, Mixing, Plan, Slots

Axes = tuple[str, ...]
ALONE: Axes = (EXPERT,)
BY_SEQUENCE = (BATCH_AXES,)  # [B ...]


def by_expert(expert_axes: Axes) -> tuple[Axes, Axes]:
    """Mesh axes of the first two axes of `[E B ...]`."""
    return expert_axes, tuple(name for name in BATCH_AXES if name not in expert_axes)


def by_plan(path: Dispatch, mesh: Mesh | None = None, expert_axes: Axes = ALONE) -> Dispatch:
    """A dispatch that takes every plan: `Choices` by `path`, the others by the functions below."""
    where: dict[str, Any] = {"mesh": mesh, "expert_axes": expert_axes}

    def dispatch(
        x: Float[Array, "B S D"], plan: Plan, params: Any, expert_fn: ExpertFn
    ) -> Dispatched:
        if isinstance(plan, Slots):
            return dispatch_slots(x, plan, params, expert_fn, **where)
        if isinstance(plan, Mixing):
            return dispatch_mixing(x, plan, params, expert_fn, **where)
        if isinstance(plan, Merging):
            return dispatch_merging(x, plan, params, expert_fn, mesh=mesh)
        return path(x, plan, params, expert_fn)

    return dispatch


def dispatch_slots(
    x: Float[Array, "B S D"],
    slots: Slots,
    params: Any,
    expert_fn: ExpertFn,
    *,
    mesh: Mesh | None = None,
    expert_axes: Axes = ALONE,
) -> Dispatched:
    """Each expert works on the tokens that it named; a token named by none gets exactly 0.

    Args:
      x: tokens, any float dtype; the output has the same.
      slots: who works on what; entries that are not valid count for nothing.
      params: the experts, every leaf with a leading `E`.
      expert_fn: what one expert does to its rows.
      mesh: the devices, with the axes of `moe.axes`; None is one.
      expert_axes: mesh axes that `E` lies on.
    """
    S, D = x.shape[1:]
    E, C = slots.token.shape[1:]
    filled = slots.valid[..., None]
    rows = jax.vmap(lambda row, token: row.at[token].get(mode="promise_in_bounds"))(x, slots.token)
    rows = jnp.where(filled, rows, 0)  # [B E C D]
    outputs = _run_experts(rows, params, expert_fn, mesh, expert_axes)
    # Masked before the product: a gate of zero would not stop a NaN.
    parts = jnp.where(filled, outputs, 0) * slots.gate[..., None]  # float32

    def add(token: Array, part: Array) -> Array:
        zeros = jnp.zeros((S, D), part.dtype)
        return zeros.at[token.reshape(-1)].add(part.reshape(E * C, D), mode="promise_in_bounds")

    y = constrain(jax.vmap(add)(slots.token, parts).astype(x.dtype), BY_SEQUENCE, mesh)
    return Dispatched(y, slots.valid)


def reference_slots(
    x: Float[Array, "B S D"], slots: Slots, params: Any, expert_fn: ExpertFn
) -> Dispatched:
    """The twin of `dispatch_slots`: every expert on every token, mixed by a dense weight."""
    chosen = jax.nn.one_hot(slots.token, x.shape[1]) * slots.valid[..., None]  # [B E C S]
    weight = jnp.einsum("bec,becs->bse", slots.gate, chosen)
    return Dispatched(mix_all(x, weight, params, expert_fn), slots.valid)


def dispatch_mixing(
    x: Float[Array, "B S D"],
    mixing: Mixing,
    params: Any,
    expert_fn: ExpertFn,
    *,
    mesh: Mesh | None = None,
    expert_axes: Axes = ALONE,
) -> Dispatched:
    """Experts work on mixtures of tokens: `y = combine @ expert(dispatch^T @ x)`, row by row.

    Puigcerver et al. 2024 (arXiv:2308.00951). Mixtures are summed in float32. Arguments as for
    `dispatch_slots`; `kept` is True throughout.
    """
    B, _, D = x.shape
    E = num_experts(params)
    mixed = jnp.einsum(
        "bsp,bsd->bpd", mixing.dispatch, x, preferred_element_type=jnp.float32
    ).astype(x.dtype)
    outputs = _run_experts(mixed.reshape(B, E, -1, D), params, expert_fn, mesh, expert_axes)
    y = jnp.einsum(
        "bsp,bpd->bsd",
        mixing.combine,
        outputs.reshape(B, -1, D),
        preferred_element_type=jnp.float32,
    )
    y = constrain(y.astype(x.dtype), BY_SEQUENCE, mesh)
    return Dispatched(y, jnp.ones(mixing.dispatch.shape, bool))


def reference_mixing(
    x: Float[Array, "B S D"], mixing: Mixing, params: Any, expert_fn: ExpertFn
) -> Dispatched:
    """The twin of `dispatch_mixing`: a loop over sequences and experts."""
    E, slots = num_experts(params), mixing.dispatch.shape[2] // num_experts(params)

    def sequence(b: int) -> Array:
        y = jnp.zeros(x.shape[1:])
        for e in range(E):
            own = slice(e * slots, (e + 1) * slots)
            mixed = mixing.dispatch[b, :, own].T @ x[b]
            y += (
                mixing.combine[b, :, own]
                @ expert_fn(_one(params, e), mixed[None], batched_matmul)[0]
            )
        return y.astype(x.dtype)

    y = jnp.stack([sequence(b) for b in range(x.shape[0])])
    return Dispatched(y, jnp.ones(mixing.dispatch.shape, bool))


def dispatch_merging(
    x: Float[Array, "B S D"],
    merging: Merging,
    params: Any,
    expert_fn: ExpertFn,
    *,
    mesh: Mesh | None = None,
) -> Dispatched:
    """Every segment goes through one expert, whose weights are a mean of all experts' weights.

    Muqeeth et al. 2023 (arXiv:2306.03745); Zhong et al. 2024 (arXiv:2405.03133). Weights are merged
    in float32. The `M` segments have `ceil(S / M)` positions, the last ones fewer or none. The plan
    says nothing of padding: padded positions get an output like any other. Holds `B * M` merged
    experts at once. Arguments as for `dispatch_slots`; `kept` is True throughout.
    """
    B, S, D = x.shape
    M = merging.weight.shape[1]
    length = math.ceil(S / M)

    def merge(leaf: Array) -> Array:
        merged = jnp.einsum(
            "bme,e...->bm...", merging.weight, leaf, preferred_element_type=jnp.float32
        )
        merged = constrain(merged.astype(leaf.dtype), BY_SEQUENCE, mesh)
        return merged.reshape(B * M, *leaf.shape[1:])

    rows = jnp.pad(x, ((0, 0), (0, M * length - S), (0, 0))).reshape(B * M, length, D)
    outputs = expert_fn(jax.tree.map(merge, params), rows, batched_matmul)
    y = constrain(outputs.reshape(B, M * length, D)[:, :S].astype(x.dtype), BY_SEQUENCE, mesh)
    return Dispatched(y, jnp.ones(merging.weight.shape, bool))


def reference_merging(
    x: Float[Array, "B S D"], merging: Merging, params: Any, expert_fn: ExpertFn
) -> Dispatched:
    """The twin of `dispatch_merging`: a loop over sequences and segments."""
    S, (B, M, _) = x.shape[1], merging.weight.shape
    length = math.ceil(S / M)

    def segment(b: int, m: int) -> Array:
        merged = jax.tree.map(
            lambda leaf: jnp.tensordot(merging.weight[b, m], leaf, 1)[None], params
        )
        return expert_fn(merged, x[b : b + 1, m * length : (m + 1) * length], batched_matmul)[0]

    rows = [jnp.concatenate([segment(b, m) for m in range(M)]) for b in range(B)]
    return Dispatched(jnp.stack(rows).astype(x.dtype), jnp.ones(merging.weight.shape, bool))


def _run_experts(
    rows: Float[Array, "B E C D"],
    params: Any,
    expert_fn: ExpertFn,
    mesh: Mesh | None,
    expert_axes: Axes,
) -> Float[Array, "B E C D"]:
    B, E, C, D = rows.shape
    rows = constrain(rows.swapaxes(0, 1), by_expert(expert_axes), mesh)
    outputs = expert_fn(params, rows.reshape(E, B * C, D), batched_matmul)
    outputs = constrain(outputs.reshape(E, B, C, D), by_expert(expert_axes), mesh)
    return constrain(outputs.swapaxes(0, 1), BY_SEQUENCE, mesh)


def constrain(x: Array, leading: Sequence[Axes], mesh: Mesh | None) -> Array:
    """Shards the first axes of `x` as `leading` says; leaves the others to the partitioner."""
    if mesh is None or mesh.size == 1:
        return x
    free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - len(leading))
    spec = PartitionSpec(*[names or None for names in leading], *free)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def _one(params: Any, e: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[e : e + 1], params)
