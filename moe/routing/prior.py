"""A prior over modules, updated from how well they do on held-out text.

The learner is Hedge (Freund and Schapire 1997) on rewards of all modules, or EXP3 (Auer et al.
2002) where only the modules on a sampled path are judged. Rewards come from a router-validation
split of its own: neither the reported validation set nor the test set may steer the router.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, Shaped
import numpy as np

from moe.errors import ConfigError
from moe.routing import topk
from moe.routing.router import Router
from moe.routing.types import Routing, Scalar, State

RULED_OUT = -1e9


def route(
    logits: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    *,
    k: int,
    state: State | None = None,
    normalize: str = "renormalize",
    prior_weight: Scalar = 1.0,
) -> Routing:
    """Top-k softmax of `logits + prior_weight * log pi`.

    Args:
        logits: float32 `[B S E]`.
        valid: `[B S]`, True for a real token.
        k: experts a token.
        state: `{"log_prior": float32 [E]}`; None stands for a uniform prior. Gets no gradient.
        normalize: as in `moe.routing.topk`.
        prior_weight: 0 ignores the prior; may be traced.

    Returns:
        The decision; `logits` are those without the prior, `probs` those with it.
    """
    biased = logits
    if state is not None:
        biased = logits + prior_weight * jax.lax.stop_gradient(state["log_prior"])[None, None]
    return topk.route(biased, valid, k=k, normalize=normalize)._replace(logits=logits)


def hedge(
    log_prior: Float[Array, "*L E"],
    rewards: Float[Array, "*L E"],
    eta: Scalar = 0.1,
    floor: Scalar = 0.05,
) -> Float[Array, "*L E"]:
    """One round: `pi_e <- pi_e exp(eta z_e)` with standardised rewards `z`, mixed with uniform.

    Args:
        log_prior: log pi; leading axes are independent layers.
        rewards: how useful each module was, in any unit: only their order and ratios of
            differences count. Equal rewards change nothing beyond the mixing.
        eta: step size; 0 leaves the prior as it is, but for the floor.
        floor: share of the uniform distribution mixed in, so that no module falls below
            `floor / E` and stays out for good.

    Returns:
        The new log pi, normalised.
    """
    E = rewards.shape[-1]
    centred = rewards - rewards.mean(axis=-1, keepdims=True)
    z = centred / (rewards.std(axis=-1, keepdims=True) + 1e-8)
    prior = jax.nn.softmax(log_prior + eta * z)
    return jnp.log((1.0 - floor) * prior + floor / E)


def ablation_rewards(
    loss: Float[Array, "*L"], loss_without: Float[Array, "*L E"]
) -> Float[Array, "*L E"]:
    """What the loss gains when a module is taken away and gates are renormalised, nats."""
    return loss_without - loss[..., None]


def bandit_rewards(
    losses: Float[Array, " N"], on_path: Bool[Array, "N *L E"], chance: Float[Array, "*L E"]
) -> Float[Array, "*L E"]:
    """Judges modules by the passes that used them: mean of `1[e on path] (mean loss - loss) / q_e`.

    Args:
        losses: of `N` passes over the same text, each on its own path, nats.
        on_path: which modules each pass used.
        chance: `q`, the probability that a pass uses a module; dividing by it makes up for
            modules that are rarely tried (EXP3).

    Returns:
        Rewards; 0 for a module that no pass used.
    """
    advantage = losses.mean() - losses
    total = jnp.tensordot(advantage, on_path.astype(jnp.float32), axes=1)
    return total / (losses.shape[0] * jnp.maximum(chance, jnp.finfo(jnp.float32).tiny))


def set_prior(
    state: State, rewards: Float[Array, "*L E"], eta: Scalar = 0.1, floor: Scalar = 0.05
) -> State:
    """Returns the state of the layers with their `log_prior` updated by `hedge`; the rest stays."""
    return {**state, "log_prior": hedge(state["log_prior"], rewards, eta, floor)}


def without(state: State, expert: int) -> State:
    """Returns the state with one module ruled out in every layer, for `ablation_rewards`.

    The probabilities of the others are renormalised by the softmax that follows. The prior is made
    tiny and not 0, so that logarithms and their products stay finite.
    """
    return {**state, "log_prior": state["log_prior"].at[..., expert].set(RULED_OUT)}


def init_state(
    num_experts: int,
    vocab_size: int,
    k: int,
    key: PRNGKeyArray,
    token_counts: Shaped[np.ndarray, " V"] | None = None,
) -> State:
    """Returns `{"log_prior": float32 [E]}`, uniform."""
    del vocab_size, k, key, token_counts
    return {"log_prior": jnp.full(num_experts, -jnp.log(num_experts), jnp.float32)}


def check(
    num_experts: int, *, k: int, normalize: str = "renormalize", prior_weight: Scalar = 1.0
) -> None:
    """Refuses what top-k refuses, and a prior that counts backwards.

    Raises:
        ConfigError: see the messages.
    """
    topk.check(num_experts, k=k, normalize=normalize)
    if prior_weight < 0:
        raise ConfigError(
            f"router.prior_weight={prior_weight} must be at least 0: a negative weight would send "
            "tokens to the modules that did worst. Set 0 to ignore the prior."
        )


ROUTER = Router(
    route,
    paper="Freund and Schapire 1997 (Hedge); Auer et al. 2002 (EXP3)",
    equation="top-k of softmax(l + log pi); pi_e <- pi_e exp(eta (r_e - mean r) / std r), then floored",
    cost="as top-k; a pass over the router-validation split now and then",
    use="When experts should be chosen by how well they do on held-out text.",
    check=check,
    stateful=True,
    traced=("prior_weight",),
    init_state=init_state,
)
