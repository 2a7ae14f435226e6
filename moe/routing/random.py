"""Uniform random routing, the control: a learned router must beat it to claim anything.

The untrained choice of THOR (Zuo et al. 2022, arXiv:2110.04260), drawn for each token, without
its consistency loss.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from moe.routing.selection import choices, select
from moe.routing.types import Routing, State


def route(
    logits: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    *,
    k: int,
    key: PRNGKeyArray | None = None,
    state: State | None = None,
    token_ids: Int[Array, "B S"] | None = None,
) -> Routing:
    """Sends each token to `k` different experts drawn uniformly, with gate 1/k each.

    Args:
        logits: only the shape `[B S E]` is read; a layer without a gate passes zeros.
        valid: `[B S]`, True for a real token.
        k: experts a token.
        key: needed in training and in evaluation. A draw depends on the key and on the token's
            place in the batch, not on any content.
        state: not used.
        token_ids: not used.

    Returns:
        The decision; `logits` are zeros and `probs` uniform, so a balance loss is constant.

    Raises:
        ValueError: no key.
    """
    del state, token_ids
    if key is None:
        raise ValueError("random routing draws in training and in evaluation: pass a key")
    logits = jnp.zeros_like(logits)
    expert = select(jax.random.uniform(key, logits.shape), k)  # the k largest of E fair draws
    gate = jnp.full(expert.shape, 1.0 / k)
    return Routing(logits, jax.nn.softmax(logits), choices(expert, gate, valid))
