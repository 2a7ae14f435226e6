import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import ConfigError
from moe.routing import relu
from tests.routing.cases import random_logits, report_of

E, K = 8, 2
LOGITS = random_logits((2, 6, E))
VALID = np.ones((2, 6), bool)
STATE = {"lambda": jnp.float32(0.25)}


@functools.partial(jax.jit, static_argnames=("k", "k_max"))
def _route(logits, valid, state, k, k_max):
    return relu.route(logits, valid, k=k, state=state, k_max=k_max)


def route(logits, valid=VALID, k_max=0):
    return _route(jnp.asarray(logits), jnp.asarray(valid), STATE, K, k_max)


def dense(plan):
    """Gates by expert, `[B S E]`."""
    hits = jax.nn.one_hot(plan.expert, E) * plan.valid[..., None]
    return (hits * plan.gate[..., None]).sum(axis=-2)


def test_gates_are_the_positive_logits():
    plan = route(LOGITS).plan
    np.testing.assert_allclose(dense(plan), np.maximum(LOGITS, 0), rtol=1e-6)
    np.testing.assert_array_equal(plan.valid.sum(-1), (LOGITS > 0).sum(-1))
    assert not np.asarray(plan.gate)[~np.asarray(plan.valid)].any()
    assert (np.diff(plan.gate, axis=-1) <= 0).all()  # the best comes first


def test_a_token_without_a_positive_logit_has_no_expert():
    plan = route(-np.abs(LOGITS)).plan
    assert not plan.valid.any()
    assert not plan.gate.any()


def test_k_max_keeps_the_largest_gates():
    plan = route(LOGITS, k_max=2).plan
    assert plan.expert.shape[-1] == 2
    best = np.sort(np.maximum(LOGITS, 0), axis=-1)[..., :-3:-1]
    np.testing.assert_allclose(plan.gate, best, rtol=1e-6)


def test_gates_are_continuous_where_experts_come_and_go():
    line = np.linspace(LOGITS[0, 0], -LOGITS[0, 0], 401, dtype=np.float32)[None]  # all cross 0
    gates = np.asarray(dense(route(line, np.ones((1, 401), bool)).plan))[0]
    step = np.abs(np.diff(line[0], axis=0)).max()
    assert np.abs(np.diff(gates, axis=0)).max() <= step * 1.001


def test_gradient_passes_active_gates_only():
    weight = random_logits((2, 6, E), seed=3)
    gradient = jax.grad(lambda x: (dense(route(x).plan) * weight).sum())(jnp.asarray(LOGITS))
    np.testing.assert_allclose(gradient, np.where(LOGITS > 0, weight, 0.0), rtol=1e-6)


def test_terms_carry_lambda_load_and_the_number_of_experts():
    terms = route(LOGITS).terms
    np.testing.assert_allclose(terms["relu_l1"], 0.25 * np.maximum(LOGITS, 0), rtol=1e-6)
    np.testing.assert_allclose(terms["relu_load"], (LOGITS > 0) * E / K)
    np.testing.assert_array_equal(terms["active"], (LOGITS > 0).sum(-1))

    def total(state):
        routing = relu.route(jnp.asarray(LOGITS), jnp.asarray(VALID), k=K, state=state)
        return sum(x.sum() for x in routing.terms.values()) + routing.plan.gate.sum()

    assert not jax.grad(total)(STATE)["lambda"]


def test_probs_rank_like_logits_and_see_a_shift():
    probs = route(LOGITS).probs
    np.testing.assert_array_equal(np.argsort(probs), np.argsort(LOGITS))
    softplus = np.log1p(np.exp(LOGITS.astype(np.float64)))
    np.testing.assert_allclose(probs, softplus / softplus.sum(-1, keepdims=True), rtol=1e-5)
    assert np.abs(route(LOGITS + 3).probs - probs).max() > 0.05


def test_probs_and_their_gradient_are_finite():
    logits = np.array([-1e4, -15.0, 0.0, 1e4], np.float32)[:, None, None] + np.arange(E)

    @jax.jit
    @jax.value_and_grad
    def first(x):
        return relu.smooth_probs(x)[..., 0].sum()

    value, gradient = first(jnp.asarray(logits, jnp.float32))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    assert (np.abs(gradient).max(axis=(1, 2)) > 1e-6).all()


def test_controller_raises_lambda_above_the_target_and_lowers_it_below():
    state = {"lambda": jnp.full(3, 1e-3)}
    tokens = jnp.asarray([100.0, 100.0, 100.0])
    active = np.array([[60] * E, [25] * E, [10] * E])  # of 100 tokens; the target is K/E: 25
    stats = {"relu_load": jnp.asarray(active * (E / K), jnp.float32)}
    new = relu.update_state(state, tokens, stats, lambda_factor=1.2)["lambda"]
    np.testing.assert_allclose(new, [1.2e-3, 1e-3, 1e-3 / 1.2], rtol=1e-5)


def test_controller_waits_without_tokens_and_never_reaches_zero():
    stats = {"relu_load": jnp.zeros(E)}
    still = relu.update_state({"lambda": jnp.float32(1e-8)}, jnp.float32(0), stats)
    np.testing.assert_array_equal(still["lambda"], np.float32(1e-8))
    state = {"lambda": jnp.float32(1e-8)}
    for _ in range(80):
        state = relu.update_state(state, jnp.float32(10), stats)
    np.testing.assert_allclose(state["lambda"], relu.LAMBDA_RANGE[0])


def test_the_loop_of_penalty_and_controller_settles_at_the_target():
    target = jnp.asarray(np.random.default_rng(0).normal(0.5, 1.0, (1, 64, E)), jnp.float32)
    valid = jnp.ones((1, 64), bool)

    def step(carry, _):
        logits, state = carry

        def loss(x):
            routing = relu.route(x, valid, k=K, state=state)
            fit = jnp.square(x - target).sum() / 2
            return fit + routing.terms["relu_l1"].sum(), routing

        gradient, routing = jax.grad(loss, has_aux=True)(logits)
        counts = {"relu_load": routing.terms["relu_load"].sum(axis=(0, 1))}
        state = relu.update_state(state, jnp.float32(64), counts, lambda_factor=1.05)
        return (logits - 0.5 * gradient, state), (routing.plan.valid.mean(), state["lambda"])

    start = (target, relu.init_state(E, 11, K, jax.random.key(0), lambda_init=1e-3))
    share, found = jax.jit(lambda c: jax.lax.scan(step, c, length=400)[1])(start)
    assert share[0] > 0.6
    np.testing.assert_allclose(share[-100:].mean(), K / E, atol=0.03)
    assert found[-1] > 0.1


def test_padding_counts_for_nothing():
    valid = np.arange(6) < np.array([[6], [3]])
    routing = route(LOGITS, valid)
    assert not np.asarray(routing.plan.valid)[~valid].any()
    assert not np.asarray(routing.plan.gate)[~valid].any()
    terms = report_of(jax.device_get(routing), valid).row_terms
    expected = (LOGITS > 0)[1, :3].sum(0) * E / K
    np.testing.assert_allclose(terms["relu_load"][1], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k_max": 9}, r"k_max=9 must be between 1 and model\.num_experts=8"),
        ({"k_max": 1}, r"k_max=1 is below router\.k=2"),
        ({"lambda_init": 0.0}, r"lambda_init=0\.0 .* 0 stays 0"),
        ({"lambda_factor": 1.0}, r"lambda_factor=1\.0 must be above 1"),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        relu.check(E, k=K, **options)
