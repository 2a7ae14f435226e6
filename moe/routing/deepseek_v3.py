"""DeepSeek-V3 routing: sigmoid scores, groups, and a balancing bias in place of a loss.

DeepSeek-AI 2024 (arXiv:2412.19437), section 2.1.2; the bias is Wang et al. 2024 (arXiv:2408.15664).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, Shaped
import numpy as np

from moe.errors import ConfigError
from moe.routing.balance import update_bias
from moe.routing.router import Router
from moe.routing.selection import choices, gather, select
from moe.routing.types import Routing, Scalar, State


def route(
    logits: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    *,
    k: int,
    state: State | None = None,
    groups: int = 1,
    groups_kept: int = 1,
    scale: Scalar = 1.0,
) -> Routing:
    """Picks experts by biased score, weighs them by unbiased score.

    With `s = sigmoid(logits)`: experts outside the `groups_kept` groups of the largest score
    (sum of the two largest `s + bias` inside) are masked by -inf, never by 0, which would beat
    a negative `s + bias`. The `k` largest `s + bias` are chosen; their gates are
    `scale * s_i / sum_j s_j`, or `scale * s_i` for k = 1, where the quotient is constant.

    Quotients of sigmoids are formed as softmax of log-sigmoids: the same number, and finite
    where every sigmoid underflows.

    Args:
        logits: float32 `[B S E]`.
        valid: `[B S]`, True for a real token.
        k: experts a token.
        state: `{"bias": float32 [E]}`; None stands for zeros. Gets no gradient.
        groups: groups of neighbouring experts, a divisor of E (the paper's 8 nodes).
        groups_kept: groups that a token may reach (the paper's 4).
        scale: the sum of a token's gates (the paper's 2.5); may be traced.

    Returns:
        The decision; `probs` is `s / sum(s)`, as the sequence-wise balance loss wants it.
    """
    log_score = jax.nn.log_sigmoid(logits)
    biased = jnp.exp(log_score) + (0.0 if state is None else state["bias"][None, None])
    expert = select(keep_groups(biased, groups, groups_kept), k)
    gate = gather(log_score, expert)
    gate = scale * (jnp.exp(gate) if k == 1 else jax.nn.softmax(gate))
    return Routing(logits, jax.nn.softmax(log_score), choices(expert, gate, valid))


def keep_groups(
    scores: Float[Array, "B S E"], groups: int, groups_kept: int, best: int = 2
) -> Float[Array, "B S E"]:
    """Sets to -inf the scores of all experts outside the `groups_kept` best groups of a token.

    A group is judged by the sum of its `best` largest scores: two here, one in DeepSeek-V2.
    """
    if groups_kept == groups:
        return scores
    B, S, E = scores.shape
    grouped = jax.lax.stop_gradient(scores).reshape(B, S, groups, E // groups)
    largest = jax.lax.top_k(grouped, min(best, E // groups))[0]
    kept = select(largest.sum(axis=-1), groups_kept)
    mask = jax.nn.one_hot(kept, groups, dtype=bool).any(axis=-2)  # [B S G]
    return jnp.where(jnp.repeat(mask, E // groups, axis=-1), scores, -jnp.inf)


def init_state(
    num_experts: int,
    vocab_size: int,
    k: int,
    key: PRNGKeyArray,
    token_counts: Shaped[np.ndarray, " V"] | None = None,
) -> State:
    """Returns `{"bias": float32 zeros [E]}`."""
    del vocab_size, k, key, token_counts
    return {"bias": jnp.zeros(num_experts, jnp.float32)}


def update_state(
    state: State,
    counts: Shaped[Array, "*L E"],
    *,
    bias_rate: Scalar = 1e-3,
    bias_centering: Scalar = 0.0,
) -> State:
    """Moves the bias against the load; `moe.routing.balance.update_bias` says how.

    Args:
        state: `{"bias": float32 [*L E]}`.
        counts: choices of each expert over the global batch, `[*L E]`.
        bias_rate: step of the bias; the paper uses 1e-3, and 0 for the last 500 of its 14,800 billion
            tokens; may be traced.
        bias_centering: share of its mean that is taken off the bias, 0 to 1; may be traced.
    """
    return {"bias": update_bias(state["bias"], counts, bias_rate, bias_centering)}


def check(
    num_experts: int, *, k: int, groups: int = 1, groups_kept: int = 1, scale: Scalar = 1.0
) -> None:
    """Refuses groups that do not fit the experts.

    Raises:
        ConfigError: groups do not divide E, or the kept groups hold fewer than k experts.
    """
    del scale
    if groups < 1 or num_experts % groups:
        raise ConfigError(
            f"router.groups={groups} must be at least 1 and divide model.num_experts="
            f"{num_experts}, so that groups are equal; choose a divisor of {num_experts}."
        )
    if not 1 <= groups_kept <= groups:
        raise ConfigError(
            f"router.groups_kept={groups_kept} must be between 1 and router.groups={groups}."
        )
    size = num_experts // groups
    if groups_kept * size < k:
        raise ConfigError(
            f"router.groups_kept={groups_kept} groups of {size} experts hold "
            f"{groups_kept * size} experts, fewer than router.k={k}; keep at least "
            f"{-(-k // size)} groups or lower router.k."
        )


ROUTER = Router(
    route,
    paper="DeepSeek-AI 2024, arXiv:2412.19437; Wang et al. 2024, arXiv:2408.15664",
    equation="S = top-k of sigmoid(l) + b in the kept groups, gate = alpha s_i / sum_S s_j",
    cost="D E + k experts",
    use="Balance without a balance loss in the way of the task: many fine experts, long training.",
    check=check,
    stateful=True,
    traced=("scale", "bias_rate", "bias_centering"),
    init_state=init_state,
    update_state=update_state,
)
