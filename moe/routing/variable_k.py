"""What routers share whose tokens visit different numbers of experts."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.errors import ConfigError
from moe.routing.selection import choices
from moe.routing.types import Choices

ACTIVE = "active"
"""The term under which such a router reports its experts a token; `losses.compute` reads it."""


def straight_through(
    value: Float[Array, "*A"], surrogate: Float[Array, "*A"]
) -> Float[Array, "*A"]:
    """Returns exactly `value`, with the gradient of `surrogate` (Bengio et al. 2013, arXiv:1308.3432)."""
    fixed = jax.lax.stop_gradient
    return fixed(value) + (surrogate - fixed(surrogate))


def variable_choices(
    expert: Int[Array, "B S K"],
    gate: Float[Array, "B S K"],
    active: Bool[Array, "B S K"],
    valid: Bool[Array, "B S"],
) -> Choices:
    """Builds a plan in which only the `active` entries of real tokens count."""
    plan = choices(expert, gate, valid)
    active = active & plan.valid
    return Choices(plan.expert, jnp.where(active, plan.gate, 0.0), active)


def effective_experts(probs: Float[Array, "B S E"]) -> Float[Array, "B S"]:
    """`exp` of the entropy of each token's probabilities: 1 if one-hot, E if uniform."""
    # The logarithm of a probability that underflowed to 0 would turn its gradient into NaN.
    entropy = jax.scipy.special.entr(jnp.where(probs > 0, probs, 1.0)).sum(axis=-1)
    return jnp.exp(entropy)


def width(num_experts: int, k_max: int) -> int:
    """The static number of choices `K`: `k_max`, where 0 stands for all `E`."""
    return k_max or num_experts


def check_width(num_experts: int, k_max: int) -> None:
    """Refuses a `k_max` that no token can have.

    Raises:
        ConfigError: `k_max` is negative or above E.
    """
    if not 0 <= k_max <= num_experts:
        raise ConfigError(
            f"router.k_max={k_max} must be between 1 and model.num_experts={num_experts}, or 0 for "
            "no limit: it is the largest number of experts that a token may visit."
        )
