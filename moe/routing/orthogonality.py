"""Orthogonality of a router's columns: losses on its parameters alone, whatever the data.

Experts whose columns are orthogonal are asked for by different tokens. E columns fit into D dimensions
only if D >= E; with fewer the losses have a floor above 0.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe.routing.losses import Total
from moe.routing.types import LayerReport


def simbal(kernel: Float[Array, "*L D E"]) -> Float[Array, "*L"]:
    """`sum_ij |(R^T R - I)_ij|`: columns orthogonal and of length 1.

    Omi et al. 2025, SimBal (arXiv:2506.14038).

    Args:
        kernel: float32 `[... D E]`, of `logits = tokens @ kernel`.

    Returns:
        One value for each router; 0 if its columns are orthonormal.
    """
    return jnp.abs(_excess(kernel)).sum(axis=(-2, -1))


def cosine_overlap(kernel: Float[Array, "*L D E"]) -> Float[Array, "*L"]:
    """`sum_ij (cos(w_i, w_j) - delta_ij)^2`: columns orthogonal, whatever their length.

    The orthogonality loss of ERNIE 4.5 (Baidu 2025, technical report). Columns of zeros give no
    gradient.

    Args:
        kernel: float32 `[... D E]`.

    Returns:
        One value for each router; 0 if its columns are orthogonal.
    """
    squared = jnp.square(kernel).sum(axis=-2, keepdims=True)
    length = jnp.sqrt(jnp.where(squared > 0, squared, 1.0))
    return jnp.square(_excess(kernel / length)).sum(axis=(-2, -1))


def simbal_loss(
    report: LayerReport, *, kernels: Float[Array, "L D E"], total_tokens: Total
) -> Float[Array, ""]:
    """The mean of `simbal` over layers; this report's part by its share of the step's tokens."""
    return simbal(kernels).mean() * _share(report, total_tokens)


def orthogonality_loss(
    report: LayerReport, *, kernels: Float[Array, "L D E"], total_tokens: Total
) -> Float[Array, ""]:
    """The mean of `cosine_overlap` over layers; this report's part by its share of the tokens."""
    return cosine_overlap(kernels).mean() * _share(report, total_tokens)


def _excess(kernel: Float[Array, "*L D E"]) -> Float[Array, "*L E E"]:
    gram = jnp.einsum("...de,...df->...ef", kernel, kernel, precision=jax.lax.Precision.HIGHEST)
    return gram - jnp.broadcast_to(jnp.eye(kernel.shape[-1], dtype=gram.dtype), gram.shape)


def _share(report: LayerReport, total_tokens: Total) -> Float[Array, ""]:
    return report.row_tokens[0].sum() / jnp.maximum(total_tokens, 1)
