import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from moe.errors import ConfigError
from moe.routing import bernoulli, reinforce
from moe.routing.policy_losses import (
    baseline_loss,
    credited,
    entropy_loss,
    leave_one_out,
    penalised,
    policy,
    policy_entropy,
    policy_loss,
)
from tests.routing.cases import random_logits, report_of

N, E = 20000, 4
KEY = jax.random.key(6)
LOGITS = np.array([0.5, -0.3, 1.1, 0.0], np.float32)
P = np.exp(LOGITS.astype(np.float64)) / np.exp(LOGITS.astype(np.float64)).sum()
COST = np.array([2.0, 0.5, 1.0, 3.0])


@functools.partial(jax.jit, static_argnames=("router", "k", "options"))
def routed(router, logits, key, state, *, k, options):
    shape = logits.shape[:2]
    inputs = {"key": key, "state": state, "foreseen": jnp.full(shape, 0.25)}
    return router(logits, jnp.ones(shape, bool), k=k, **inputs, **dict(options))


def route(logits, *, key=KEY, state=None, k=1, router=reinforce.route, **options):
    options = tuple(sorted(options.items()))
    return jax.device_get(routed(router, jnp.asarray(logits), key, state, k=k, options=options))


def repeated(logits=LOGITS, n=N):
    return np.broadcast_to(logits, (1, n, len(logits)))


def test_training_draws_from_the_softmax_and_evaluation_takes_the_largest():
    drawn = route(repeated())
    counts = np.bincount(drawn.plan.expert.ravel(), minlength=E)
    assert chisquare(counts, N * P).pvalue > 1e-4
    np.testing.assert_array_equal(drawn.plan.gate, 1.0)
    best = route(random_logits(), key=None)
    np.testing.assert_array_equal(best.plan.expert[..., 0], best.logits.argmax(-1))


def test_terms_tell_the_log_probability_and_the_entropy_of_each_token():
    drawn = route(repeated(n=50), gates="prob")
    chosen = P[drawn.plan.expert[..., 0]]
    np.testing.assert_allclose(drawn.terms["token/log_prob"], np.log(chosen), rtol=1e-5)
    np.testing.assert_allclose(drawn.plan.gate[..., 0], chosen, rtol=1e-5)
    np.testing.assert_allclose(
        drawn.terms["token/policy_entropy"], -(P * np.log(P)).sum(), rtol=1e-5
    )


def test_mean_of_the_score_function_is_the_exact_gradient_whatever_the_baseline():
    """By enumeration: sum_a p_a grad[(c_a - b) log p_a] = p * (c - E[c])."""

    def loss(logits, action, b):
        log_prob = jax.nn.log_softmax(logits)[action].reshape(1, 1, 1)
        cost, valid = jnp.asarray(COST, jnp.float32)[action].reshape(1, 1), jnp.ones((1, 1), bool)
        baseline = jnp.full((1, 1, 1), b)
        return policy_loss(log_prob, cost, valid, total_tokens=1, baseline=baseline)

    gradient = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0, None)))
    exact = P * (COST - P @ COST)
    for b in (0.0, 1.0, 7.0):
        mean = P @ np.asarray(gradient(jnp.asarray(LOGITS), jnp.arange(E), b))
        np.testing.assert_allclose(mean, exact, atol=1e-6)


def test_gradient_reaches_the_router_and_nothing_else():
    cost, valid = jnp.ones((2, 3)), jnp.ones((2, 3), bool)
    log_prob, baseline = -jnp.ones((2, 2, 3)), jnp.full((2, 2, 3), 0.5)

    def loss(log_prob, cost, baseline):
        return policy_loss(log_prob, cost, valid, total_tokens=6, baseline=baseline)

    gradients = jax.grad(loss, argnums=(0, 1, 2))(log_prob, cost, baseline)
    np.testing.assert_allclose(gradients[0], 0.5 / 6, rtol=1e-6)
    assert not np.asarray(gradients[1]).any()
    assert not np.asarray(gradients[2]).any()


