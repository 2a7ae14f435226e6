import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from moe.errors import ConfigError
from moe.routing import gumbel, topk
from tests.routing.cases import random_logits

N = 20000
KEY = jax.random.key(4)
LOGITS = np.array([1.0, 0.2, -0.5, 0.6, -1.5], np.float32)
P = np.exp(LOGITS.astype(np.float64))
P = P / P.sum()
E = len(P)


@functools.partial(jax.jit, static_argnames=("k", "options"))
def routed(logits, key, state, *, k, options):
    valid = jnp.ones(logits.shape[:2], bool)
    return gumbel.route(logits, valid, k=k, key=key, state=state, **dict(options))


def route(logits, k, key=KEY, state=None, **options):
    return jax.device_get(
        routed(jnp.asarray(logits), key, state, k=k, options=tuple(sorted(options.items())))
    )


@functools.cache
def draws(k, **options):
    """`N` tokens with the same logits."""
    return route(np.broadcast_to(LOGITS, (1, N, E)), k, **options)


def weights(plan):
    """The plan as weights [N E] of the experts."""
    return (np.eye(E)[plan.expert] * plan.gate[..., None]).sum(axis=2)[0]


def test_one_draw_follows_the_softmax():
    counts = np.bincount(draws(1, gates="raw").plan.expert.ravel(), minlength=E)
    assert chisquare(counts, N * P).pvalue > 1e-4


def test_two_draws_follow_plackett_luce():
    drawn = draws(2, gates="raw").plan.expert[0]
    pairs = list(itertools.permutations(range(E), 2))
    counts = [((drawn[:, 0] == a) & (drawn[:, 1] == b)).sum() for a, b in pairs]
    expected = np.array([P[a] * P[b] / (1 - P[a]) for a, b in pairs])
    np.testing.assert_allclose(expected.sum(), 1.0, rtol=1e-6)
    assert chisquare(counts, N * expected / expected.sum()).pvalue > 1e-4
    assert (drawn[:, 0] != drawn[:, 1]).all()


@pytest.mark.parametrize("options", [{}, {"greedy": 1}], ids=str)
@pytest.mark.parametrize("k", [2, 3])
def test_importance_weights_have_the_dense_mixture_as_their_mean(k, options):
    sampled = weights(draws(k, gates="importance", **options).plan)
    error = np.abs(sampled.mean(0) - P)
    assert (error < 5 * sampled.std(0) / np.sqrt(N) + 1e-6).all()


def test_raw_and_renormalized_gates_are_biased():
    for gates in ("raw", "renormalize"):
        sampled = weights(draws(2, gates=gates).plan)
        assert (np.abs(sampled.mean(0) - P) > 5 * sampled.std(0) / np.sqrt(N)).any()


def test_importance_weights_have_the_dense_gradient_as_their_mean():
    outputs = jnp.asarray(np.random.default_rng(0).normal(size=E), jnp.float32)

    def mixture(logits):
        plan = gumbel.route(
            jnp.broadcast_to(logits, (1, N, E)), jnp.ones((1, N), bool), k=2, key=KEY
        ).plan
        return jnp.sum(jax.nn.one_hot(plan.expert, E) @ outputs * plan.gate, axis=-1)[0]

    jacobian = np.asarray(jax.jit(jax.jacfwd(mixture))(jnp.asarray(LOGITS)))  # [N E]
    dense = jax.grad(lambda x: jax.nn.softmax(x) @ outputs)(jnp.asarray(LOGITS))
    error = np.abs(jacobian.mean(0) - np.asarray(dense))
    assert (error < 5 * jacobian.std(0) / np.sqrt(N)).all()


def test_no_noise_is_topk():
    logits = random_logits()
    for gates, normalize in (
        ("raw", "none"),
        ("renormalize", "renormalize"),
        ("importance", "none"),
    ):
        a = route(logits, 3, gates=gates, noise=0.0)
        b = topk.route(jnp.asarray(logits), jnp.ones((3, 6), bool), k=3, normalize=normalize)
        np.testing.assert_array_equal(a.plan.expert, b.plan.expert)
        np.testing.assert_allclose(a.plan.gate, b.plan.gate, rtol=1e-5)


