import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import ConfigError
from moe.routing import prior, topk
from tests.routing.cases import random_logits

E = 6
KEY = jax.random.key(0)
UNIFORM = prior.init_state(E, 1, 1, KEY)["log_prior"]
VALID = jnp.ones((3, 6), bool)


def rounds(rewards, n=200, start=UNIFORM, **options):
    """The prior after each of `n` rounds with the same rewards, `[n E]`."""

    def step(log_prior, _):
        log_prior = prior.hedge(log_prior, rewards, **options)
        return log_prior, jnp.exp(log_prior)

    return np.asarray(jax.jit(lambda x: jax.lax.scan(step, x, length=n)[1])(start))


def test_one_round_worked_out():
    pi, r = np.array([0.5, 0.3, 0.2]), np.array([1.0, 0.0, 0.5])
    z = (r - r.mean()) / (r.std() + 1e-8)
    expected = pi * np.exp(0.1 * z)
    expected = 0.95 * expected / expected.sum() + 0.05 / 3
    after = prior.hedge(jnp.log(jnp.asarray(pi, jnp.float32)), jnp.asarray(r, jnp.float32))
    np.testing.assert_allclose(np.exp(after), expected, rtol=1e-5)


def test_a_prior_stays_a_distribution_above_its_floor():
    rewards = jnp.asarray(random_logits((E,)))
    pi = rounds(rewards, eta=1.0, floor=0.05)
    np.testing.assert_allclose(pi.sum(-1), 1.0, rtol=1e-5)
    assert (pi >= 0.05 / E - 1e-7).all()


def test_no_step_and_equal_rewards_change_nothing():
    skewed = jax.nn.log_softmax(jnp.asarray(random_logits((E,))))
    rewards = jnp.asarray(random_logits((E,), seed=1))
    np.testing.assert_allclose(prior.hedge(skewed, rewards, 0.0, 0.0), skewed, atol=1e-6)
    np.testing.assert_allclose(prior.hedge(UNIFORM, rewards, 0.0), UNIFORM, atol=1e-6)
    equal = jnp.full(E, 0.3)
    np.testing.assert_allclose(prior.hedge(skewed, equal, 0.1, 0.0), skewed, atol=1e-6)
    np.testing.assert_allclose(prior.hedge(UNIFORM, equal), UNIFORM, atol=1e-6)


def test_a_planted_better_module_grows_and_its_shuffled_control_does_not():
    planted = jnp.zeros(E).at[2].set(0.5)
    pi = rounds(planted)
    assert (np.diff(pi[:, 2]) > -1e-6).all()
    assert pi[-1, 2] > 0.7

    def step(log_prior, key):  # the same rewards, on another module every round
        return prior.hedge(log_prior, jax.random.permutation(key, planted)), None

    shuffled = jax.jit(lambda x: jax.lax.scan(step, x, jax.random.split(KEY, 200))[0])(UNIFORM)
    assert np.exp(shuffled).max() < 0.6


def test_the_better_of_two_arms_wins_without_a_floor():
    """Arms that pay 1 with chance 0.5 and 0.2, judged by themselves."""
    paid = np.random.default_rng(0).random((200, 2)) < np.array([0.5, 0.2])
    log_prior = jnp.full(2, -jnp.log(2.0))

    def step(log_prior, rewards):
        return prior.hedge(log_prior, rewards, 0.1, 0.0), None

    after, _ = jax.lax.scan(step, log_prior, jnp.asarray(paid, jnp.float32))
    assert np.exp(after[0]) > 0.9


def test_layers_are_independent():
    rewards, log_prior = (jnp.asarray(random_logits((2, E), seed=s)) for s in (0, 1))
    log_prior = jax.nn.log_softmax(log_prior)
    both = prior.hedge(log_prior, rewards)
    for layer in range(2):
        np.testing.assert_allclose(
            both[layer], prior.hedge(log_prior[layer], rewards[layer]), rtol=1e-5
        )
    state = {"log_prior": log_prior, "other": jnp.ones(2)}
    new = prior.set_prior(state, rewards)
    np.testing.assert_allclose(new["log_prior"], both, rtol=1e-6)
    assert new["other"] is state["other"]


def test_ablation_rewards_what_hurts_to_lose():
    rewards = prior.ablation_rewards(jnp.array([2.0, 3.0]), jnp.array([[2.5, 1.9], [3.0, 4.0]]))
    np.testing.assert_allclose(rewards, [[0.5, -0.1], [0.0, 1.0]], atol=1e-6)


