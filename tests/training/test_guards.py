"""Guards in the step: what is not finite or spikes changes nothing, and what is clean is not touched."""

import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.data.types import Batch
from moe.training import guards
from moe.training.prior_update import Ablations, update_prior
from moe.training.state import TrainState
from moe.training.step import StepMetrics, train_step
from tests import tiny
from tests.training.test_step import DEEPSEEK, KEY, Step, hyper, make_step

WINDOW = 4
# State beside the parameters; smooth enough that four losses say what a spike is.
STEP = (
    *DEEPSEEK,
    f"guards.window={WINDOW}",
    "guards.spike_sigmas=6.0",
    "optimizer.learning_rate=1e-3",
)


def make() -> Step:
    return make_step(*STEP)


def on_host(tree: Any) -> Any:
    return jax.tree.map(np.asarray, jax.device_get(tree))


def assert_same(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


def differ(one: Any, other: Any) -> bool:
    return any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), one, other)))


def learned(state: TrainState) -> tuple:
    return on_host((state.params, state.router, state.optimizer))


def wrong_targets(batch: Batch) -> Batch:
    return batch._replace(targets=(batch.targets + tiny.VOCAB // 2) % tiny.VOCAB)


BAD = {
    "loss": {"z": np.nan},
    "infinite loss": {"z": np.inf},
    "gradients": {"z": 1e37},  # the loss is finite, squares of its gradients are not
    "update": {"learning_rate": 3e38, "clip_norm": 1e30},  # loss and gradients are finite
    "rate": {"learning_rate": np.nan},
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_not_finite_changes_nothing_and_is_counted(kind):
    step, batch = make(), tiny.batch()
    state, _ = step(step.state(), batch)
    before, window = learned(state), on_host(state.guard.losses)
    state, told = step(state, batch, **BAD[kind])
    told = on_host(told)
    if kind in ("gradients", "update", "rate"):
        assert np.isfinite(told.losses["total"])
    if kind in ("update", "rate"):
        assert np.isfinite(told.grad_norm)
    assert not told.update_applied
    assert_same(learned(state), before)
    assert int(state.step) == 2, "the batch is used up"
    assert counters(told) == (1, 1, 1, 0)
    assert_same(on_host(state.guard), told.guard)
    assert_same(told.guard.losses, window)
    assert int(told.guard.filled) == 1
    for count in (2, 3):
        state, told = step(state, batch, **BAD[kind])
        assert counters(told) == (count, count, count, 0)
    assert_same(learned(state), before)
    state, told = step(state, batch)
    assert bool(told.update_applied)
    assert counters(told) == (3, 0, 3, 0), "the longest row is still seen"
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(learned(state)))
    assert differ(learned(state), before)


def counters(told: StepMetrics) -> tuple[int, ...]:
    return tuple(int(x) for x in told.guard[:4])


def test_a_spike_is_skipped_once_the_window_is_full():
    step, batch = make(), tiny.batch()
    bad, state = wrong_targets(batch), step.state()
    state, _ = step(state, batch)
    state, told = step(state, bad)
    assert bool(told.update_applied), "nothing is a spike before there are enough losses"
    for _ in range(WINDOW):
        state, told = step(state, batch, learning_rate=1e-6)  # the losses in the window are close
        assert bool(told.update_applied)
    before, window = learned(state), on_host(state.guard.losses)
    assert int(state.guard.filled) == WINDOW
    for count in (1, 2):
        state, told = step(state, bad, learning_rate=1e-6)
        assert counters(told) == (count, 0, 0, count)
        assert not bool(told.update_applied)
    assert_same(on_host(state.guard.losses), window)  # skipped losses do not enter
    state, told = step(state, bad, z=np.nan)
    assert counters(told) == (3, 1, 1, 2), "of one row with the spikes"
    assert_same(learned(state), before)
    state, told = step(state, bad, spike_sigmas=1e9)
    assert bool(told.update_applied), "how many sigmas is traced"
    assert counters(told) == (3, 0, 1, 0)
    assert_same(on_host(state.guard.losses), np.append(window[1:], told.losses["cross_entropy"]))
    assert step.run._cache_size() == 1


def test_spikes_can_be_left_alone():
    step = make_step(*DEEPSEEK, "guards.window=1", "guards.spike_sigmas=None")
    state, _ = step(step.state(), tiny.batch())
    _, told = step(state, wrong_targets(tiny.batch()))
    assert bool(told.update_applied)
    assert counters(told) == (0, 0, 0, 0)


@pytest.mark.parametrize("sigmas", [0.0, 2.0, 6.0])
def test_the_bound_is_mean_and_deviation_of_the_window(sigmas):
    losses = np.asarray([2.0, 2.5, 3.0, 2.25], np.float32)
    guard = guards.fresh(4)._replace(losses=jnp.asarray(losses), filled=jnp.int32(4))
    bound = losses.mean() + sigmas * losses.std()
    assert not is_spike(guard, bound - 1e-4, sigmas=sigmas)
    assert is_spike(guard, bound + 1e-4, sigmas=sigmas)
    assert not is_spike(guard, bound + 1e-4, finite=False, sigmas=sigmas)
    assert not is_spike(guard._replace(filled=jnp.int32(3)), 99.0, sigmas=sigmas)


def is_spike(guard: guards.GuardState, loss: float, *, finite: bool = True, sigmas=6.0) -> bool:
    return bool(guards.is_spike(guard, jnp.float32(loss), jnp.asarray(finite), sigmas, 3))


LOW, HIGH, BROKEN = (
    (2.0, True),
    (9.0, True),
    (9.0, False),
)  # loss of a step, and whether it is finite


@pytest.mark.parametrize(
    ("steps", "expected"),  # skipped, bad in a row, longest such row, spikes in a row
    [
        ([HIGH, HIGH, LOW], (2, 0, 0, 0)),
        ([HIGH, BROKEN, HIGH, LOW, HIGH], (4, 0, 1, 1)),
        ([BROKEN, BROKEN, LOW, BROKEN], (3, 1, 2, 0)),
        ([HIGH, HIGH, HIGH], (3, 0, 0, 3)),
        ([HIGH, HIGH, HIGH, LOW, HIGH, LOW], (6, 0, 0, 6)),  # complete: it ends by itself no more
        ([HIGH, HIGH, BROKEN, HIGH, BROKEN, LOW, BROKEN], (7, 1, 1, 6)),
        ([BROKEN, BROKEN, HIGH, HIGH, BROKEN, LOW], (5, 0, 3, 0)),
    ],
)
def test_what_ends_a_row(steps, expected):
    window = jnp.asarray([2.0, 2.5, 3.0, 2.25])
    guard = guards.fresh(4)._replace(losses=window, filled=jnp.int32(4))
    for loss, finite in steps:
        spike = jnp.asarray(is_spike(guard, loss, finite=finite))
        before, guard = guard, guards.advance(guard, jnp.float32(loss), jnp.asarray(finite), spike)
        if guard.skipped > before.skipped:
            assert_same(on_host(guard.losses), on_host(before.losses))
    assert tuple(int(count) for count in guard[:4]) == expected
    assert int(guard.filled) == len(window)
    assert counts_after_rest(guard) == (*expected[:1], 0, expected[2], 0)


def counts_after_rest(guard: guards.GuardState) -> tuple[int, ...]:
    return tuple(int(count) for count in guards.rested(guard)[:4])


def test_one_bad_microbatch_skips_the_whole_step():
    """Row 1 is of the second microbatch; a mask makes nothing of it, its weight everything."""
    step = make_step(*STEP, "optimizer.accumulation=2", "data.batch_size=4")
    batch = tiny.batch(((16,), (7, 6), (3,), (5,)))
    state, _ = step(step.state(), batch)
    before = learned(state)
    # An id that only the second microbatch has, with an embedding that is not finite.
    tokens = np.where(np.asarray(batch.tokens) == 0, 1, np.asarray(batch.tokens))
    tokens[1, 0] = 0
    odd = batch._replace(tokens=jnp.asarray(tokens))
    embedding = state.params["embedding"]
    name = next(iter(embedding)) if isinstance(embedding, dict) else None
    table = embedding[name] if name else embedding
    poisoned = table.at[0].set(jnp.nan)
    params = {**state.params, "embedding": {name: poisoned} if name else poisoned}
    wanted = on_host(params)
    state, told = step(state._replace(params=params), odd)
    assert not bool(told.update_applied)
    assert counters(told) == (1, 1, 1, 0)
    assert_same(on_host(state.params), wanted)
    assert_same(learned(state)[1:], before[1:])


def test_a_clean_run_is_the_same_to_the_last_bit_without_guards():
    step = make()
    numbers = jax.tree.map(np.float32, hyper(step.config))
    with mock.patch.multiple(
        guards,
        all_finite=lambda tree: jnp.asarray(True),
        is_spike=lambda *arguments: jnp.asarray(False),
    ):
        # A function of its own: what was traced for the other is not taken for this.
        bare = jax.jit(functools.partial(train_step, step.plan), donate_argnums=0)
        bare = bare.lower(step.state(), tiny.batch(), KEY, numbers).compile()
    told = []
    for run in (bare, step.run):
        state, losses = step.state(), []
        for _ in range(4):
            state, found = run(state, tiny.batch(), KEY, numbers)
            losses.append(np.asarray(found.losses["total"]).tobytes())
        told.append((losses, learned(state)))
    assert told[0][0] == told[1][0]
    assert_same(told[0][1], told[1][1])


def test_whole_numbers_and_nothing_are_finite():
    assert bool(guards.all_finite({"a": jnp.int32(3), "b": {}}))
    odd = jnp.asarray([1.0, jnp.inf])
    assert not bool(guards.all_finite((jnp.ones(3), odd)))
    assert not bool(guards.all_finite((odd, jnp.ones(3))))
    assert not bool(guards.all_finite(jnp.asarray(jnp.nan, jnp.bfloat16)))


def test_what_a_step_tells_outlives_the_next_step():
    """The state is donated; its counters are told in buffers of their own."""
    step = make()
    state, first = step(step.state(), tiny.batch())
    step(state, tiny.batch())
    assert counters(first) == (0, 0, 0, 0)


def test_a_round_of_the_prior_that_is_not_finite_changes_nothing():
    step = make_step("router.name=prior")
    spec, router = step.model.spec, step.model.router
    layers, experts = spec.sparse_layers, spec.all_experts
    without = jnp.linspace(1.0, 2.0, layers * experts).reshape(layers, experts)
    good = Ablations(jnp.float32(1.0), without, jnp.float32(4.0))
    new = update_prior(spec, router, good, rate=0.5, floor=0.05)
    assert differ(new, router)
    for value in (jnp.inf, jnp.nan):
        bad = good._replace(nll_without=without.at[0, 0].set(value))
        assert_same(on_host(update_prior(spec, router, bad, rate=0.5, floor=0.05)), on_host(router))
