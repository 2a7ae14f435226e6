"""SMoE-Dropout: a random router that never learns, and more experts as training goes on.

Chen et al. 2023, "Sparse MoE as the New Dropout" (arXiv:2303.01610).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, Shaped
import numpy as np

from moe.errors import ConfigError
from moe.routing.gates import project
from moe.routing.router import Router
from moe.routing.selection import gather, select
from moe.routing.types import Routing, State
from moe.routing.variable_k import variable_choices


def route(
    logits: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    *,
    k: int,
    tokens: Float[Array, "B S D"],
    state: State | None = None,
    training: bool = True,
    k_min: int = 1,
    ramp_steps: int = 10_000,
) -> Routing:
    """Sends each token to its best `k(step)` experts under a frozen random kernel.

    Gates are the softmax over the chosen logits. K = `k` choices are made at every step, so that
    shapes stand still; those of rank `k(step)` and beyond are not valid. In evaluation all `k`
    count, whatever `k` is there: a trained model runs with as many experts as one can afford.

    Args:
        logits: not read; a layer without a gate passes zeros.
        valid: `[B S]`, True for a real token.
        k: experts a token at the end of the ramp.
        tokens: `[B S D]`, what the kernel projects; gets no gradient.
        state: `{"kernel": float32 [D E], "step": int32 []}`. The kernel is state and not a
            parameter: neither the optimiser nor weight decay can reach it.
        training: whether the ramp holds.
        k_min: experts a token at step 0.
        ramp_steps: steps until `k`; the paper ramps over the whole training.

    Returns:
        The decision, without any gradient.

    Raises:
        ValueError: no state.
    """
    del logits
    if state is None:
        raise ValueError("SMoE-Dropout needs its frozen kernel: pass state, as init_state makes it")
    logits = jax.lax.stop_gradient(project(tokens, state["kernel"]))
    expert = select(logits, k)
    active = active_experts(state["step"], k, k_min, ramp_steps) if training else k
    kept = jnp.broadcast_to(jnp.arange(k) < active, expert.shape)
    gate = jax.nn.softmax(jnp.where(kept, gather(logits, expert), -jnp.inf))
    plan = variable_choices(expert, gate, kept, valid)
    return Routing(logits, jax.nn.softmax(logits), plan)


def active_experts(
    step: Shaped[Array, ""], k: int, k_min: int, ramp_steps: int
) -> Shaped[Array, ""]:
    """Experts a token at a step: `round((k - k_min) * step / ramp_steps) + k_min`, then `k`."""
    done = jnp.minimum(step.astype(jnp.float32) / ramp_steps, 1.0)
    return k_min + jnp.round((k - k_min) * done).astype(jnp.int32)


def init_state(
    num_experts: int,
    vocab_size: int,
    k: int,
    key: PRNGKeyArray,
    width: int,
    token_counts: Shaped[np.ndarray, " V"] | None = None,
) -> State:
    """Returns `{"kernel", "step"}`: normal(0, D^-1/2), as a learned gate starts, and 0."""
    del vocab_size, k, token_counts
    kernel = width**-0.5 * jax.random.normal(key, (width, num_experts), jnp.float32)
    return {"kernel": kernel, "step": jnp.zeros((), jnp.int32)}


def update_state(state: State) -> State:
    """Counts the step; the kernel stays as it is."""
    return {**state, "step": state["step"] + 1}


def check(num_experts: int, *, k: int, k_min: int = 1, ramp_steps: int = 10_000) -> None:
    """Refuses a ramp that does not rise.

    Raises:
        ConfigError: `k_min` is not between 1 and k, or the ramp has no length.
    """
    del num_experts
    if not 1 <= k_min <= k:
        raise ConfigError(
            f"router.k_min={k_min} must be between 1 and router.k={k}: SMoE-Dropout starts with "
            "k_min experts a token and ends with k. The paper ramps from E/2 to E."
        )
    if ramp_steps < 1:
        raise ConfigError(
            f"router.ramp_steps={ramp_steps} must be at least 1; for a constant number of experts "
            f"set router.k_min={k}."
        )


ROUTER = Router(
    route,
    paper="Chen et al. 2023, arXiv:2303.01610",
    equation="S = top-k(s) of x W_r, W_r random and frozen; gate = softmax over S; k(s) rises linearly",
    cost="D E for the gate, k(s) experts",
    use="To slim a trained model at will: evaluate it with any k.",
    check=check,
    gate=None,
    fixed_k=False,
    stateful=True,
    init_state=init_state,
    update_state=update_state,
)
