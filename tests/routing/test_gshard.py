import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from moe.errors import ConfigError
from moe.routing import gshard, losses
from tests.routing.cases import GOLDEN_LOGITS, random_logits, stacked_report

DRAWS = 20_000


@functools.cache
def compiled(**options):
    return jax.jit(functools.partial(gshard.route, **options))


def routing(logits, valid=None, seed=None, **options):
    """In training with a seed, else in evaluation; NumPy in, NumPy out."""
    valid = np.ones(logits.shape[:2], bool) if valid is None else valid
    key = None if seed is None else jax.random.key(seed)
    threshold = jnp.float32(options.pop("threshold", 0.5))
    route = compiled(training=seed is not None, **options)
    return jax.device_get(
        route(jnp.asarray(logits), jnp.asarray(valid), key=key, threshold=threshold)
    )


def draws(policy, threshold=0.5):
    """The eight example tokens, each decided 20,000 times."""
    logits = np.repeat(GOLDEN_LOGITS, DRAWS, axis=0)
    return routing(logits, seed=3, policy=policy, threshold=threshold).plan


def second_gates():
    return routing(GOLDEN_LOGITS).plan.gate[0, :, 1]


def test_example_worked_out_in_float64():
    result = routing(GOLDEN_LOGITS)
    np.testing.assert_array_equal(result.plan.expert[0, :, 0], [0, 0, 0, 1, 2, 0, 3, 0])
    np.testing.assert_array_equal(result.plan.expert[0, :, 1], [1, 2, 3, 2, 0, 1, 0, 1])
    np.testing.assert_allclose(result.plan.gate[0, 0], [0.7311, 0.2689], atol=5e-5)
    keep = np.minimum(1, result.plan.gate[0, :, 1] / 0.5)
    expected = [0.5379, 0.7551, 0.2384, 0.5379, 0.5379, 0.9003, 0.4995, 0.8511]
    np.testing.assert_allclose(keep, expected, atol=5e-5)


def test_a_balance_loss_may_count_first_choices_only():
    report = stacked_report(routing(GOLDEN_LOGITS), np.ones((1, 8), bool))
    np.testing.assert_array_equal(report.row_first[0, 0], [5, 1, 1, 1])
    balance_loss = jax.jit(functools.partial(losses.balance_loss, counts="first"))
    loss = balance_loss(report, total_tokens=8)
    np.testing.assert_allclose(loss, 1.3113, atol=5e-5)


@pytest.mark.parametrize("policy", gshard.POLICIES)
def test_pairs_are_different_experts_with_falling_gates_that_sum_to_one(policy):
    plan = routing(random_logits((4, 16, 8)), seed=1, policy=policy, threshold=0.2).plan
    assert (plan.expert[..., 0] != plan.expert[..., 1]).all()
    assert (plan.gate[..., 0] >= plan.gate[..., 1]).all()
    assert plan.valid[..., 0].all()
    both = plan.valid.all(-1)
    assert both.any()
    np.testing.assert_allclose(plan.gate.sum(-1)[both], 1.0, rtol=1e-6)


@pytest.mark.parametrize("threshold", [0.5, 0.2])
def test_second_experts_are_kept_as_often_as_their_gate_says(threshold):
    kept = draws("random", threshold).valid[..., 1].mean(0)
    p = np.minimum(1, second_gates() / threshold)
    assert (np.abs(kept - p) <= 3 * np.sqrt(p * (1 - p) / DRAWS)).all()


def test_a_second_expert_left_out_does_not_raise_the_gate_of_the_first():
    plan = routing(GOLDEN_LOGITS, seed=0, policy="random", threshold=1e9).plan
    assert not plan.valid[..., 1].any()
    assert not plan.gate[..., 1].any()
    np.testing.assert_allclose(plan.gate[0, :, 0], 1 - second_gates(), rtol=1e-6)
    assert plan.gate[..., 0].max() < 1


def test_threshold_zero_keeps_every_second_expert():
    plans = [
        routing(GOLDEN_LOGITS, seed=0, policy=policy, threshold=0.0).plan
        for policy in ("all", "random", "threshold")
    ]
    for plan in plans[1:]:
        jax.tree.map(np.testing.assert_array_equal, plan, plans[0])


