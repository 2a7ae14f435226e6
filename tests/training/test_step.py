"""The optimiser step: it learns, microbatches change nothing, its numbers are traced."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.config import ConfigDict
from moe.data.types import Batch
from moe.dispatch.reference import reference
from moe.routing.balance import update_bias
from moe.routing.loss_table import LOSSES, active_losses
from moe.routing.router import pick_options
from moe.routing.table import ROUTERS
from moe.training import guards, optimizer
from moe.training.state import TrainState
from moe.training.step import Hyper, Plan, StepMetrics, train_step
from tests import tiny

KEY = jax.random.key(5)
DEEPSEEK = ("router.name=deepseek_v3", "router.bias_rate=0.1", "losses.sequence_balance=0.01")
SMALL = ("model.num_layers=1", "model.num_experts=4", "optimizer.warmup_steps=1")


class Step(NamedTuple):
    config: ConfigDict
    model: tiny.Model
    plan: Plan
    run: Any  # jitted, donates the state

    def state(self) -> TrainState:
        """A fresh copy, to be donated."""
        params, router = jax.tree.map(jnp.copy, (self.model.params, self.model.router))
        moments = self.plan.transformation.init(params)
        return TrainState(
            jnp.int32(0), params, router, moments, guards.fresh(self.config.guards.window)
        )

    def __call__(
        self, state: TrainState, batch: Batch, **changes: Any
    ) -> tuple[TrainState, StepMetrics]:
        values = hyper(self.config)
        weights = {name: changes.pop(name) for name in list(changes) if name in values.losses}
        values = values._replace(losses=values.losses | weights, **changes)
        return self.run(state, batch, KEY, jax.tree.map(np.float32, values))


def hyper(config: ConfigDict) -> Hyper:
    options = pick_options(ROUTERS[config.router.name].update_state, config.router.to_dict())
    o, weights = config.optimizer, config.losses
    return Hyper(
        learning_rate=o.learning_rate,
        weight_decay=o.weight_decay,
        clip_norm=o.clip_norm,
        losses={name: weights[name] for name in LOSSES},
        jitter=config.router.jitter,
        dropout=config.model.dropout,
        update_options=options,
        spike_sigmas=config.guards.spike_sigmas or 0.0,
        spikes=config.guards.spikes,
    )


@functools.cache
def make_step(*overrides: str) -> Step:
    config, model = tiny.config(*SMALL, *overrides), tiny.model(*SMALL, *overrides)
    o = config.optimizer
    plan = Plan(
        model.spec,
        model.skeleton,
        reference,
        optimizer.adam(b1=o.b1, b2=o.b2, eps=o.eps),
        optimizer.schedule(
            kind="constant", steps=100, warmup_steps=1, decay_fraction=0.2, final_fraction=0.1
        ),
        optimizer.decay_mask(model.skeleton.params),
        jnp.ones(tiny.VOCAB, jnp.int32),
        losses=active_losses(config.losses.to_dict(), learned=model.spec.learns_routing),
        accumulation=o.accumulation,
        jitter=config.router.jitter > 0,
        spikes=config.guards.spike_sigmas is not None,
    )
    run = jax.jit(functools.partial(train_step, plan), donate_argnums=0)
    return Step(config, model, plan, run)


def test_loss_falls_on_a_repeated_batch_with_one_executable_for_all_numbers():
    step, batch = make_step(*DEEPSEEK), tiny.batch()
    first = step.state()
    state, told = step(first, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first)), "the state is donated"
    start = float(told.losses["cross_entropy"])
    for index in range(1, 25):
        rate = 0.01 if index % 2 else 0.02
        state, told = step(state, batch, learning_rate=rate, z=0.001 * index, dropout=0.0)
        assert float(told.learning_rate) == pytest.approx(rate)
    assert int(state.step) == 25
    assert float(told.losses["cross_entropy"]) < 0.5 * start
    assert step.run._cache_size() == 1


def test_total_is_the_weighted_sum_of_the_terms():
    step = make_step(*DEEPSEEK)
    weights = {"balance": 0.5, "sequence_balance": 0.25, "z": 0.125}
    _, told = step(step.state(), tiny.batch(), **weights)
    terms = {name: float(value) for name, value in told.losses.items()}
    expected = terms["cross_entropy"] + sum(weights[name] * terms[name] for name in weights)
    assert terms["total"] == pytest.approx(expected, rel=1e-6)
    assert set(terms) == {"total", "cross_entropy", *weights}
    rows = told.rows
    assert terms["cross_entropy"] == pytest.approx(float(rows.nll / rows.tokens), rel=1e-6)
    assert float(rows.tokens) == tiny.batch().valid.sum()


def test_state_of_the_router_moves_once_a_step_by_the_global_counts():
    step = make_step(*DEEPSEEK)
    before = step.state()
    bias = jnp.copy(before.router["blocks"]["layer0"]["mlp"]["state"]["bias"])
    after, told = step(before, tiny.batch())
    moved = after.router["blocks"]["layer0"]["mlp"]["state"]["bias"]
    assert told.totals is not None
    counts = jnp.asarray(told.totals.requested)
    np.testing.assert_allclose(moved, update_bias(bias, counts, 0.1), rtol=1e-6)
    assert np.abs(moved - bias).max() == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize(("scope", "counts"), [("global", (1, 2, 4)), ("sequence", (1, 4))])
def test_microbatches_change_nothing(scope, counts):
    """Rows of different lengths, one of padding: means of microbatch means would differ."""
    batch = tiny.batch(((16,), (7, 6), (3,), ()))
    # A large eps makes Adam smooth: a rounding error stays one. The mean over microbatches of
    # unequal sizes is off by far more.
    common = (*DEEPSEEK, f"losses.balance_scope={scope}", "optimizer.eps=1e-2")
    results = {}
    for parts in counts:
        step = make_step(*common, f"optimizer.accumulation={parts}", "data.batch_size=4")
        results[parts] = step(step.state(), batch, balance=1.0, learning_rate=0.1)
    state, told = results[1]
    for parts in counts[1:]:
        other, said = results[parts]
        for one, two in ((other.params, state.params), (other.router, state.router)):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, two)
        for one, two in ((said.losses, told.losses), (said.totals, told.totals)):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one, two)
        np.testing.assert_allclose(said.grad_norm, told.grad_norm, rtol=1e-5)


@pytest.mark.parametrize("options", [("router.name=hash",), ("model.pattern=dense",)])
def test_what_has_no_gate_has_no_routing_loss(options):
    step = make_step(*options)
    before = step.state()
    table = jax.tree.map(np.asarray, before.router)
    after, told = step(before, tiny.batch(), balance=1.0)
    assert set(told.losses) == {"total", "cross_entropy"}
    assert float(told.losses["total"]) == float(told.losses["cross_entropy"])
    assert (told.totals is None) == ("model.pattern=dense" in options)
    jax.tree.map(np.testing.assert_array_equal, after.router, table)


def test_bfloat16_computes_and_float32_remembers():
    step, full = make_step(*DEEPSEEK, "model.dtype=bfloat16"), make_step(*DEEPSEEK)
    state, told = step(step.state(), tiny.batch())
    leaves = jax.tree.leaves((state.params, state.optimizer))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32"), jnp.dtype("int32")}
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    _, exact = full(full.state(), tiny.batch())
    loss = float(told.losses["cross_entropy"])
    assert loss != float(exact.losses["cross_entropy"])
    assert loss == pytest.approx(float(exact.losses["cross_entropy"]), rel=0.02)
