"""Conditional computation: a policy that switches every expert on or off, at a price for each.

Bengio et al. 2015, "Conditional Computation in Neural Networks for Faster Models"
(arXiv:1511.06297). With the compute penalty of `moe.routing.policy_losses.penalised` it learns to
use as few experts as the loss allows.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from moe.routing.reinforce import (
    PolicyGate,
    baseline_of,
    check_names,
    init_state,
    policy_terms,
    update_state,
)
from moe.routing.router import Router
from moe.routing.selection import gather, select
from moe.routing.types import PER_TOKEN, Routing, State
from moe.routing.variable_k import ACTIVE, check_width, straight_through, variable_choices, width


def route(
    logits: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    *,
    k: int,
    foreseen: Float[Array, "B S"],
    key: PRNGKeyArray | None = None,
    state: State | None = None,
    gates: str = "one",
    baseline: str = "ema",
    k_max: int = 0,
) -> Routing:
    """Switches expert `e` on with probability `s_e = sigmoid(logit_e + log(k / (E - k)))`.

    The offset makes a gate that knows nothing use `k` experts on average. A token takes the mean
    of its experts; a token without any passes through on the residual.

    Args:
        logits: float32 `[B S E]`.
        valid: `[B S]`, True for a real token.
        k: experts a token at the start, on average.
        foreseen: a learned baseline's prediction of each token's cost.
        key: of the draws; None switches on where `s_e > 1/2`, as evaluation does.
        state: of the baseline.
        gates: `one`: gate 1/n for each of n experts; `prob`: `s_e / n`.
        baseline: as in `moe.routing.reinforce`.
        k_max: the most experts a token may visit, those of the largest `s`; 0 for all.

    Returns:
        The decision. `probs` is `s / sum(s)`; terms are those of `moe.routing.reinforce`, the
        number of experts used as `token/experts`, and as `active` with the gradient of `sum_e s_e`.
    """
    E = logits.shape[-1]
    K = width(E, k_max)
    # Half an expert is left out where k = E, whose odds are infinite.
    z = logits + math.log(k / max(E - k, 0.5))
    score = jax.nn.sigmoid(z)
    threshold = 0.5 if key is None else jax.random.uniform(key, z.shape)
    on = jax.lax.stop_gradient(score) > threshold  # [B S E]
    expert = select(jnp.where(on, score, score - 1.0), K)  # in [0, 1] if on, else in [-1, 0]
    used = jnp.minimum(on.sum(axis=-1), K)
    active = jnp.arange(K)[None, None] < used[..., None]
    gate = gather(score, expert) if gates == "prob" else jnp.ones(expert.shape)
    plan = variable_choices(expert, gate / jnp.maximum(used, 1)[..., None], active, valid)
    number = used.astype(jnp.float32)
    terms = policy_terms(
        jnp.where(on, jax.nn.log_sigmoid(z), jax.nn.log_sigmoid(-z)).sum(axis=-1),
        (jax.nn.softplus(z) - z * score).sum(axis=-1),
        baseline_of(state, foreseen, baseline),
    )
    terms |= {PER_TOKEN + "experts": number, ACTIVE: straight_through(number, score.sum(axis=-1))}
    return Routing(logits, jax.nn.softmax(jax.nn.log_sigmoid(z)), plan, terms)


def check(
    num_experts: int, *, k: int, gates: str = "one", baseline: str = "ema", k_max: int = 0
) -> None:
    """Refuses unknown names and a `k_max` that does not fit.

    Raises:
        ConfigError: see the messages.
    """
    del k
    check_names(gates, baseline)
    check_width(num_experts, k_max)


ROUTER = Router(
    route,
    paper="Bengio et al. 2015, arXiv:1511.06297",
    equation="a_e ~ Bernoulli(sigmoid(x w_e)); c = nll + lambda sum_e a_e; L = (c - b) log p(a) - beta H",
    cost="D E for the gate, as many experts as the policy wants",
    use="To let the model decide how many experts a token is worth, at a price of your choice.",
    check=check,
    gate=PolicyGate,
    fixed_k=False,
    stateful=True,
    traced=("baseline_decay",),
    init_state=init_state,
    update_state=update_state,
)
