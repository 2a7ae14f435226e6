"""Consistency: two random passes over the same tokens should predict the same.

Zuo et al. 2022 (THOR, arXiv:2110.04260), equation 5; the same term as R-Drop (arXiv:2106.14448).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def consistency(
    logits_a: Float[Array, "B S V"], logits_b: Float[Array, "B S V"], valid: Bool[Array, "B S"]
) -> Float[Array, "B S"]:
    """Symmetric divergence `(KL(a||b) + KL(b||a)) / 2` of two predictions, for each token.

    Args:
        logits_a: predictions of one pass, any float type.
        logits_b: predictions of the other, from other draws.
        valid: `[B S]`, True where a prediction counts.

    Returns:
        Nats, float32 `[B S]`; at least 0, and 0 where not valid. Both passes get the gradient.
        The paper sums it over tokens and weighs it by alpha (5 in its released script).
    """
    log_a = jax.nn.log_softmax(logits_a.astype(jnp.float32))
    log_b = jax.nn.log_softmax(logits_b.astype(jnp.float32))
    # The two divergences share their logarithms: sum a (log a - log b) + sum b (log b - log a).
    divergence = 0.5 * jnp.sum((jnp.exp(log_a) - jnp.exp(log_b)) * (log_a - log_b), axis=-1)
    return jnp.where(valid, divergence, 0.0)