@pytest.mark.parametrize("gates", gumbel.GATES)
def test_without_a_key_the_largest_logits_are_chosen(gates):
    logits = random_logits()
    plan = route(logits, 2, key=None, gates=gates).plan
    np.testing.assert_array_equal(plan.expert, np.argsort(-logits, axis=-1)[..., :2])
    if gates != "raw":
        np.testing.assert_allclose(plan.gate.sum(-1), 1.0, rtol=1e-6)


def test_straight_through_is_hard_forward_and_soft_backward():
    logits, tau = jnp.asarray(random_logits((1, 4, E))), 0.7
    valid, state = jnp.ones((1, 4), bool), {"step": jnp.int32(0)}
    outputs = jnp.asarray(random_logits((1, 4, E), seed=1))

    def hard(x):
        options = {"gates": "straight_through", "tau": tau}
        return gumbel.route(x, valid, k=1, key=KEY, state=state, **options).plan

    expert = hard(logits).expert
    np.testing.assert_array_equal(hard(logits).gate, 1.0)

    def soft(x):
        G = jax.nn.log_softmax(x) + jax.random.gumbel(KEY, x.shape)
        return jnp.take_along_axis(jax.nn.softmax(G / tau), expert, axis=-1)

    chosen = jnp.take_along_axis(outputs, expert, axis=-1)
    a = jax.grad(lambda x: (hard(x).gate * chosen).sum())(logits)
    b = jax.grad(lambda x: (soft(x) * chosen).sum())(logits)
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    assert np.abs(a).max() > 1e-2


def test_tau_falls_to_its_end_and_sharpens_the_gradient():
    steps = jnp.arange(0, 300, 50)
    tau = jax.vmap(lambda s: gumbel.temperature(s, 1.0, 0.3, 100))(steps)
    np.testing.assert_allclose(tau, [1.0, 0.65, 0.3, 0.3, 0.3, 0.3], rtol=1e-6)
    state = gumbel.init_state(E, 11, 1, KEY)
    for _ in range(3):
        state = gumbel.update_state(state)
    assert int(state["step"]) == 3


def test_the_sources_example():
    np.testing.assert_allclose(jax.nn.softmax(jnp.array([2.0, 1.0])), [0.731, 0.269], atol=5e-4)
    drawn = route(np.broadcast_to(np.float32([2, 1]), (1, N, 2)), 1, gates="raw").plan.expert
    assert abs((drawn == 0).mean() - 0.731) < 5 * np.sqrt(0.731 * 0.269 / N)


def test_some_of_the_choices_can_be_the_best_for_sure():
    drawn = draws(3, gates="raw", greedy=2).plan.expert[0]
    best = np.argsort(-LOGITS)
    np.testing.assert_array_equal(drawn[:, :2], np.broadcast_to(best[:2], (N, 2)))
    rest = P[best[2:]] / P[best[2:]].sum()
    counts = [(drawn[:, 2] == e).sum() for e in best[2:]]
    assert chisquare(counts, N * rest / rest.sum()).pvalue > 1e-4


def test_importance_weights_stay_finite_at_extreme_logits():
    logits = jnp.asarray(np.sign(random_logits()) * np.float32(1e4))

    def total(x):
        return gumbel.route(x, jnp.ones((3, 6), bool), k=3, key=KEY).plan.gate.sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(logits)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_only_the_sampled_row_needs_a_key_in_evaluation():
    assert not gumbel.ROUTER.needs_key_in_eval
    assert gumbel.SAMPLED.needs_key_in_eval
    a, b = (route(random_logits(), 2, key=jax.random.key(s)).plan.expert for s in (0, 1))
    assert (a != b).any()


@pytest.mark.parametrize(
    ("k", "options", "message"),
    [
        (2, {"gates": "soft"}, "gates='soft' is not one of raw"),
        (1, {"gates": "renormalize"}, "always 1"),
        (5, {}, r"router\.k=5 of model\.num_experts=5.*there is none"),
        (2, {"greedy": 2}, r"greedy=2 must be at least 0 and below router\.k=2"),
        (2, {"tau": 0.0}, r"router\.tau=0\.0"),
    ],
)
def test_options_that_cannot_work_are_refused(k, options, message):
    with pytest.raises(ConfigError, match=message):
        gumbel.check(E, k=k, **options)