def test_gate_one_gives_the_task_no_way_to_the_router_and_prob_does():
    def task(x, gates):
        shape = x.shape[:2]
        options = {"gates": gates, "key": KEY, "foreseen": jnp.zeros(shape)}
        return reinforce.route(x, jnp.ones(shape, bool), k=1, **options).plan.gate.sum()

    logits = jnp.asarray(random_logits())
    assert not np.asarray(jax.grad(task)(logits, "one")).any()
    assert np.abs(jax.grad(task)(logits, "prob")).max() > 1e-2


def learn(weights, steps=150, costs=(0.5, 0.2)):
    """Descends the policy's losses on a bandit whose arms have these costs; probabilities after."""
    valid, costs = jnp.ones((1, 64), bool), jnp.asarray(costs)
    total = {"total_tokens": 64}

    def loss(logits, state, key):
        x = jnp.broadcast_to(logits, (1, 64, len(costs)))
        routing = reinforce.route(x, valid, k=1, key=key, state=state, foreseen=jnp.zeros((1, 64)))
        terms = {name: value[None] for name, value in routing.terms.items()}
        cost = costs[routing.plan.expert[..., 0]]
        value = weights["policy"] * policy_loss(
            terms["token/log_prob"], cost, valid, baseline=terms["token/baseline"], **total
        )
        value += weights["entropy"] * entropy_loss(terms["token/policy_entropy"], valid, **total)
        return value, cost.mean()

    def step(carry, key):
        logits, state = carry
        gradient, cost = jax.grad(loss, has_aux=True)(logits, state, key)
        state = reinforce.update_state(state, cost=cost)
        return (logits - 1.0 * gradient, state), None

    start = (jnp.array([1.0, 0.0]), reinforce.init_state(2, 1, 1, KEY))
    (logits, _), _ = jax.jit(lambda s: jax.lax.scan(step, s, jax.random.split(KEY, steps)))(start)
    return np.asarray(jax.nn.softmax(logits))


def test_expected_cost_of_a_bandit_falls():
    assert learn({"policy": 1.0, "entropy": 0.0})[1] > 0.9  # from 0.27, on the cheaper arm


def test_the_entropy_bonus_keeps_the_policy_open():
    """A plus sign, as in some code, would make the policy collapse instead."""
    after = learn({"policy": 0.0, "entropy": 1.0})
    np.testing.assert_allclose(after, 0.5, atol=0.02)
    with_bonus = learn({"policy": 1.0, "entropy": 0.3})
    assert 0.5 < with_bonus[1] < learn({"policy": 1.0, "entropy": 0.0})[1]


def test_a_learned_baseline_foresees_the_cost_and_moves_nothing_else():
    gate = reinforce.PolicyGate(8, E, rngs=nnx.Rngs(0), baseline="learned", baseline_hidden=16)
    gate.out[...] = jnp.ones((16, 1))
    tokens = jnp.asarray(random_logits((2, 3, 8)))
    graph, params = nnx.split(gate)

    def foreseen(params, tokens):
        return nnx.merge(graph, params)(tokens).inputs["foreseen"]

    gradients = jax.grad(lambda p, t: foreseen(p, t).sum(), argnums=(0, 1))(params, tokens)
    assert not np.asarray(gradients[1]).any()
    assert not np.asarray(gradients[0]["kernel"][...]).any()
    assert np.abs(gradients[0]["hidden"][...]).max() > 0
    plain = reinforce.PolicyGate(8, E, rngs=nnx.Rngs(0))
    assert not hasattr(plain, "hidden")
    assert not np.asarray(plain(tokens).inputs["foreseen"]).any()


def test_huber_loss_of_the_baseline():
    baseline = jnp.array([[[0.5, 3.0, 9.0]]])
    valid = jnp.array([[True, True, False]])
    cost = jnp.ones((1, 3))
    value, gradient = jax.value_and_grad(lambda b: baseline_loss(b, cost, valid, total_tokens=2))(
        baseline
    )
    np.testing.assert_allclose(value, (0.125 + 1.5) / 2, rtol=1e-6)
    np.testing.assert_allclose(gradient[0, 0], [-0.25, 0.5, 0.0], rtol=1e-6)


