"""Dropless dispatch: sort the choices by expert, one grouped product, put the rows back."""

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe.dispatch.edges import Edges, combine, invert, sort_by_group, spread
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
    """Every valid choice reaches its expert, however uneven the load.

    Args:
      x: tokens, any float dtype; the output has the same.
      choices: who goes where; entries that are not valid count for nothing.
      params: the experts, every leaf with a leading `E`.
      expert_fn: what one expert does to its rows.
      backend: of `grouped_matmul`; None picks by platform.
    """
    B, S, D = x.shape
    edges, sizes = sorted_edges(choices, num_experts(params))
    rows = spread(x.reshape(B * S, D), edges)
    matmul = functools.partial(grouped_matmul, sizes=sizes, backend=backend)
    outputs = expert_fn(params, rows, matmul)
    gate = choices.gate.reshape(B * S, -1)
    return Dispatched(combine(outputs, gate, edges).reshape(B, S, D), choices.valid)


def sorted_edges(choices: Choices, E: int) -> tuple[Edges, Int[Array, " E"]]:
    """One row a choice, sorted by expert, choices that are not valid last; and rows an expert."""
    kept = choices.valid.reshape(-1, choices.valid.shape[-1])  # [T K]
    group = jnp.where(choices.valid, choices.expert, E).reshape(-1)
    order = sort_by_group(group, E + 1)
    sizes = jnp.bincount(group, length=E + 1)[:E]
    filled = jnp.arange(order.shape[0]) < sizes.sum()
    return Edges(order, filled, invert(order).reshape(kept.shape), kept), sizes