def test_threshold_keeps_gates_above_it():
    plan = routing(GOLDEN_LOGITS, seed=0, policy="threshold", threshold=0.3).plan
    np.testing.assert_array_equal(plan.valid[0, :, 1], second_gates() > 0.3)
    assert 0 < plan.valid[..., 1].sum() < 8


def test_sampled_second_experts_follow_the_probabilities_of_the_others():
    plan = draws("sampling")
    probs = np.exp(GOLDEN_LOGITS[0].astype(np.float64))
    for t, first in enumerate(GOLDEN_LOGITS[0].argmax(-1)):
        assert (plan.expert[:, t, 0] == first).all()
        others = np.delete(np.arange(4), first)
        counts = np.bincount(plan.expert[:, t, 1], minlength=4)
        assert counts[first] == 0
        expected = DRAWS * probs[t, others] / probs[t, others].sum()
        assert stats.chisquare(counts[others], expected).pvalue > 1e-4
    pair = np.take_along_axis(np.broadcast_to(probs, (DRAWS, 8, 4)), plan.expert, -1)
    np.testing.assert_allclose(plan.gate, pair / pair.sum(-1, keepdims=True), rtol=1e-5)


def test_evaluation_draws_nothing_and_keeps_all_by_default():
    for policy in gshard.POLICIES:
        plan = routing(GOLDEN_LOGITS, policy=policy).plan
        jax.tree.map(np.testing.assert_array_equal, plan, routing(GOLDEN_LOGITS).plan)
        assert plan.valid.all()
    plan = routing(GOLDEN_LOGITS, eval_policy="threshold", threshold=0.3).plan
    np.testing.assert_array_equal(plan.valid[0, :, 1], second_gates() > 0.3)


@pytest.mark.parametrize("policy", ["random", "sampling"])
def test_drawing_without_a_key_is_an_error(policy):
    with pytest.raises(ValueError, match=f"{policy}.* draws: pass a key"):
        gshard.route(jnp.zeros((1, 1, 4)), jnp.ones((1, 1), bool), training=True, policy=policy)


@pytest.mark.parametrize("policy", gshard.POLICIES)
def test_extreme_logits_and_padding(policy):
    logits = np.sign(random_logits((2, 6, 4))) * np.float32(1e4)
    valid = np.arange(6) < np.array([[6], [2]])
    result = routing(logits, valid, seed=2, policy=policy, threshold=0.2)
    assert all(np.isfinite(x).all() for x in (result.probs, result.plan.gate))
    assert not result.plan.valid[~valid].any()
    assert not result.plan.gate[~valid].any()
    assert (result.plan.valid[valid][:, 0]).all()


@pytest.mark.parametrize("policy", ["random", "sampling"])
def test_gradient_in_training_is_that_of_the_kept_gates(policy):
    logits = random_logits((1, 16, 4))
    weight = np.random.default_rng(0).normal(size=(1, 16, 2)).astype(np.float32)
    plan = routing(logits, seed=4, policy=policy, threshold=0.4).plan

    @jax.jit
    @jax.grad
    def slope_of(x):
        route = compiled(training=True, policy=policy)
        out = route(x, jnp.ones((1, 16), bool), key=jax.random.key(4), threshold=0.4)
        return (out.plan.gate * weight).sum()

    gradient = np.asarray(slope_of(jnp.asarray(logits)))
    chosen = np.take_along_axis(logits, plan.expert, -1)
    g2 = 1 / (1 + np.exp(chosen[..., 0] - chosen[..., 1]))
    kept = np.where(plan.valid, weight, 0.0)
    slope = (kept[..., 0] - kept[..., 1]) * g2 * (1 - g2)  # with respect to the first logit
    expected = np.zeros_like(logits)
    np.put_along_axis(expected, plan.expert, np.stack([slope, -slope], -1), -1)
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 1}, r"router\.k=1 .*router\.k=2"),
        ({"k": 3}, r"router\.k=3 .*two experts"),
        ({"policy": "never"}, "'never' is not one of all, threshold, random, sampling"),
        ({"eval_policy": "random"}, "eval_policy='random' .* evaluation draws nothing"),
        ({"threshold": -0.1}, r"threshold=-0\.1 must not be negative"),
        ({"policy": "threshold"}, r"threshold=0\.5 .* leaves out every second"),
        ({"eval_policy": "threshold", "threshold": 0.7}, "leaves out every second"),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        gshard.check(8, **{"k": 2, **options})
    gshard.check(8, k=2)
