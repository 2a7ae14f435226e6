"""Sampled routing: K experts drawn without replacement by perturbing the logits.

Gumbel-max (Maddison et al. 2014) gives one draw from the softmax; the K largest perturbed
logits are K draws without replacement, with unbiased weights (Kool et al. 2019, arXiv:1903.06059).
The relaxation is the Concrete distribution (arXiv:1611.00712, arXiv:1611.01144), annealed as in
dense-to-sparse gates (EvoMoE, Nie et al. 2021, arXiv:2112.14397).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped
import numpy as np

from moe.errors import ConfigError
from moe.routing.router import Router, drawing
from moe.routing.selection import choices, gather, select
from moe.routing.types import Routing, Scalar, State
from moe.routing.variable_k import straight_through

GATES = ("raw", "renormalize", "importance", "straight_through")


def route(
    logits: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    *,
    k: int,
    key: PRNGKeyArray | None = None,
    state: State | None = None,
    gates: str = "importance",
    greedy: int = 0,
    noise: Scalar = 1.0,
    tau: Scalar = 1.0,
    tau_end: Scalar = 0.3,
    anneal_steps: Scalar = 10_000,
) -> Routing:
    """Draws experts where it has a key, else takes the `k` largest logits.

    With `phi = log softmax(logits)` and `G = phi + noise * Gumbel(0, 1)`, the choices are the `k`
    largest `G`:

    | `gates` | sampled | without a key |
    |---|---|---|
    | `raw` | `p_i`; favours likely experts twice over | `p_i` |
    | `renormalize` | `p_i / sum_j p_j` over the chosen | the same |
    | `importance` | `p_i / q_i`, `q_i` the chance to be in; the mean is the dense mixture | as `renormalize` |
    | `straight_through` | exactly 1/K, with the gradient of `softmax(G / tau)` | 1/K |

    Args:
        logits: float32 `[B S E]`.
        valid: `[B S]`, True for a real token.
        k: experts a token.
        key: of the draws; None takes the largest logits, as evaluation does.
        state: `{"step": int32 []}`, for tau; None stands for step 0.
        gates: one of `GATES`. `straight_through` weighs the chosen experts only, so experts that
            were not drawn send no gradient.
        greedy: so many of the `k` are the largest logits, and only the rest is drawn from the
            others (ModuleFormer, Shen et al. 2023, arXiv:2306.04640).
        noise: 1 samples from the softmax, 0 takes the largest logits; may be traced.
        tau: temperature of `straight_through` at step 0; may be traced, like the next two.
        tau_end: its last temperature.
        anneal_steps: steps from one to the other, in a straight line.

    Returns:
        The decision; `probs` is the softmax of the clean logits.
    """
    phi = jax.nn.log_softmax(logits)
    probs = jnp.exp(phi)
    if key is None:
        expert, inclusion, perturbed = select(logits, k), None, phi
    else:
        perturbed = phi + noise * jax.random.gumbel(key, phi.shape)
        expert, inclusion = sample(phi, perturbed, k, greedy, noise)
    if gates == "straight_through":
        step = jnp.zeros((), jnp.int32) if state is None else state["step"]
        soft = jax.nn.softmax(perturbed / temperature(step, tau, tau_end, anneal_steps))
        soft = gather(soft, expert)
        gate = straight_through(jnp.full_like(soft, 1.0 / k), soft)
    else:
        gate = gather(probs, expert)
        if gates == "importance" and inclusion is not None:
            gate = gate / inclusion
        elif gates != "raw":
            gate = gate / gate.sum(axis=-1, keepdims=True)
    return Routing(logits, probs, choices(expert, gate, valid))


def sample(
    phi: Float[Array, "B S E"],
    perturbed: Float[Array, "B S E"],
    k: int,
    greedy: int = 0,
    noise: Scalar = 1.0,
) -> tuple[Int[Array, "B S K"], Float[Array, "B S K"]]:
    """Takes `greedy` experts of the largest `phi` and then those of the largest `perturbed`.

    Args:
        phi: log probabilities.
        perturbed: `phi + noise * Gumbel(0, 1)`.
        k: experts in all.
        greedy: how many of them are not drawn.
        noise: scale of the noise; may be traced.

    Returns:
        The experts, and the probability with which each is among the chosen, given the largest
        perturbed value `kappa` that is not: `1 - exp(-exp((phi_i - kappa) / noise))`, and 1 for
        those not drawn (Kool et al. 2019, section 4.1). No gradient.
    """
    phi, perturbed = jax.lax.stop_gradient((phi, perturbed))
    E = phi.shape[-1]
    sure = select(phi, greedy)
    taken = jax.nn.one_hot(sure, E, dtype=bool).any(axis=-2)  # [B S E]
    perturbed = jnp.where(taken, -jnp.inf, perturbed)
    ranked = select(perturbed, min(k + 1, E) - greedy)
    drawn, first_out = ranked[..., : k - greedy], ranked[..., k - greedy :]
    kappa = gather(perturbed, first_out) if first_out.shape[-1] else -jnp.inf
    margin = (gather(phi, drawn) - kappa) / jnp.maximum(noise, jnp.finfo(phi.dtype).tiny)
    inclusion = -jnp.expm1(-jnp.exp(margin))
    inclusion = jnp.concatenate([jnp.ones(sure.shape), inclusion], axis=-1)
    return jnp.concatenate([sure, drawn], axis=-1), inclusion


def temperature(
    step: Shaped[Array, ""], tau: Scalar, tau_end: Scalar, anneal_steps: Scalar
) -> Float[Array, ""]:
    """Falls in a straight line from `tau` at step 0 to `tau_end` at `anneal_steps`, then rests."""
    done = jnp.minimum(step / anneal_steps, 1.0)
    return tau + (tau_end - tau) * done


def init_state(
    num_experts: int,
    vocab_size: int,
    k: int,
    key: PRNGKeyArray,
    token_counts: Shaped[np.ndarray, " V"] | None = None,
) -> State:
    """Returns `{"step": int32 0}`."""
    del num_experts, vocab_size, k, key, token_counts
    return {"step": jnp.zeros((), jnp.int32)}


def update_state(state: State) -> State:
    """Counts the step."""
    return {"step": state["step"] + 1}


def check(
    num_experts: int,
    *,
    k: int,
    gates: str = "importance",
    greedy: int = 0,
    tau: Scalar = 1.0,
    tau_end: Scalar = 0.3,
    anneal_steps: Scalar = 10_000,
) -> None:
    """Refuses gates that are unknown, constant or not defined.

    Raises:
        ConfigError: see the messages.
    """
    if gates not in GATES:
        raise ConfigError(f"router.gates={gates!r} is not one of {', '.join(GATES)}; choose one.")
    if gates == "renormalize" and k == 1:
        raise ConfigError(
            "router.k=1 with router.gates='renormalize': a single gate divided by itself is "
            "always 1, so the router would get no gradient. Set router.gates='importance' or k=2."
        )
    if gates == "importance" and k >= num_experts:
        raise ConfigError(
            f"router.gates='importance' with router.k={k} of model.num_experts={num_experts}: the "
            "weights are measured at the best expert that was not drawn, and there is none. Set "
            "router.gates='raw', which is exact when every expert is chosen, or a smaller router.k."
        )
    if not 0 <= greedy < k:
        raise ConfigError(
            f"router.greedy={greedy} must be at least 0 and below router.k={k}, so that at least "
            "one expert is drawn; router.name='topk' draws none."
        )
    if tau <= 0 or tau_end <= 0 or anneal_steps <= 0:
        raise ConfigError(
            f"router.tau={tau}, router.tau_end={tau_end} and router.anneal_steps={anneal_steps} "
            "must be above 0: they divide."
        )


ROUTER = Router(
    route,
    paper="Kool et al. 2019, arXiv:1903.06059; Jang et al. 2017, arXiv:1611.01144",
    equation="S = top-k of log p + Gumbel(0,1); gate = p_i / P(i in S), or straight through softmax(G/tau)",
    cost="D E for the gate, k experts",
    use="To explore in training with gradients that are those of the dense mixture on average.",
    check=check,
    stateful=True,
    traced=("noise", "tau", "tau_end", "anneal_steps"),
    init_state=init_state,
    update_state=update_state,
)

# The same, drawing in evaluation too: the mean over several keys samples the model's predictions.
SAMPLED = ROUTER._replace(
    route=drawing(route),
    use="To see how predictions spread over draws: evaluation samples too.",
    needs_key_in_eval=True,
)
