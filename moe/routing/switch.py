"""Switch routing: one expert a token (Fedus, Zoph and Shazeer 2022, arXiv:2101.03961).

The paper trains with input jitter 1e-2, which is the gate's (`router.jitter`), and balance loss
weight 1e-2, which is the loss's.
"""

import jax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from moe.errors import ConfigError
from moe.routing.selection import choices, gather, select
from moe.routing.types import Routing, State


def route(
    logits: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    *,
    k: int = 1,
    key: PRNGKeyArray | None = None,
    state: State | None = None,
    token_ids: Int[Array, "B S"] | None = None,
) -> Routing:
    """Sends each token to its most probable expert.

    The gate is that probability itself, in [1/E, 1] (equation 1): divided by the sum of one
    chosen gate it would be 1 and the router would get no gradient.

    Args:
        logits: float32 `[B S E]`.
        valid: `[B S]`, True for a real token.
        k: always 1.
        key: not used.
        state: not used.
        token_ids: not used.

    Returns:
        The decision, with K = 1.
    """
    del k, key, state, token_ids
    probs = jax.nn.softmax(logits)
    expert = select(logits, 1)
    return Routing(logits, probs, choices(expert, gather(probs, expert), valid))


def check(num_experts: int, *, k: int) -> None:
    """Refuses more than one expert a token.

    Raises:
        ConfigError: k is not 1.
    """
    del num_experts
    if k != 1:
        raise ConfigError(
            f"router.k={k} with router.name='switch': Switch sends a token to exactly one expert. "
            "Set router.k=1, or router.name='topk' for more."
        )
