import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from moe.errors import ConfigError
from moe.routing import sinkhorn
from moe.routing.sinkhorn import ROUTER
from tests.routing.cases import GOLDEN_LOGITS, random_logits

LOGITS = random_logits((3, 8, 4))


@functools.cache
def compiled(k, training, options):
    return jax.jit(functools.partial(sinkhorn.route, k=k, training=training, **dict(options)))


def route(logits, valid=None, *, k=1, training=True, **options):
    valid = np.ones(logits.shape[:2], bool) if valid is None else valid
    return jax.device_get(compiled(k, training, tuple(sorted(options.items())))(logits, valid))


def plan(scores, valid=None, iterations=30):
    valid = np.ones(scores.shape[:2], bool) if valid is None else valid
    run = jax.jit(sinkhorn.log_plan, static_argnums=2)
    return np.exp(np.asarray(run(scores, valid, iterations), np.float64))


def by_hand(scores, iterations):
    """The iteration of the paper, without logarithms, in float64."""
    kernel = np.exp(scores.astype(np.float64))
    T, E = kernel.shape
    v = np.ones(E)
    for _ in range(iterations):
        u = (1 / T) / (kernel @ v)
        v = (1 / E) / (kernel.T @ u)
    return u[:, None] * kernel * v


def test_example_worked_out_in_float64():
    shares = plan(GOLDEN_LOGITS, iterations=100)[0]
    np.testing.assert_allclose(8 * shares[0], [0.4536, 0.3175, 0.1426, 0.0863], atol=5e-5)
    expert = route(GOLDEN_LOGITS, iterations=100).plan.expert[0, :, 0]
    np.testing.assert_array_equal(np.bincount(expert), 2)


@pytest.mark.parametrize("iterations", [1, 2, 7])
def test_logarithms_change_nothing(iterations):
    for row, shares in zip(LOGITS, plan(LOGITS, iterations=iterations), strict=True):
        np.testing.assert_allclose(shares, by_hand(row, iterations), rtol=1e-4)


def test_columns_are_exact_and_rows_converge():
    logits = 1.5 * random_logits((4, 64, 8))  # 3 N(0, 1)
    errors = []
    for iterations in (5, 10, 30):
        shares = plan(logits, iterations=iterations)
        np.testing.assert_allclose(shares.sum(axis=1), 1 / 8, rtol=1e-4)
        errors.append(np.abs(64 * shares.sum(axis=2) - 1).max())
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < 5e-3


def test_plan_does_not_see_a_shift_of_a_token_or_of_an_expert():
    shifted = LOGITS + random_logits((3, 8, 1), seed=3) + random_logits((3, 1, 4), seed=4)
    np.testing.assert_allclose(
        plan(shifted, iterations=100), plan(LOGITS, iterations=100), rtol=1e-3, atol=1e-7
    )


def test_plan_survives_huge_logits():
    for logits in (np.sign(LOGITS) * np.float32(1e4), np.full((3, 8, 4), -1e4, np.float32)):
        shares = plan(logits)
        assert np.isfinite(shares).all()
        assert np.isfinite(route(logits).plan.gate).all()
    np.testing.assert_allclose(shares, 1 / 32, rtol=1e-3)


def test_loads_are_more_even_than_those_of_the_largest_logit():
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(100, 64, 8)) + rng.normal(size=(100, 1, 8))).astype(np.float32)

    def variation(training):
        expert = route(logits, training=training).plan.expert[..., 0]
        load = (expert[..., None] == np.arange(8)).sum(axis=1)
        return load.std(axis=-1) / load.mean(axis=-1)

    balanced, greedy = variation(True), variation(False)
    assert (balanced < greedy).all()
    assert balanced.mean() < 0.25 * greedy.mean()


@pytest.mark.parametrize("training", [True, False])
def test_gates_come_from_the_logits_as_they_are(training):
    one, two = (route(LOGITS, k=k, training=training) for k in (1, 2))
    raw = np.take_along_axis(LOGITS, one.plan.expert, -1)
    np.testing.assert_allclose(one.plan.gate, 1 / (1 + np.exp(-raw)), rtol=1e-5)
    probs = softmax(LOGITS.astype(np.float64), -1)
    raw = np.take_along_axis(probs, two.plan.expert, -1)
    np.testing.assert_allclose(two.plan.gate, raw, rtol=1e-5)
    shares = plan(LOGITS) if training else LOGITS
    np.testing.assert_array_equal(two.plan.expert, np.argsort(-shares, -1)[..., :2])


def test_no_gradient_passes_the_plan():
    valid = jnp.ones((3, 8), bool)
    expert = route(LOGITS, k=2).plan.expert

    def gates(x):
        return sinkhorn.route(x, valid, k=2).plan.gate.sum()

    def expected(x):
        return jnp.take_along_axis(jax.nn.softmax(x), jnp.asarray(expert), -1).sum()

    a, b = (jax.jit(jax.grad(f))(jnp.asarray(LOGITS)) for f in (gates, expected))
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)
    assert np.abs(a).max() > 1e-3


def test_padding_takes_no_share():
    logits = LOGITS.copy()
    logits[:, 5:] = 50.0
    valid = np.arange(8) < np.array([[5], [5], [0]])
    padded = route(logits, valid)
    cut = route(LOGITS[:2, :5])
    np.testing.assert_array_equal(padded.plan.expert[:2, :5], cut.plan.expert)
    np.testing.assert_allclose(plan(logits, valid)[:2, :5], plan(LOGITS[:2, :5]), rtol=1e-4)
    assert not padded.plan.gate[~valid].any()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(padded))


def test_later_tokens_change_training_and_never_evaluation():
    assert ROUTER.causality == "C3"
    assert ROUTER.causal_in_eval
    leaked = False
    for t in range(7):
        changed = np.concatenate([LOGITS[:, : t + 1], -3 * LOGITS[:, t + 1 :]], axis=1)
        a, b = (route(x).plan.expert[:, : t + 1] for x in (LOGITS, changed))
        leaked |= bool((a != b).any())
        a, b = (route(x, training=False).plan for x in (LOGITS, changed))
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x[:, : t + 1], y[:, : t + 1])
    assert leaked


def test_rows_of_the_batch_do_not_see_each_other():
    other = np.concatenate([LOGITS[:1], -LOGITS[1:]])
    for x, y in zip(route(LOGITS).plan, route(other).plan, strict=True):
        np.testing.assert_array_equal(x[0], y[0])


def test_options_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match=r"temperature=0\.0 must be above 0"):
        sinkhorn.check(8, k=1, temperature=0.0)
    with pytest.raises(ConfigError, match="iterations=0 must be at least 1"):
        sinkhorn.check(8, k=1, iterations=0)