def test_bandit_rewards_are_unbiased_for_what_a_module_saves():
    """Passes that use one of three modules: the mean estimate is mean loss - loss of the module."""
    chance, losses = np.array([0.6, 0.3, 0.1]), np.array([1.0, 2.0, 0.5])
    used = np.random.default_rng(1).choice(3, size=20000, p=chance)
    rewards = prior.bandit_rewards(
        jnp.asarray(losses[used], jnp.float32),
        jnp.asarray(np.eye(3, dtype=bool)[used]),
        jnp.asarray(chance, jnp.float32),
    )
    expected = chance @ losses - losses
    deviation = np.abs(expected) * np.sqrt((1 - chance) / chance / len(used))
    assert (np.abs(rewards - expected) < 5 * deviation + 5e-3).all()
    unused = prior.bandit_rewards(jnp.ones(2), jnp.zeros((2, 3), bool), jnp.ones(3))
    assert not np.asarray(unused).any()


def test_bandit_rewards_of_stacked_layers():
    rng = np.random.default_rng(2)
    on_path = rng.random((50, 2, 3)) < 0.5
    losses = jnp.asarray(rng.random(50), jnp.float32)
    both = prior.bandit_rewards(losses, jnp.asarray(on_path), jnp.full((2, 3), 0.5))
    one = prior.bandit_rewards(losses, jnp.asarray(on_path[:, 1]), jnp.full(3, 0.5))
    np.testing.assert_allclose(both[1], one, rtol=1e-5)


def test_the_prior_moves_choices_and_a_uniform_one_is_topk():
    logits = jnp.asarray(random_logits((3, 6, E)))
    route = jax.jit(prior.route, static_argnames=("k", "normalize"))
    plain = topk.route(logits, VALID, k=2)
    uniform = route(logits, VALID, k=2, state={"log_prior": UNIFORM})
    np.testing.assert_array_equal(uniform.plan.expert, plain.plan.expert)
    np.testing.assert_allclose(uniform.plan.gate, plain.plan.gate, rtol=1e-5)
    np.testing.assert_array_equal(route(logits, VALID, k=2).plan.gate, plain.plan.gate)

    log_prior = jnp.log(jnp.array([0.01, 0.01, 0.01, 0.01, 0.95, 0.01]))
    steered = route(logits, VALID, k=2, state={"log_prior": log_prior})
    expected = np.asarray(jax.nn.softmax(logits)) * np.exp(log_prior)
    np.testing.assert_allclose(steered.probs, expected / expected.sum(-1, keepdims=True), rtol=1e-4)
    np.testing.assert_array_equal(steered.logits, logits)
    used = [(r.plan.expert == 4).mean() for r in (plain, steered)]
    assert used[1] > used[0] + 0.1
    ignored = route(logits, VALID, k=2, state={"log_prior": log_prior}, prior_weight=0.0)
    np.testing.assert_array_equal(ignored.plan.expert, plain.plan.expert)


def test_a_module_that_is_ruled_out_is_never_chosen_and_the_rest_is_renormalised():
    logits = jnp.asarray(random_logits((3, 6, E)))
    state = prior.without({"log_prior": UNIFORM}, 2)
    ablated = prior.route(logits, VALID, k=E - 1, state=state)
    assert not (ablated.plan.expert == 2).any()
    kept = np.array(jax.nn.softmax(logits))
    kept[..., 2] = 0.0
    np.testing.assert_allclose(ablated.probs, kept / kept.sum(-1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(ablated.plan.gate.sum(-1), 1.0, rtol=1e-6)


def test_the_prior_gets_no_gradient():
    logits = jnp.asarray(random_logits((3, 6, E)))

    def loss(log_prior):
        routing = prior.route(logits, VALID, k=2, state={"log_prior": log_prior}, normalize="none")
        return routing.plan.gate.sum() + (routing.probs**2).sum()

    assert not np.asarray(jax.grad(loss)(UNIFORM)).any()


def test_options_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match=r"prior_weight=-1\.0 must be at least 0"):
        prior.check(E, k=2, prior_weight=-1.0)
    with pytest.raises(ConfigError, match=r"router\.k=1"):
        prior.check(E, k=1)