def test_padding_adds_nothing_even_if_it_is_not_a_number():
    valid = jnp.array([[True, False]])
    cost, log_prob = jnp.array([[2.0, jnp.nan]]), jnp.array([[[-1.0, jnp.nan]]])
    assert policy_loss(log_prob, cost, valid, total_tokens=1) == -2.0
    assert entropy_loss(log_prob, valid, total_tokens=1) == 1.0
    assert credited(cost, valid, "sequence").tolist() == [[2.0, 2.0]]


@pytest.mark.parametrize(
    ("baseline", "expected"), [("none", 0.0), ("learned", 0.25), ("ema", 1.9 / 1.0)]
)
def test_which_baseline_is_reported(baseline, expected):
    state = reinforce.init_state(E, 1, 1, KEY)
    zero = route(random_logits(), state=state, baseline="ema").terms["token/baseline"]
    assert not zero.any()
    for _ in range(3):
        state = reinforce.update_state(state, cost=jnp.float32(1.9), baseline_decay=0.9)
    reported = route(random_logits(), state=state, baseline=baseline).terms["token/baseline"]
    np.testing.assert_allclose(reported, expected, rtol=1e-5)


def test_leave_one_out_judges_a_pass_by_the_others():
    costs = jnp.array([1.0, 2.0, 6.0]).reshape(3, 1, 1)
    np.testing.assert_allclose(leave_one_out(costs).ravel(), [4.0, 3.5, 1.5])
    with pytest.raises(ValueError, match="at least 2 passes"):
        leave_one_out(costs[:1])


def test_credit():
    cost = jnp.array([[1.0, 2.0, 3.0, 100.0]])
    valid = jnp.array([[True, True, True, False]])
    assert credited(cost, valid, "token").tolist() == [[1, 2, 3, 0]]
    assert credited(cost, valid, "sequence").tolist() == [[2, 2, 2, 2]]
    assert credited(cost, valid, "to_go").tolist() == [[2, 2.5, 3, 0]]
    with pytest.raises(ConfigError, match="not one of token, sequence, to_go"):
        credited(cost, valid, "row")


def reported(router, k):
    """A report of two layers, and the terms that it was made of."""
    logits = random_logits((2, 3, E))
    routing = route(logits, router=router, k=k, state=reinforce.init_state(E, 1, 1, KEY))
    one = report_of(routing, np.ones((2, 3), bool))
    return jax.tree.map(lambda x: jnp.stack([x, 2 * x]), one)


def test_losses_of_a_report_are_made_of_its_terms():
    cost = jnp.asarray(np.abs(random_logits((2, 3), seed=1)))
    valid = jnp.asarray(np.arange(3) < np.array([[3], [2]]))
    total = {"total_tokens": 5}
    report = reported(bernoulli.route, 2)
    terms = report.token_terms
    assert terms["token/log_prob"].shape == (2, 2, 3)
    price = penalised(cost, terms["token/experts"], 0.3)
    expected = policy_loss(terms["token/log_prob"], price, valid, **total)
    expected += 0.5 * baseline_loss(jnp.zeros((2, 2, 3)), price, valid, **total)
    value = policy(report, cost, valid, penalty=0.3, baseline_weight=0.5, **total)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(
        policy_entropy(report, valid, **total),
        entropy_loss(terms["token/policy_entropy"], valid, **total),
        rtol=1e-6,
    )
    with pytest.raises(ConfigError, match=r"penalty=0\.3 with a router whose number"):
        policy(reported(reinforce.route, 1), cost, valid, penalty=0.3, **total)


def test_parts_of_microbatches_add_up():
    cost = jnp.asarray(np.abs(random_logits((2, 3), seed=1)))
    valid, report = jnp.ones((2, 3), bool), reported(reinforce.route, 1)
    whole = policy(report, cost, valid, total_tokens=6, credit="sequence")
    terms = report.token_terms
    parts = []
    for row in (slice(0, 1), slice(1, 2)):
        part = report._replace(token_terms={n: x[:, row] for n, x in terms.items()})
        parts.append(policy(part, cost[row], valid[row], total_tokens=6, credit="sequence"))
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-5)


