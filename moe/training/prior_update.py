"""The prior over experts, moved now and then by how well each expert does on held-out text.

For routers whose state has a `log_prior` (`moe.routing.prior`). The text is the split
`router_valid`, which is neither trained on nor reported. An expert's reward is what the split's
cross-entropy loses when that expert of that layer is ruled out and its tokens go to the others:
L x E + 1 forward passes over each batch, one after the other and in the form of evaluation.

An update depends on the step and the state alone, so that a run that goes on repeats it bit for bit.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key
import numpy as np

from moe.data.types import Batch
from moe.dispatch.types import Dispatch
from moe.model.layer import Call
from moe.model.spec import ModelSpec
from moe.routing.prior import RULED_OUT, ablation_rewards, set_prior
from moe.routing.router import Router, pick_inputs
from moe.routing.table import ROUTERS
from moe.routing.types import Scalar
from moe.training import guards
from moe.training.objective import forward, predictions
from moe.training.state import Skeleton

LOG_PRIOR = "log_prior"


class Ablations(NamedTuple):
    """Sums over valid predictions of one or more batches."""

    nll: Float[Any, ""]  # of the model as it is, nats
    nll_without: Float[Any, "L E"]  # with one expert of one layer ruled out
    predictions: Float[Any, ""]


AblationStep = Callable[[Any, Any, Batch, Key[Array, ""]], Ablations]


@functools.cache
def routers_with_prior() -> tuple[str, ...]:
    """Names of the routers whose state has a prior over experts."""
    facts = {"num_experts": 4, "vocab_size": 4, "width": 4, "k": 1}

    def made(row: Router) -> Any:
        def init() -> Any:  # the key is made in here, where it is only traced
            known = facts | {"key": jax.random.key(0)}
            return row.init_state(**pick_inputs(row.init_state, known))

        return jax.eval_shape(init)

    return tuple(n for n, row in ROUTERS.items() if row.stateful and LOG_PRIOR in made(row))


def make_ablation_step(
    spec: ModelSpec, skeleton: Skeleton, dispatch: Dispatch, token_bytes: Int[Array, " V"]
) -> AblationStep:
    """Builds `(params, router state, batch, key) -> sums`; jit it.

    Args:
        spec: of a model whose router has a prior.
        skeleton: its shapes.
        dispatch: how tokens reach experts, as in evaluation.
        token_bytes: bytes that each id stands for.
    """
    L, E = spec.sparse_layers, spec.all_experts

    def step(params: Any, router: Any, batch: Batch, key: Key[Array, ""]) -> Ablations:
        call = Call(batch.tokens, batch.valid, dispatch, key=key)

        def nll(number: Int[Array, ""]) -> Float[Array, ""]:
            ruled_out = (jnp.arange(L * E) == number).reshape(L, E)  # none of them for L * E
            masked = _with_prior(
                spec,
                router,
                lambda state, mine: {
                    **state,
                    LOG_PRIOR: jnp.where(mine, RULED_OUT, state[LOG_PRIOR]),
                },
                ruled_out,
            )
            return forward(skeleton, params, masked, batch, call, token_bytes).rows.nll.sum()

        found = jax.lax.map(nll, jnp.arange(L * E + 1))
        total = predictions(batch, spec.output)
        return Ablations(found[-1], found[:-1].reshape(L, E), total)

    return step


def add(a: Ablations, b: Ablations) -> Ablations:
    """The sums of two batches."""
    return jax.tree.map(jnp.add, a, b)


def update_prior(
    spec: ModelSpec, router: Any, sums: Ablations, *, rate: Scalar, floor: Scalar
) -> Any:
    """The router state after one round of Hedge in every sparse layer.

    A round whose result is not finite, as with an infinite loss of one expert's absence, changes nothing.

    Args:
        spec: of the model.
        router: pure dict of router state.
        sums: over the batches of this round.
        rate: step size.
        floor: share of the uniform distribution mixed in.
    """
    total = jnp.maximum(sums.predictions, 1.0)
    rewards = ablation_rewards(
        jnp.broadcast_to(sums.nll / total, (spec.sparse_layers,)), sums.nll_without / total
    )
    new = _with_prior(
        spec, router, lambda state, mine: set_prior(state, mine, rate, floor), rewards
    )
    return guards.keep(guards.all_finite(new), new, router)


def _with_prior(
    spec: ModelSpec,
    router: Any,
    change: Callable[[dict[str, Array], Array], dict[str, Array]],
    by_layer: Array,
) -> Any:
    """Applies `change(state, its rows of by_layer [L E])` to the state of every sparse layer."""
    names = spec.sparse_names
    by_turn = by_layer.reshape(spec.repeats, len(names), -1)
    blocks = dict(router["blocks"])
    for j, (block, module) in enumerate(names):
        layer = blocks[block]
        state = change(layer[module]["state"], by_turn[:, j])
        blocks[block] = {**layer, module: {**layer[module], "state": state}}
    return {**router, "blocks": blocks}


class PriorUpdate(NamedTuple):
    """What the training loop needs for a round."""

    ablate: AblationStep  # compiled
    apply: Callable[..., Any]  # compiled: (router, sums, rate=, floor=) -> router
    batch: Callable[[int], Batch]  # of the split, by number, on devices
    key: Key[Array, ""]
    every: int
    batches: int
    rate: float
    floor: float

    def due(self, step: int) -> bool:
        """Whether there is a round after this optimiser step."""
        return step % self.every == 0

    def __call__(self, step: int, params: Any, router: Any) -> tuple[Any, dict[str, float]]:
        """One round after `step` optimiser steps.

        Rounds go through the split in order and start over at its end.

        Returns:
            The router state, and the record of the round: the cross-entropy that the experts were
            judged by, nats, and the spread of rewards.
        """
        first = (step // self.every - 1) * self.batches
        key = jax.random.fold_in(self.key, step)
        sums = None
        for number in range(self.batches):
            batch = self.batch(first + number)
            done = self.ablate(params, router, batch, jax.random.fold_in(key, number))
            sums = done if sums is None else add(sums, done)
        assert sums is not None
        numbers = {"rate": np.float32(self.rate), "floor": np.float32(self.floor)}
        new = self.apply(router, sums, **numbers)
        nll, without, total = (np.asarray(x, np.float64) for x in jax.device_get(sums))
        rewards = (without - nll) / max(float(total), 1.0)
        return new, {
            "loss/cross_entropy": float(nll / max(float(total), 1.0)),
            "routing/reward_mean": float(rewards.mean()),
            "routing/reward_spread": float(rewards.std(axis=-1).mean()),
        }
