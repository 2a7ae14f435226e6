"""What a step may not learn from: numbers that are not finite, and losses far above the recent ones.

Traced inside the step. A step that is judged unfit changes no parameter, no moment and no router
state; its number and its batch are used up all the same, so that the data order does not depend on
what was skipped. Spikes as in PaLM's training (Chowdhery et al. 2022, arXiv:2204.02311, section
5.1), found by their distance from a window of losses.

A row of spikes that is long enough for the run to go back ends only with that: whatever the next
steps bring, they belong to it and change nothing. So the host, which looks at the guards now and
then, finds the same row whenever it looks, and how long it is complete (`moe.training.rewind`).
"""

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree
import numpy as np

from moe.routing.types import Scalar

WINDOW = 128  # losses, where nothing else is said

Tree = TypeVar("Tree")


class GuardState(NamedTuple):
    """What the guards remember from step to step; replicated, part of the train state."""

    skipped: Int[Any, ""]  # int32: steps that changed nothing, of the whole run
    bad_in_a_row: Int[Any, ""]  # not finite, since the last update
    longest_bad: Int[Any, ""]  # largest `bad_in_a_row` ever: seen by who looks now and then
    spikes_in_a_row: Int[Any, ""]  # since the last update; with the steps after a complete row
    losses: Float[Any, " W"]  # cross-entropy of the last updates, oldest first, nats
    filled: Int[Any, ""]  # how many of `losses` are real, the last ones


def fresh(window: int = WINDOW) -> GuardState:
    """Nothing seen yet; arrays of their own each, to be donated.

    Args:
        window: losses that a spike is measured against.
    """

    def zero() -> Int[Array, ""]:
        return jax.device_put(np.zeros((), np.int32))  # compiles nothing, as jnp.zeros would

    losses = jax.device_put(np.zeros(window, np.float32))
    return GuardState(zero(), zero(), zero(), zero(), losses, zero())


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether no number of a tree is infinite or NaN; leaves of whole numbers always pass."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    found = jnp.asarray(True)
    for leaf in leaves:
        found &= jnp.isfinite(leaf).all()
    return found


def is_spike(
    guard: GuardState,
    loss: Float[Array, ""],
    finite: Bool[Array, ""],
    sigmas: Scalar,
    complete: Scalar,
) -> Bool[Array, ""]:
    """Whether a step counts as a spike.

    One that is not finite counts as that alone, but for those after a complete row.

    Args:
        guard: before the step.
        loss: cross-entropy of the batch, nats; a spike if it is more than `sigmas` standard
            deviations above the mean of a full window.
        finite: whether loss, gradients and update are.
        sigmas: may be traced.
        complete: spikes in a row from which on every step counts as one; may be traced.
    """
    bound = guard.losses.mean() + sigmas * guard.losses.std()
    above = (guard.filled >= guard.losses.shape[0]) & (loss > bound)
    return (finite & above) | (guard.spikes_in_a_row >= complete)


def keep(applied: Bool[Array, ""], new: Tree, old: Tree) -> Tree:
    """`new` if the update is applied, else `old`, leaf by leaf."""
    return jax.tree.map(lambda n, o: jnp.where(applied, n, o), new, old)


def advance(
    guard: GuardState, loss: Float[Array, ""], finite: Bool[Array, ""], spike: Bool[Array, ""]
) -> GuardState:
    """The counters after a step.

    Only an update ends a row: a step that is not finite between two spikes belongs to their row.

    Args:
        guard: before the step.
        loss: cross-entropy of the batch, nats; enters the window if the update is applied.
        finite: whether loss, gradients and update are.
        spike: whether the step counts as one, as `is_spike` says.
    """
    applied = finite & ~spike
    bad = jnp.where(applied, 0, guard.bad_in_a_row + (~finite & ~spike))
    spikes = jnp.where(applied, 0, guard.spikes_in_a_row + spike)
    moved = jnp.concatenate([guard.losses[1:], loss[None]])
    return GuardState(
        skipped=guard.skipped + ~applied,
        bad_in_a_row=bad,
        longest_bad=jnp.maximum(guard.longest_bad, bad),
        spikes_in_a_row=spikes,
        losses=jnp.where(applied, moved, guard.losses),
        filled=jnp.minimum(guard.filled + applied, guard.losses.shape[0]),
    )


def rested(guard: GuardState) -> GuardState:
    """The same without the row of steps that had no update: the data goes on elsewhere."""
    return guard._replace(
        bad_in_a_row=guard.bad_in_a_row * 0, spikes_in_a_row=guard.spikes_in_a_row * 0
    )