def test_bernoulli_switches_each_expert_on_with_its_own_probability():
    drawn = route(repeated(), router=bernoulli.route, k=2)
    used = np.eye(E)[drawn.plan.expert[0]] * drawn.plan.valid[0][..., None]
    probability = 1 / (1 + np.exp(-LOGITS.astype(np.float64)))  # k = E/2: even odds at zero logits
    frequency = used.sum(1).mean(0)
    deviation = np.sqrt(probability * (1 - probability) / N)
    assert (np.abs(frequency - probability) < 5 * deviation).all()
    on = used.sum(1) > 0
    expected = np.where(on, np.log(probability), np.log(1 - probability)).sum(-1)
    np.testing.assert_allclose(drawn.terms["token/log_prob"][0], expected, rtol=1e-4)
    entropy = -(probability * np.log(probability) + (1 - probability) * np.log(1 - probability))
    np.testing.assert_allclose(drawn.terms["token/policy_entropy"], entropy.sum(), rtol=1e-5)
    np.testing.assert_array_equal(drawn.terms["token/experts"][0], on.sum(-1))
    total = drawn.plan.gate[0].sum(-1)
    np.testing.assert_allclose(total, on.any(-1), rtol=1e-6)  # nothing on: output 0


def test_bernoulli_starts_with_k_experts_on_average_and_k_max_bounds_them():
    zeros = np.zeros((1, N, 8), np.float32)
    for k in (1, 3):
        used = route(zeros, router=bernoulli.route, k=k).terms["token/experts"]
        assert abs(used.mean() - k) < 5 * used.std() / np.sqrt(N)
    logits = random_logits((2, 6, 8)) + 3
    few = route(logits, router=bernoulli.route, k=4, k_max=2, key=None)
    assert few.plan.expert.shape == (2, 6, 2)
    np.testing.assert_array_equal(few.plan.expert, np.argsort(-logits, axis=-1)[..., :2])


def frontier(penalty):
    """Learns which of 4 experts to use where only the first lowers the cost; mean use of each."""
    valid = jnp.ones((1, 64), bool)

    def loss(logits, key, mean):
        x = jnp.broadcast_to(logits, (1, 64, E))
        state = {"cost": mean, "weight": jnp.ones(())}
        routing = bernoulli.route(x, valid, k=2, key=key, state=state, foreseen=jnp.zeros((1, 64)))
        terms = {name: value[None] for name, value in routing.terms.items()}
        on = jax.nn.one_hot(routing.plan.expert, E) * routing.plan.valid[..., None]
        useful = on.sum(2)[..., 0]
        cost = penalised(1.0 - useful, terms["token/experts"], penalty)
        value = policy_loss(
            terms["token/log_prob"], cost, valid, total_tokens=64, baseline=terms["token/baseline"]
        )
        return value, cost.mean()

    def step(carry, key):
        logits, mean = carry
        gradient, cost = jax.grad(loss, has_aux=True)(logits, key, mean)
        return (logits - gradient, 0.9 * mean + 0.1 * cost), None

    start = (jnp.zeros(E), jnp.float32(1.0))
    (logits, _), _ = jax.jit(lambda s: jax.lax.scan(step, s, jax.random.split(KEY, 200)))(start)
    return np.asarray(jax.nn.sigmoid(logits))


def test_a_price_on_compute_leaves_the_useful_expert_and_drops_the_others():
    free, fair, dear = frontier(0.0), frontier(0.2), frontier(2.0)
    assert free[0] > 0.9
    assert abs(free[1:].mean() - 0.5) < 0.2
    assert fair[0] > 0.9
    assert (fair[1:] < 0.2).all()
    assert (dear < 0.2).all()


@pytest.mark.parametrize(
    ("router", "k", "options", "message"),
    [
        (reinforce, 2, {}, r"router\.k=2.*exactly one.*bernoulli"),
        (reinforce, 1, {"gates": "raw"}, "gates='raw' is not one of one, prob"),
        (bernoulli, 2, {"baseline": "mean"}, "baseline='mean' is not one of none, ema, learned"),
        (bernoulli, 2, {"k_max": 5}, "k_max=5"),
    ],
)
def test_options_that_cannot_work_are_refused(router, k, options, message):
    with pytest.raises(ConfigError, match=message):
        router.check(E, k=k, **options)
