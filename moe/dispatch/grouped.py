"""Dropless dispatch: sort the choices by expert, one grouped product, put the rows back."""

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe.dispatch.grouped_matmul import grouped_matmul
from moe.dispatch.types import Dispatched, ExpertFn, num_experts
from moe.routing.types import Choices


def grouped(
    x: Float[Array, "B S D"],
    choices: Choices,
    params: Any,
    expert_fn: ExpertFn,
    *,
    backend: str | None = None,
) -> Dispatched:
    """Every valid choice reaches its expert, however uneven the load."""
    B, S, D = x.shape
    K = choices.expert.shape[-1]
    E = num_experts(params)
    group = jnp.where(choices.valid, choices.expert, E).reshape(-1)  # choices not valid sort last
    order = jnp.argsort(group, stable=True)
    sizes = jnp.bincount(group, length=E + 1)[:E]
    rows = x.reshape(B * S, D)[order // K]
    matmul = functools.partial(grouped_matmul, sizes=sizes, backend=backend)
    outputs = expert_fn(params, rows, matmul)[jnp.argsort(order)].reshape(B, S, K, D)
    gate = jnp.where(choices.valid, choices.gate, 0)
    mixed = jnp.einsum("bsk,bskd->bsd", gate, outputs, preferred_element_type=jnp.float32)
    return Dispatched(mixed.astype(x.dtype), choices.valid)
