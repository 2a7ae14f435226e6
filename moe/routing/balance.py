"""Balancing without a loss: a bias on selection, steered by the load.

Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing" (arXiv:2408.15664).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from moe.routing.types import Scalar


def update_bias(
    bias: Float[Array, "*L E"],
    counts: Shaped[Array, "*L E"],
    rate: Scalar,
    centering: Scalar = 0.0,
) -> Float[Array, "*L E"]:
    """One step of the controller: `bias += rate * sign(mean(counts) - counts)` (algorithm 1).

    Call it once for each optimiser step, after it, with the counts of the whole global batch:
    never for each microbatch, in evaluation or in rematerialisation. The sign makes the step
    independent of how many tokens were counted.

    Args:
        bias: float32, one number for each expert; leading axes are independent layers.
        counts: choices of each expert over the global batch, before any drop; integers or
            whole floats.
        rate: step size (the paper's gamma, 1e-3); may be traced.
        centering: share of the mean that is then taken off each layer's bias: 0 leaves it, 1
            centres it. Choices do not change, the numbers stay small.

    Returns:
        The new bias, float32.
    """
    counts = counts.astype(jnp.float32)
    bias = bias + rate * jnp.sign(counts.mean(axis=-1, keepdims=True) - counts)
    return bias - centering * bias.mean(axis=-1, keepdims=True)
