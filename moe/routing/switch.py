"""Switch routing: one expert a token (Fedus, Zoph and Shazeer 2022, arXiv:2101.03961).

The paper trains with input jitter 1e-2, which is the gate's (`router.jitter`), and balance loss
weight 1e-2, which is the loss's.
"""

import jax
from jaxtyping import Array, Bool, Float

from moe.errors import ConfigError
from moe.routing.router import Router
from moe.routing.selection import choices, gather, select
from moe.routing.types import Routing


def route(
    logits: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    *,
    k: int = 1,
) -> Routing:
    """Sends each token to its most probable expert.

    The gate is that probability itself, in [1/E, 1] (equation 1): divided by the sum of one
    chosen gate it would be 1 and the router would get no gradient.

    Args:
        logits: float32 `[B S E]`.
        valid: `[B S]`, True for a real token.
        k: always 1.

    Returns:
        The decision, with K = 1.
    """
    del k
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


ROUTER = Router(
    route,
    paper="Fedus, Zoph and Shazeer 2022, arXiv:2101.03961",
    equation="i = argmax p, gate = p_i, p = softmax(x W)",
    cost="D E + 1 expert",
    use="One expert a token: the cheapest learned routing, and the reference for every other.",
    check=check,
)
