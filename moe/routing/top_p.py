"""Top-p routing: as many experts as it takes to gather a share of the probability.

Huang et al. 2024, "Harder Tasks Need More Experts" (arXiv:2403.07652). The paper adds the balance
loss and an entropy loss, without which probabilities flatten and k grows (`losses.balance`,
`losses.entropy`). Differs from the paper by the optional bound `k_max`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe.errors import ConfigError
from moe.routing.router import Router
from moe.routing.selection import gather, select
from moe.routing.types import Routing, Scalar
from moe.routing.variable_k import (
    ACTIVE,
    check_width,
    effective_experts,
    straight_through,
    variable_choices,
    width,
)


def route(
    logits: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    *,
    k: int,
    mass: Scalar = 0.4,
    k_max: int = 0,
) -> Routing:
    """Sends each token to the fewest experts whose probabilities sum to at least `mass`.

    Experts are taken from the most probable down, the one that reaches `mass` included;
    so there is always one, and `mass` 1 takes all. Gates are the raw probabilities.

    Args:
        logits: float32 `[B S E]`.
        valid: `[B S]`, True for a real token.
        k: not read: the number that `losses.compute` aims at.
        mass: the paper's p, in (0, 1]; may be traced.
        k_max: largest number of experts a token, the width K of the plan; 0 stands for E. Shapes
            are static, so the plan's size follows this bound and not the mean.

    Returns:
        The decision. Its term `active [B S]` is the number of experts of each token, with the
        gradient of `exp(entropy)` of its probabilities: flatter means more experts, whereas the
        sum of the chosen probabilities would pull the other way.
    """
    del k
    probs = jax.nn.softmax(logits)
    expert = select(probs, width(logits.shape[-1], k_max))
    gate = gather(probs, expert)
    active = prefix(jax.lax.stop_gradient(gate), mass)
    plan = variable_choices(expert, gate, active, valid)
    count = plan.valid.sum(axis=-1, dtype=jnp.float32)
    return Routing(logits, probs, plan, {ACTIVE: straight_through(count, effective_experts(probs))})


def prefix(ordered: Float[Array, "B S K"], mass: Scalar) -> Bool[Array, "B S K"]:
    """Marks the shortest prefix of falling probabilities that sums to at least `mass`."""
    before = jnp.pad(jnp.cumsum(ordered, axis=-1)[..., :-1], ((0, 0), (0, 0), (1, 0)))
    first = (jnp.arange(ordered.shape[-1]) == 0)[None, None]
    # Rounding lets a sum reach 1 before the last expert: `mass` 1 means all by itself.
    return (before < mass) | first | jnp.asarray(mass >= 1.0)


def check(num_experts: int, *, k: int, mass: float = 0.4, k_max: int = 0) -> None:
    """Refuses a share that is none.

    Raises:
        ConfigError: `mass` is outside (0, 1], or `k_max` does not fit the experts.
    """
    del k
    check_width(num_experts, k_max)
    if not 0.0 < mass <= 1.0:
        raise ConfigError(
            f"router.mass={mass} must be above 0 and at most 1: it is the share of probability that "
            "a token's experts gather. The paper uses 0.4."
        )


ROUTER = Router(
    route,
    paper="Huang et al. 2024, arXiv:2403.07652",
    equation="S = shortest prefix of sorted p = softmax(x W) with sum >= mass, gate = p_i",
    cost="D E + mean-k experts",
    use="Hard tokens should get more experts than easy ones, with no new parameter.",
    check=check,
    fixed_k=False,
    traced=("mass",),
)
