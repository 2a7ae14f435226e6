"""AdamW with warm-up, a schedule, clipping and a decay mask; its numbers are traced, not compiled in."""

from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import optax

from moe.routing.types import Scalar

# The router's gate: decay would flatten its logits. Sizes of noise, which would fade.
NO_DECAY = ("gate", "sigmas")


class Optimized(NamedTuple):
    """What one update gives."""

    params: Any
    optimizer: optax.OptState
    learning_rate: Float[Array, ""]
    grad_norm: Float[Array, ""]  # before clipping


def schedule(
    *, kind: str, steps: int, warmup_steps: int, decay_fraction: float, final_fraction: float
) -> optax.Schedule:
    """Fraction of the peak learning rate at a step (0 is the first).

    Args:
        kind: "cosine" (Loshchilov and Hutter 2017, arXiv:1608.03983), "wsd" (warm-up, stable, linear
            decay: Hu et al. 2024, arXiv:2404.06395) or "constant"; all after a linear warm-up.
        steps: optimiser steps of the whole run.
        warmup_steps: steps from 0 to the peak.
        decay_fraction: share of all steps that wsd spends decaying.
        final_fraction: fraction of the peak at the end.
    """
    warmup = min(warmup_steps, steps)
    rest = max(1, steps - warmup)
    # The first step already moves: the ramp starts at 1 / warmup, not at 0.
    ramp = optax.linear_schedule(1.0 / max(1, warmup), 1.0, max(1, warmup - 1))
    if kind == "cosine":
        after = optax.cosine_decay_schedule(1.0, rest, alpha=final_fraction)
    elif kind == "wsd":
        decay = min(rest, max(1, round(decay_fraction * steps)))
        after = optax.linear_schedule(1.0, final_fraction, decay, transition_begin=rest - decay)
    else:
        after = optax.constant_schedule(1.0)
    return optax.join_schedules([ramp, after], [warmup])


def decay_mask(params: nnx.State) -> Any:
    """Pure dict of bools like the parameters: True for matrices, False for norms and for the gate."""
    flat = nnx.to_flat_state(params)
    masked = [
        (
            path,
            nnx.Param(len(v.get_metadata().get("axes", ())) >= 2 and not set(path) & set(NO_DECAY)),
        )
        for path, v in flat
    ]
    return nnx.to_pure_dict(nnx.from_flat_state(masked))


def adam(
    *, b1: float, b2: float, eps: float, moment_dtype: str = "float32"
) -> optax.GradientTransformation:
    """The moments of Adam (Kingma and Ba 2015, arXiv:1412.6980), computed in float32.

    Args:
        b1: decay of the mean of gradients.
        b2: decay of the mean of their squares.
        eps: added to the root of the second moment.
        moment_dtype: in which both are kept from step to step. bfloat16 halves their memory; its 8 bits
            lose what a step adds to a mean once that is under 1/256 of it, so keep b2 at 0.98 or below.
    """
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    if moment_dtype == "float32":
        return adam

    def stored(state: optax.OptState, dtype: str) -> optax.OptState:
        return optax.tree.map_params(adam, lambda moment: moment.astype(dtype), state)

    def update(updates: Any, state: optax.OptState, params: Any = None) -> tuple[Any, Any]:
        updates, state = adam.update(updates, stored(state, "float32"), params)
        return updates, stored(state, moment_dtype)

    return optax.GradientTransformation(
        lambda params: stored(adam.init(params), moment_dtype), update
    )


def update(
    transformation: optax.GradientTransformation,
    grads: Any,
    params: Any,
    optimizer: optax.OptState,
    *,
    decay: Any,
    fraction: Float[Array, ""],
    learning_rate: Scalar,
    weight_decay: Scalar,
    clip_norm: Scalar,
    norm: Float[Array, ""],
) -> Optimized:
    """One step of AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), clipped by the global norm.

    Args:
        transformation: `adam(...)`.
        grads: like `params`, float32.
        params: pure dict of float32 arrays.
        optimizer: state of `transformation`.
        decay: pure dict of bools, which parameters decay.
        fraction: the schedule's value at this step.
        learning_rate: peak; traced, as are the next two.
        weight_decay: relative to the learning rate.
        clip_norm: largest global gradient norm.
        norm: global norm of `grads`.
    """
    scale = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-12))
    grads = jax.tree.map(lambda g: g * scale, grads)
    directions, optimizer = transformation.update(grads, optimizer, params)
    rate = learning_rate * fraction

    def step(p: Array, d: Array, decays: bool) -> Array:
        return p - rate * (d + weight_decay * p if decays else d)

    return Optimized(jax.tree.map(step, params, directions, decay), optimizer, rate, norm)


def step_fraction(sched: optax.Schedule, step: Int[Array, ""]) -> Float[Array, ""]:
    """The schedule at a traced step."""
    return jnp.asarray(sched(step), jnp.float32)
