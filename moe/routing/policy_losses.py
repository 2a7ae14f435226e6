"""Losses of routers that learn from reward: every choice is judged by what the tokens then cost.

REINFORCE (Williams 1992) for routing: Bengio et al. 2015 (arXiv:1511.06297), Rosenbaum et al. 2018
(arXiv:1711.01239), Clark et al. 2022 (arXiv:2202.01169), appendix on RL-R.

All are pure, unweighted, and take the cross-entropy of each token after the whole forward pass. As
in `moe.routing.losses`, each returns its report's part of a step's loss: the parts of microbatches
add up. `policy` and `policy_entropy` read a model's report; the rest is what they are made of. Usual
weights: policy 0.01, baseline 0.01, entropy 5e-4 (Muqeeth et al. 2023, arXiv:2306.03745, in the
authors' code).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from moe.errors import ConfigError
from moe.routing.types import PER_TOKEN, LayerReport, Scalar

CREDITS = ("token", "sequence", "to_go")
LOG_PROB, BASELINE = PER_TOKEN + "log_prob", PER_TOKEN + "baseline"
ENTROPY, EXPERTS = PER_TOKEN + "policy_entropy", PER_TOKEN + "experts"

Total = Scalar | Shaped[Array, ""]  # a count, of any type


def policy(
    report: LayerReport,
    token_cost: Float[Array, "B S"],
    valid: Bool[Array, "B S"],
    *,
    total_tokens: Total,
    credit: str = "token",
    penalty: float = 0.0,
    baseline_weight: float = 1.0,
) -> Float[Array, ""]:
    """The loss of a routing policy: the score-function surrogate and its baseline's own loss.

    Args:
        report: stacked over layers, with the terms `token/log_prob`, `token/baseline` and, for a
            penalty, `token/experts`.
        token_cost: cross-entropy of each token, nats.
        valid: `[B S]`, True where a token counts.
        total_tokens: valid tokens of the whole step.
        credit: which cost a choice answers for, one of `CREDITS`.
        penalty: nats added to the cost for each expert that a token visits.
        baseline_weight: of the Huber loss, beside the surrogate; only a learned baseline has use
            for it.

    Returns:
        This report's part of the loss.

    Raises:
        ConfigError: an unknown credit, or a penalty where the number of experts is fixed.
    """
    terms, cost = report.token_terms, credited(token_cost, valid, credit)
    if penalty:
        if EXPERTS not in terms:
            raise ConfigError(
                f"losses.policy_penalty={penalty} with a router whose number of experts is fixed: "
                "the price would be the same for every choice. Set losses.policy_penalty=0.0, or "
                "router.name='bernoulli'."
            )
        cost = penalised(cost, terms[EXPERTS], penalty)
    baseline = terms[BASELINE]
    surrogate = policy_loss(
        terms[LOG_PROB], cost, valid, total_tokens=total_tokens, baseline=baseline
    )
    foresight = baseline_loss(baseline, cost, valid, total_tokens=total_tokens)
    return surrogate + baseline_weight * foresight


def policy_entropy(
    report: LayerReport, valid: Bool[Array, "B S"], *, total_tokens: Total
) -> Float[Array, ""]:
    """`entropy_loss` of a report with the term `token/policy_entropy`."""
    return entropy_loss(report.token_terms[ENTROPY], valid, total_tokens=total_tokens)


def policy_loss(
    log_prob: Float[Array, "L B S"],
    cost: Float[Array, "B S"],
    valid: Bool[Array, "B S"],
    *,
    total_tokens: Total,
    baseline: Float[Array, "L B S"] | float = 0.0,
) -> Float[Array, ""]:
    """The surrogate whose gradient is the score-function estimate: mean of `(cost - b) log p[a]`.

    Lowering it makes choices that cost less than the baseline more likely. Every layer is judged
    by the same cost, so layers are summed: the log-probability of all choices of a token.

    Args:
        log_prob: log-probability of the choice that was made; the only thing that gets a gradient.
        cost: nats of each token, with a compute penalty or not; no gradient goes through it, and
            so none from here into experts.
        valid: `[B S]`, True where a token counts.
        total_tokens: valid tokens of the whole step.
        baseline: what each choice was expected to cost. Any number that does not depend on the
            choice itself leaves the gradient's mean as it is.

    Returns:
        This report's part of the loss; its value means nothing, its gradient does.
    """
    advantage = jax.lax.stop_gradient(cost[None] - baseline)
    per_token = jnp.where(valid[None], advantage * log_prob, 0.0)
    return per_token.sum() / jnp.maximum(total_tokens, 1)


def baseline_loss(
    baseline: Float[Array, "L B S"],
    cost: Float[Array, "B S"],
    valid: Bool[Array, "B S"],
    *,
    total_tokens: Total,
    delta: float = 1.0,
) -> Float[Array, ""]:
    """Teaches a learned baseline to foresee the cost: Huber loss, mean over layers and tokens.

    Args:
        baseline: predictions; the only thing that gets a gradient.
        cost: nats of each token.
        valid: `[B S]`, True where a token counts.
        total_tokens: valid tokens of the whole step.
        delta: nats up to which the loss is a parabola.

    Returns:
        This report's part of the loss.
    """
    error = jnp.abs(baseline - jax.lax.stop_gradient(cost)[None])
    inside = jnp.minimum(error, delta)
    huber = 0.5 * inside**2 + delta * (error - inside)
    return _mean_over_layers(huber, valid, total_tokens)


def entropy_loss(
    entropy: Float[Array, "L B S"], valid: Bool[Array, "B S"], *, total_tokens: Total
) -> Float[Array, ""]:
    """Minus the policy's entropy, mean over layers and tokens.

    The minus sign makes a positive weight a bonus for exploring: adding the entropy itself, as
    some code does, makes the policy collapse.

    Args:
        entropy: of each token's policy, nats.
        valid: `[B S]`, True where a token counts.
        total_tokens: valid tokens of the whole step.

    Returns:
        This report's part of the loss, at most 0.
    """
    return -_mean_over_layers(entropy, valid, total_tokens)


def penalised(
    cost: Float[Array, "B S"], experts: Float[Array, "L B S"], penalty: Scalar
) -> Float[Array, "B S"]:
    """Adds a price of compute to the cost: `cost + penalty * mean over layers of experts used`.

    Args:
        cost: nats of each token.
        experts: how many experts each token visited.
        penalty: nats an expert; may be traced.
    """
    return cost + penalty * experts.astype(jnp.float32).mean(axis=0)


def credited(
    cost: Float[Array, "B S"], valid: Bool[Array, "B S"], scope: str
) -> Float[Array, "B S"]:
    """Says which cost a token's choice answers for.

    * `token`: its own. Least noise, blind to what later tokens read from it.
    * `sequence`: the mean of its row.
    * `to_go`: the mean of itself and all later tokens of its row. Legal in training, where the
      whole row is known; noisier than `token`. Packed documents share a row: the later ones add
      noise and no bias.

    Args:
        cost: nats of each token.
        valid: `[B S]`, True where a token counts.
        scope: one of `CREDITS`.

    Raises:
        ConfigError: an unknown scope.
    """
    if scope not in CREDITS:
        raise ConfigError(
            f"losses.policy_credit={scope!r} is not one of {', '.join(CREDITS)}; choose one."
        )
    counted, cost = valid.astype(jnp.float32), jnp.where(valid, cost, 0.0)
    if scope == "token":
        return cost
    if scope == "sequence":
        mean = cost.sum(axis=1) / jnp.maximum(counted.sum(axis=1), 1)
        return jnp.broadcast_to(mean[:, None], cost.shape)
    total, count = (jnp.cumsum(x[:, ::-1], axis=1)[:, ::-1] for x in (cost, counted))
    return total / jnp.maximum(count, 1)


def leave_one_out(costs: Float[Array, "M B S"]) -> Float[Array, "M B S"]:
    """Baselines of `M` passes over the same tokens: for each, the mean cost of the others.

    Unlike a mean over all passes it does not contain the choice that it judges, so the gradient
    stays unbiased (Kool et al. 2019, "Buy 4 REINFORCE samples").

    Raises:
        ValueError: fewer than two passes.
    """
    M = costs.shape[0]
    if M < 2:
        raise ValueError(f"leave-one-out needs at least 2 passes over the same tokens, got {M}")
    return (costs.sum(axis=0, keepdims=True) - costs) / (M - 1)


def _mean_over_layers(
    values: Float[Array, "L B S"], valid: Bool[Array, "B S"], total_tokens: Total
) -> Float[Array, ""]:
    per_layer = jnp.where(valid[None], values, 0.0).sum(axis=(1, 2))
    return per_layer.mean() / jnp.maximum(total_tokens, 1)
