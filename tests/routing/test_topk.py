import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import ConfigError
from moe.routing import topk
from tests.routing.cases import GOLDEN_LOGITS, GOLDEN_VALID, Case, random_logits


def route(normalize, k=2):
    return Case("topk", k, {"normalize": normalize}).route(GOLDEN_LOGITS, GOLDEN_VALID)


def test_probabilities_and_choices_worked_out_in_float64():
    routing = route("none")
    np.testing.assert_allclose(routing.probs[0, 0], [0.6439, 0.2369, 0.0871, 0.0321], atol=5e-5)
    np.testing.assert_allclose(
        routing.probs.mean((0, 1)), [0.4056, 0.2433, 0.2102, 0.1409], atol=5e-5
    )
    np.testing.assert_array_equal(routing.plan.expert[0, :, 0], [0, 0, 0, 1, 2, 0, 3, 0])
    np.testing.assert_array_equal(routing.plan.expert[0, :, 1], [1, 2, 3, 2, 0, 1, 0, 1])


@pytest.mark.parametrize(
    ("normalize", "gates"),
    [
        ("none", [0.6439, 0.2369]),
        ("renormalize", [0.7311, 0.2689]),
        ("topk_softmax", [0.7311, 0.2689]),
    ],
)
def test_gates_worked_out_in_float64(normalize, gates):
    np.testing.assert_allclose(route(normalize).plan.gate[0, 0], gates, atol=5e-5)


@pytest.mark.parametrize("k", [1, 3])
def test_renormalising_equals_softmax_of_the_chosen_logits(k):
    logits = random_logits((2, 16, 8))
    a, b = (
        Case("topk", k, {"normalize": n}).route(logits).plan
        for n in ("renormalize", "topk_softmax")
    )
    np.testing.assert_array_equal(a.expert, b.expert)
    np.testing.assert_allclose(a.gate, b.gate, atol=1e-6)


def test_all_experts_make_the_dense_mixture_in_every_form():
    for normalize in topk.NORMALIZE:
        routing = route(normalize, k=4)
        dense = np.take_along_axis(np.asarray(routing.probs), np.asarray(routing.plan.expert), -1)
        np.testing.assert_allclose(routing.plan.gate, dense, atol=1e-6)
        np.testing.assert_allclose(routing.plan.gate.sum(-1), 1.0, rtol=1e-6)


def test_gates_fall_as_logits_do():
    for normalize in topk.NORMALIZE:
        assert (np.diff(route(normalize, k=3).plan.gate, axis=-1) <= 0).all()


@pytest.mark.parametrize("normalize", ["renormalize", "topk_softmax"])
def test_one_renormalised_gate_is_refused(normalize):
    with pytest.raises(ConfigError, match=r"router\.k=1.*no gradient.*normalize='none'"):
        topk.check(8, k=1, normalize=normalize)
    topk.check(8, k=1, normalize="none")


@functools.cache
def compiled(**options):
    return jax.jit(functools.partial(topk.route, score="sqrt_softplus", **options))


def sqrt_softplus(logits, **options):
    valid = jnp.ones(logits.shape[:2], bool)
    return jax.device_get(compiled(**options)(jnp.asarray(logits), valid))


def test_square_roots_of_softplus_make_gates_whose_sum_is_the_scale():
    logits = random_logits((2, 16, 8))
    score = np.sqrt(np.log1p(np.exp(logits.astype(np.float64))))
    result = sqrt_softplus(logits, k=3, scale=2.5)
    np.testing.assert_array_equal(result.plan.expert, np.argsort(-logits, -1)[..., :3])
    chosen = np.take_along_axis(score, result.plan.expert, -1)
    expected = 2.5 * chosen / chosen.sum(-1, keepdims=True)
    np.testing.assert_allclose(result.plan.gate, expected, rtol=1e-5)
    np.testing.assert_allclose(result.probs, score / score.sum(-1, keepdims=True), rtol=1e-5)
    raw = sqrt_softplus(logits, k=1, normalize="none").plan.gate[..., 0]
    np.testing.assert_allclose(raw, score.max(-1), rtol=1e-5)


def test_square_roots_of_vanishing_softplus_keep_their_ratio_and_their_gradient():
    logits = jnp.asarray([[[-60.0, -62.0, -20.0 + 1e-3, -20.0 - 1e-3]]])

    def gates(x):
        return compiled(k=4)(x, jnp.ones((1, 1), bool)).plan.gate

    # Best first; log s is x / 2 there, without a step at the seam.
    chosen = np.array([-20.0 + 1e-3, -20.0 - 1e-3, -60.0, -62.0]) / 2
    expected = np.exp(chosen - chosen.max())
    np.testing.assert_allclose(gates(logits)[0, 0], expected / expected.sum(), rtol=1e-4)
    slope = jax.jit(jax.grad(lambda x: gates(x)[0, 0, 0]))
    np.testing.assert_allclose(slope(logits)[0, 0], [0, 0, 0.125, -0.125], rtol=1e-3, atol=1e-8)
    far = jnp.asarray([[[1e4, 1e4, -1e4, -1e4]]])
    assert np.isfinite(gates(far)).all()
    assert np.isfinite(slope(far)).all()


@pytest.mark.parametrize("normalize", topk.NORMALIZE)
def test_scale_multiplies_gates_and_may_be_traced(normalize):
    logits, valid = jnp.asarray(GOLDEN_LOGITS), jnp.asarray(GOLDEN_VALID)
    gates = jax.jit(
        lambda s: topk.route(logits, valid, k=2, normalize=normalize, scale=s).plan.gate
    )
    np.testing.assert_allclose(gates(jnp.float32(2.5)), 2.5 * gates(jnp.float32(1.0)), rtol=1e-6)


def test_scores_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="score='relu' is not one of softmax, sqrt_softplus"):
        topk.check(8, k=2, score="relu")
    with pytest.raises(ConfigError, match=r"does not read router\.score='sqrt_softplus'"):
        topk.check(8, k=2, score="sqrt_softplus", normalize="topk_softmax")
    topk.check(8, k=2, score="sqrt_softplus")


def test_unknown_normalisation_is_refused():
    with pytest.raises(ConfigError, match="'softmax' is not one of none, renormalize"):
        topk.check(8, k=2, normalize="softmax")
