"""Moving rows between tokens and experts. Indices only; forwards and backwards are both gathers.

An edge joins one choice of a token to one row of the buffer that the experts work on. Both ends know
each other (`Edges`), so no direction needs a scatter, which XLA runs one row at a time on the CPU.
"""

from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Edges(NamedTuple):
    """The two views of one edge list between `T` tokens of `K` choices and `N` rows."""

    source: Int[Array, " N"]  # choice `token * K + k` whose row this is
    filled: Bool[Array, " N"]  # False: an empty row, `source` is in range and means nothing
    target: Int[Array, "T K"]  # row of each choice
    kept: Bool[Array, "T K"]  # False: no row, `target` is in range and means nothing


def vary_together(*arrays: Array) -> tuple[Array, ...]:
    """Marks all as varying over every mesh axis that one of them varies over, inside `shard_map`.

    A custom gradient rule sees values of one kind only; the transpose of this mark sums a gradient
    over the axes over which its primal was the same everywhere.
    """
    varying = [jax.typeof(a).mat.varying for a in arrays]
    axes = frozenset().union(*varying)
    missing = [tuple(sorted(axes - v)) for v in varying]
    return tuple(
        lax.pcast(a, m, to="varying") if m else a for a, m in zip(arrays, missing, strict=True)
    )


def sort_by_group(group: Int[Array, "... N"], groups: int) -> Int[Array, "... N"]:
    """Stable order of the last axis by group number in `[0, groups)`.

    Number and position packed into one key sort several times faster on the CPU than a pair.
    """
    n = group.shape[-1]
    if groups * n > 2**32:
        return jnp.argsort(group, axis=-1, stable=True)
    position = jnp.arange(n, dtype=jnp.uint32)
    keys = group.astype(jnp.uint32) * n + position[(None,) * (group.ndim - 1)]
    return (jnp.sort(keys, axis=-1) % n).astype(jnp.int32)


def invert(order: Int[Array, " N"]) -> Int[Array, " N"]:
    """The inverse permutation."""
    index = jnp.arange(order.shape[0], dtype=order.dtype)
    return jnp.zeros_like(order).at[order].set(index, unique_indices=True)


def _take(rows: Array, index: Array) -> Array:
    return rows.at[index].get(mode="promise_in_bounds")


@jax.custom_vjp
def _spread(tokens: Float[Array, "T D"], edges: Edges) -> Float[Array, "N D"]:
    K = edges.target.shape[1]
    return jnp.where(edges.filled[:, None], _take(tokens, edges.source // K), 0)


def _spread_forward(tokens, edges):
    return _spread(tokens, edges), edges


def _spread_backward(edges, cotangent):
    parts = jnp.where(edges.kept[..., None], _take(cotangent, edges.target), 0)  # [T K D]
    return parts.sum(1, dtype=jnp.float32).astype(cotangent.dtype), None


_spread.defvjp(_spread_forward, _spread_backward)


def spread(tokens: Float[Array, "T D"], edges: Edges) -> Float[Array, "N D"]:
    """Copies each token to the rows of its choices; empty rows are zero."""
    tokens, *ends = vary_together(tokens, *edges)
    return _spread(tokens, Edges(*ends))


@jax.custom_vjp
def _combine(
    rows: Float[Array, "N D"], gate: Float[Array, "T K"], edges: Edges
) -> Float[Array, "T D"]:
    parts = jnp.where(edges.kept[..., None], _take(rows, edges.target), 0)
    return (parts * gate[..., None]).sum(1).astype(rows.dtype)


def _combine_forward(rows, gate, edges):
    return _combine(rows, gate, edges), (rows, gate, edges)


def _combine_backward(saved, cotangent):
    rows, gate, edges = saved
    K = gate.shape[1]
    weight = jnp.where(edges.filled, _take(gate.reshape(-1), edges.source), 0)
    d_rows = weight[:, None] * _take(cotangent, edges.source // K)
    parts = jnp.where(edges.kept[..., None], _take(rows, edges.target), 0)
    d_gate = (parts * cotangent[:, None].astype(gate.dtype)).sum(2)
    return d_rows.astype(rows.dtype), d_gate, None


_combine.defvjp(_combine_forward, _combine_backward)


def combine(
    rows: Float[Array, "N D"], gate: Float[Array, "T K"], edges: Edges
) -> Float[Array, "T D"]:
    """Sums the rows of each token's kept choices, weighted by gate, in float32."""
    rows, gate, *ends = vary_together(rows, gate, *edges)
    return _combine(rows, gate, Edges(*ends))
