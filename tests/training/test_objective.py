"""What a forward pass is made of: token and row predictions, and the mean over draws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe.dispatch.table import make_dispatch
from moe.model.build import model_spec
from moe.model.layer import Call
from moe.training.objective import forward
from moe.training.state import make_skeleton
from tests import tiny

BYTES = jnp.ones(tiny.VOCAB, jnp.int32)
EXACT = make_dispatch("reference", None)


def run(model: tiny.Model, batch, key, passes=1):
    call = Call(batch.tokens, batch.valid, EXACT, key=key)
    step = functools.partial(forward, model.skeleton, passes=passes)
    return jax.jit(lambda: step(model.params, model.router, batch, call, BYTES))()


def test_probabilities_of_several_draws_are_averaged_not_logits():
    model, batch, key = tiny.model("router.name=random"), tiny.batch(), jax.random.key(3)
    keys = [key, *(jax.random.fold_in(key, i) for i in (1, 2))]
    probs = [jax.nn.softmax(run(model, batch, k).logits) for k in keys]
    assert np.abs(probs[0] - probs[1]).max() > 1e-3, "the draws differ"
    averaged = run(model, batch, key, passes=3)
    np.testing.assert_allclose(jnp.exp(averaged.logits), sum(probs) / 3, rtol=1e-4, atol=1e-6)
    one = float(run(model, batch, key).rows.nll.sum())
    assert float(averaged.rows.nll.sum()) != one


def test_a_classifier_predicts_the_domain_of_every_row_once():
    config = tiny.config("task.name=classify")
    spec = model_spec(config, tiny.VOCAB, classes=2)
    skeleton = make_skeleton(spec)
    params, router = tiny.numbers(skeleton)
    model = tiny.Model(spec, skeleton, params, router, None)
    batch = tiny.batch(((16,), (7, 6), ()))
    done = run(model, batch, None)
    assert done.logits.shape == (3, 2)
    np.testing.assert_array_equal(done.rows.tokens, [1, 1, 0])
    expected = -np.asarray(jax.nn.log_softmax(done.logits))[np.arange(3), np.asarray(batch.domain)]
    np.testing.assert_allclose(done.rows.nll, expected * [1, 1, 0], rtol=1e-5)
    np.testing.assert_allclose(done.nll[1, :13], expected[1], rtol=1e-5)
    assert not np.asarray(done.nll)[~np.asarray(batch.valid)].any()
    junk = batch._replace(tokens=jnp.where(batch.valid, batch.tokens, 7))
    np.testing.assert_allclose(run(model, junk, None).logits[:2], done.logits[:2], atol=1e-6)
