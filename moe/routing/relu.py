"""ReMoE: ReLU in place of top-k; routing is continuous, and a controller sets how sparse it is.

Wang, Zhu and Chen 2025 (arXiv:2412.14711). A token has as many experts as it has positive logits;
its gates are the logits themselves. The L1 penalty on gates (`moe.routing.sparsity_losses`) is
weighed by `lambda`, which grows while more than k experts a token are active and shrinks otherwise.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, Shaped
import numpy as np

from moe.errors import ConfigError
from moe.routing.router import Router
from moe.routing.selection import gather, select
from moe.routing.topk import log_sqrt_softplus
from moe.routing.types import Routing, Scalar, State
from moe.routing.variable_k import (
    ACTIVE,
    check_width,
    straight_through,
    variable_choices,
    width,
)

# The controller multiplies, so at 0 or infinity it could never come back.
LAMBDA_RANGE = (1e-12, 1e6)


def route(
    logits: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    *,
    k: int,
    state: State | None = None,
    k_max: int = 0,
) -> Routing:
    """Sends each token to every expert whose logit is positive.

    Args:
        logits: float32 `[B S E]`.
        valid: `[B S]`, True for a real token.
        k: the target of active experts a token, on average.
        state: `{"lambda": float32 []}`. Gets no gradient.
        k_max: most experts a token, the largest gates first; 0 stands for all E.

    Returns:
        The decision. Choices are in the order of the gates `max(l, 0)`, which are not normalised;
        a token without a positive logit has none. `probs` is the normalised softplus of the logits,
        the smooth form of their ReLU: it ranks experts whose gate is 0 and is never 0/0.

        Terms: `relu_l1` `[B S E]`, the gates times `lambda`, with gradient; `relu_load` `[B S E]`,
        `E / k` for a positive logit, else 0, so that its mean is 1 on target; `active` `[B S]`, the
        number of positive logits, with the gradient of the sum of their sigmoids.

    Raises:
        ValueError: no state.
    """
    if state is None:
        raise ValueError("ReLU routing needs its lambda: pass state, as init_state makes it")
    E = logits.shape[-1]
    gates = jax.nn.relu(logits)
    expert = select(logits, width(E, k_max))
    gate = gather(gates, expert)
    on = (gates > 0).astype(logits.dtype)
    terms = {
        "relu_l1": jax.lax.stop_gradient(state["lambda"]) * gates,
        "relu_load": on * (E / k),
        ACTIVE: straight_through(on.sum(axis=-1), jax.nn.sigmoid(logits).sum(axis=-1)),
    }
    plan = variable_choices(expert, gate, gate > 0, valid)
    return Routing(logits, smooth_probs(logits), plan, terms)


def smooth_probs(logits: Float[Array, "B S E"]) -> Float[Array, "B S E"]:
    """`softplus(l) / sum softplus(l)`, formed from logarithms so that no logit makes it 0/0."""
    return jax.nn.softmax(2.0 * log_sqrt_softplus(logits))


def init_state(
    num_experts: int,
    vocab_size: int,
    k: int,
    key: PRNGKeyArray,
    token_counts: Shaped[np.ndarray, " V"] | None = None,
    *,
    lambda_init: Scalar = 1e-8,
) -> State:
    """Returns `{"lambda": float32 []}`.

    Args:
        num_experts: not read, like the next four.
        vocab_size: not read.
        k: not read.
        key: not read.
        token_counts: not read.
        lambda_init: the paper starts at 1e-8, where the penalty does nothing.
    """
    del num_experts, vocab_size, k, key, token_counts
    return {"lambda": jnp.asarray(lambda_init, jnp.float32)}


def update_state(
    state: State,
    tokens: Shaped[Array, "*L"],
    stats: dict[str, Array],
    *,
    lambda_factor: Scalar = 1.2,
) -> State:
    """Multiplies `lambda` by the factor where too many experts are active, else divides.

    The rule of the paper, `lambda *= factor^sign((1 - k/E) - S)` with `S` the share of zero gates,
    written in the mean of `relu_load`, which is `(1 - S) E / k`. Differs from the paper in that every
    layer has its own `lambda` and target, and in the bounds `LAMBDA_RANGE`.

    Args:
        state: `{"lambda": float32 [*L]}`.
        tokens: valid tokens of the step, `[*L]`.
        stats: sums of the terms over the step; `relu_load` is `[*L E]`.
        lambda_factor: the paper's alpha, 1.2; may be traced.

    Returns:
        The new state.
    """
    load = stats["relu_load"].mean(axis=-1) / jnp.maximum(tokens, 1)
    moved = state["lambda"] * jnp.asarray(lambda_factor, jnp.float32) ** jnp.sign(load - 1.0)
    return {"lambda": jnp.where(tokens > 0, jnp.clip(moved, *LAMBDA_RANGE), state["lambda"])}


def check(
    num_experts: int,
    *,
    k: int,
    k_max: int = 0,
    lambda_init: float = 1e-8,
    lambda_factor: float = 1.2,
) -> None:
    """Refuses a target that cannot be reached and a controller that cannot move.

    Raises:
        ConfigError: k_max below k or above E, lambda not positive, or a factor of at most 1.
    """
    check_width(num_experts, k_max)
    if k_max and k_max < k:
        raise ConfigError(
            f"router.k_max={k_max} is below router.k={k}, the average that the controller aims at and "
            "could then never reach. Raise router.k_max, or set it to 0 for no limit."
        )
    low, high = LAMBDA_RANGE
    if not low <= lambda_init <= high:
        raise ConfigError(
            f"router.lambda_init={lambda_init} must be between {low} and {high}: the controller "
            "multiplies it, and 0 stays 0. The paper uses 1e-8."
        )
    if lambda_factor <= 1.0:
        raise ConfigError(
            f"router.lambda_factor={lambda_factor} must be above 1: lambda is multiplied by it when "
            "too many experts are active and divided by it when too few are. The paper uses 1.2."
        )


ROUTER = Router(
    route,
    paper="Wang et al. 2025, arXiv:2412.14711",
    equation="gate = max(x W, 0), experts where gate > 0; lambda steers their mean number to k",
    cost="D E + k experts on average",
    use="Fully differentiable choice: a gate moves continuously to 0 instead of being cut off.",
    check=check,
    fixed_k=False,
    stateful=True,
    traced=("lambda_factor",),
    init_state=init_state,
    update_state=update_state,
)
