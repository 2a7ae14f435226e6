import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from moe.errors import ConfigError
from moe.routing import thor
from moe.routing.consistency import consistency

N, E = 20000, 8
KEY = jax.random.key(3)


@functools.partial(jax.jit, static_argnames=("shape", "k", "training", "options"))
def routed(key, *, shape, k, training, options):
    valid = jnp.ones(shape[:2], bool)
    return thor.route(jnp.ones(shape), valid, k=k, key=key, training=training, **dict(options))


def plan(shape=(3, 6, E), k=1, training=True, key=KEY, **options):
    options = tuple(sorted(options.items()))
    return jax.device_get(routed(key, shape=shape, k=k, training=training, options=options)).plan


@pytest.mark.parametrize(
    ("training", "options"),
    [(True, {"scope": "token"}), (False, {"eval_mode": "token"}), (True, {"scope": "sequence"})],
)
def test_every_expert_is_equally_likely(training, options):
    shape = (N, 1, E) if options.get("scope") == "sequence" else (4, N // 4, E)
    drawn = plan(shape, training=training, **options).expert
    assert chisquare(np.bincount(drawn.ravel(), minlength=E)).pvalue > 1e-4


def test_draws_of_the_whole_batch_are_uniform_over_keys():
    draw = jax.jit(
        jax.vmap(lambda key: thor.route(jnp.zeros((1, 1, E)), jnp.ones((1, 1), bool), k=1, key=key))
    )
    drawn = np.asarray(draw(jax.random.split(KEY, 2000)).plan.expert).ravel()
    assert chisquare(np.bincount(drawn, minlength=E)).pvalue > 1e-4


def test_who_shares_a_draw():
    batch = plan((8, 16, E), scope="batch").expert
    assert (batch == batch[0, 0]).all()
    for training, options in ((True, {"scope": "sequence"}), (False, {"eval_mode": "sentence"})):
        rows = plan((8, 16, E), training=training, **options).expert
        assert (rows == rows[:, :1]).all()
        assert len(np.unique(rows[:, 0])) > 1
    for training, options in ((True, {"scope": "token"}), (False, {"eval_mode": "token"})):
        tokens = plan((8, 16, E), training=training, **options).expert
        assert all(len(np.unique(row)) > 1 for row in tokens)


def test_gate_is_one_and_several_draws_are_averaged():
    np.testing.assert_array_equal(plan().gate, 1.0)
    several = plan(k=4, scope="token")
    np.testing.assert_array_equal(several.gate, 0.25)
    assert (np.diff(np.sort(several.expert), axis=-1) > 0).all()


def test_an_ensemble_averages_its_members():
    every = plan(training=False, eval_mode="ensemble", key=None)
    np.testing.assert_array_equal(np.sort(every.expert), np.broadcast_to(np.arange(E), (3, 6, E)))
    np.testing.assert_array_equal(every.gate, 1 / E)
    some = plan(training=False, eval_mode="ensemble", ensemble=3)
    assert some.expert.shape == (3, 6, 3)
    np.testing.assert_allclose(some.gate, 1 / 3, rtol=1e-6)
    assert plan(training=True, eval_mode="ensemble").expert.shape == (3, 6, 1)


def test_nothing_is_learned():
    assert thor.ROUTER.gate is None
    assert thor.ROUTER.init_state(E, 11, 1, KEY) == {}

    def loss(x):
        routing = thor.route(x, jnp.ones((3, 6), bool), k=1, key=KEY)
        return (routing.plan.gate**2).sum() + (routing.probs**2).sum() + routing.logits.sum()

    assert not np.asarray(jax.grad(loss)(jnp.ones((3, 6, E)))).any()


def test_every_expert_gets_gradient_in_expectation():
    def loss(weights, key):  # expert e gives weights[e] to every token
        drawn = thor.route(
            jnp.zeros((4, 64, E)), jnp.ones((4, 64), bool), k=1, key=key, scope="token"
        ).plan
        chosen = jax.nn.one_hot(drawn.expert, E) * drawn.gate[..., None]
        return jnp.mean(chosen.sum(2) @ weights)

    gradient = jax.jit(jax.grad(loss))(jnp.zeros(E), KEY)
    np.testing.assert_allclose(gradient, 1 / E, atol=5 * np.sqrt(1 / E / 256))
    assert np.all(gradient > 0)


def test_no_key_is_an_error():
    with pytest.raises(ValueError, match="pass a key"):
        thor.route(jnp.zeros((1, 1, 4)), jnp.ones((1, 1), bool), k=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "sentence"}, "scope='sentence' is not one of batch, sequence, token"),
        ({"eval_mode": "batch"}, "eval_mode='batch' is not one of token, sentence, ensemble"),
        ({"ensemble": 9}, "ensemble=9 must be between 0"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        thor.check(E, k=1, **options)


def log_probs(*p):
    return jnp.log(jnp.array(p))[None, None]


ALL = jnp.ones((1, 1), bool)


def test_consistency_of_an_example_worked_out_in_float64():
    p, q = log_probs(0.7, 0.2, 0.1), log_probs(0.5, 0.3, 0.2)
    value = consistency(p, q, ALL)
    np.testing.assert_allclose(value, 0.08858, atol=5e-6)
    np.testing.assert_allclose(consistency(q, p, ALL), value, rtol=1e-6)
    np.testing.assert_allclose(consistency(p + 3.0, q - 1.0, ALL), value, rtol=1e-5)


def test_consistency_is_zero_for_equal_predictions_only():
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=(4, 16, 5)), jnp.float32) for _ in range(2))
    valid = jnp.asarray(rng.random((4, 16)) < 0.7)
    apart = np.asarray(consistency(a, b, valid))
    assert (apart[np.asarray(valid)] > 1e-3).all()
    assert not apart[~np.asarray(valid)].any()
    assert not np.asarray(consistency(a, a, valid)).any()
    assert not np.asarray(jax.grad(lambda x: consistency(x, a, valid).sum())(a)).any()


def test_one_expert_is_consistent_with_itself():
    """With one expert both draws are the same, so are the outputs, and the loss is exactly 0."""
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(1, 5)), jnp.float32)

    def predict(key):
        drawn = thor.route(jnp.zeros((2, 3, 1)), jnp.ones((2, 3), bool), k=1, key=key).plan
        return jnp.einsum("bske,ev->bsv", jax.nn.one_hot(drawn.expert, 1), weights)

    a, b = (predict(key) for key in jax.random.split(KEY))
    assert not np.asarray(consistency(a, b, jnp.ones((2, 3), bool))).any()


def test_consistency_survives_half_precision_and_large_logits():
    a = jnp.asarray([[[1e4, -1e4, 0.0]]], jnp.bfloat16)
    value = consistency(a, -a, ALL)
    assert value.dtype == jnp.float32
    assert np.isfinite(value).all()
