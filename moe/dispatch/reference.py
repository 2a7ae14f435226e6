"""The oracle: every expert on every token. Slow and plain; every other path must equal it."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe.dispatch.types import Dispatched, ExpertFn, num_experts
from moe.routing.types import Choices


def reference(
    x: Float[Array, "B S D"], choices: Choices, params: Any, expert_fn: ExpertFn
) -> Dispatched:
    """Runs all `E` experts on all tokens and mixes them by gate. Drops nothing.

    Args:
      x: tokens, any float dtype; the output has the same.
      choices: who goes where; entries that are not valid count for nothing.
      params: the experts, every leaf with a leading `E`.
      expert_fn: what one expert does to its rows.
    """
    chosen = jax.nn.one_hot(choices.expert, num_experts(params)) * choices.valid[..., None]
    weight = jnp.einsum("bsk,bske->bse", choices.gate, chosen)
    return Dispatched(mix_all(x, weight, params, expert_fn), choices.valid)


def mix_all(
    x: Float[Array, "B S D"], weight: Float[Array, "B S E"], params: Any, expert_fn: ExpertFn
) -> Float[Array, "B S D"]:
    """Every expert on every token, mixed by `weight` in float32."""
    B, S, D = x.shape
    E = weight.shape[-1]
    rows = jnp.broadcast_to(x.reshape(B * S, D), (E, B * S, D))
    outputs = expert_fn(params, rows, batched_matmul)  # [E T D]
    weight = weight.reshape(B * S, E)
    mixed = jnp.einsum("te,etd->td", weight, outputs, preferred_element_type=jnp.float32)
    return mixed.astype(x.dtype).reshape(B, S, D)


def batched_matmul(
    rows: Float[Array, "E n X"], weights: Float[Array, "E X Y"]
) -> Float[Array, "E n Y"]:
    """The `Matmul` of the paths that hold the same number of rows for every expert."""
    return jnp.einsum("enx,exy->eny", rows, weights)
