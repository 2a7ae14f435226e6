"""Uniform random routing, the control: a learned router must beat it to claim anything.

The untrained choice of THOR (Zuo et al. 2022, arXiv:2110.04260), drawn for each token, without
its consistency loss.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from moe.routing.router import Router
from moe.routing.selection import choices, select
from moe.routing.types import Routing


def route(
    logits: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    *,
    k: int,
    key: PRNGKeyArray | None = None,
) -> Routing:
    """Sends each token to `k` different experts drawn uniformly, with gate 1/k each.

    Args:
        logits: only the shape `[B S E]` is read; a layer without a gate passes zeros.
        valid: `[B S]`, True for a real token.
        k: experts a token.
        key: needed in training and in evaluation. A draw depends on the key and on the token's
            place in the batch, not on any content.

    Returns:
        The decision; `logits` are zeros and `probs` uniform, so a balance loss is constant.

    Raises:
        ValueError: no key.
    """
    if key is None:
        raise ValueError("random routing draws in training and in evaluation: pass a key")
    logits = jnp.zeros_like(logits)
    expert = select(jax.random.uniform(key, logits.shape), k)  # the k largest of E fair draws
    gate = jnp.full(expert.shape, 1.0 / k)
    return Routing(logits, jax.nn.softmax(logits), choices(expert, gate, valid))


ROUTER = Router(
    route,
    paper="Zuo et al. 2022, arXiv:2110.04260 (its choice, drawn for each token)",
    equation="S = k experts drawn uniformly without replacement, gate = 1/k",
    cost="k experts",
    use="The control: a learned router must beat it to claim anything.",
    gate=None,
    needs_key_in_eval=True,
)
