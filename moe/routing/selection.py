"""The two steps every token-choice router ends with: pick the K best, and collect their gates."""

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.routing.types import Choices

# What bears this name is kept for the backward pass by every remat policy: a recomputation whose
# rounding differs must not differentiate another choice than the one that was made.
ROUTING_NAME = "routing"


def select(scores: Float[Array, "B S E"], k: int) -> Int[Array, "B S K"]:
    """Returns the `k` experts of the largest scores, best first; a tie goes to the lower number.

    Selection is a decision, not a function to differentiate: gradients reach the gate through
    the gates alone.
    """
    best = jax.lax.top_k(jax.lax.stop_gradient(scores), k)[1]
    return checkpoint_name(best, ROUTING_NAME)


def gather(scores: Float[Array, "B S E"], expert: Int[Array, "B S K"]) -> Float[Array, "B S K"]:
    """Returns `scores[b, s, expert[b, s, k]]`.

    Compares with every expert number instead of indexing: the gradient is then a sum, not a
    scatter, and shards over `B` without communication.
    """
    chosen = jax.nn.one_hot(expert, scores.shape[-1], dtype=bool)  # [B S K E]
    return jnp.sum(jnp.where(chosen, scores[..., None, :], 0.0), axis=-1)


def choices(
    expert: Int[Array, "B S K"], gate: Float[Array, "B S K"], valid: Bool[Array, "B S"]
) -> Choices:
    """Builds the plan, with gate 0 and `valid` False wherever the token is padding."""
    chosen = jnp.broadcast_to(valid[..., None], expert.shape)
    return Choices(expert.astype(jnp.int32), jnp.where(chosen, gate, 0.0), chosen)
