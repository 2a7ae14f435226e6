"""Grouped matrix multiplication: rows sorted by group, each times the matrix of its group.

Back ends: `ragged_dot`, XLA's own on every platform and the readable twin, and `blocks`, which is
fast on the CPU, where `ragged_dot` builds an `E x N x X` tensor.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe.dispatch.blocks import blocks_matmul
from moe.dispatch.edges import vary_together
from moe.errors import ConfigError

Backend = Callable[[Array, Array, Array], Array]

BACKENDS: dict[str, Backend] = {"blocks": blocks_matmul, "ragged_dot": jax.lax.ragged_dot}


def grouped_matmul(
    rows: Float[Array, "N X"],
    weights: Float[Array, "E X Y"],
    sizes: Int[Array, " E"],
    backend: str | None = None,
) -> Float[Array, "N Y"]:
    """Multiplies the first `sizes[0]` rows by `weights[0]`, the next `sizes[1]` by `weights[1]`, ...

    Rows beyond the last group give zero and receive no gradient, whatever they hold, NaN included.

    Args:
      rows: sorted by group; `sum(sizes) <= N`.
      weights: one matrix a group.
      sizes: int32; a group may be empty.
      backend: a key of `BACKENDS`; None picks by platform.

    Raises:
      ConfigError: no back end has that name.
    """
    backend = backend or default_backend()
    if backend not in BACKENDS:
        raise ConfigError(
            f"dispatch.backend={backend!r} is not a grouped matrix product; use one of "
            f"{', '.join(sorted(BACKENDS))}, or leave it out to choose by platform."
        )
    rows, weights, sizes = vary_together(rows, weights, sizes)
    inside = (jnp.arange(rows.shape[0]) < sizes.sum())[:, None]
    # Masked on both sides: a zero times a NaN is a NaN, so the rows must be gone before the product,
    # and the mask after it also stops the cotangents of these rows.
    product = BACKENDS[backend](jnp.where(inside, rows, 0), weights, sizes)
    return jnp.where(inside, product, 0)


def default_backend() -> str:
    """`blocks` on the CPU, `ragged_dot` elsewhere."""
    return "blocks" if jax.default_backend() == "cpu" else "ragged_dot"
