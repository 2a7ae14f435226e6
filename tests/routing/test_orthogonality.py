import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.routing import orthogonality, topk
from tests.routing.cases import random_logits
from tests.routing.cases import stacked_report as stacked
from tests.routing.direct import routed

GOLDEN = np.array([[1, 0.6, 0], [0, 0.8, 1]], np.float32)  # columns (1,0), (.6,.8), (0,1)
simbal, overlap = jax.jit(orthogonality.simbal), jax.jit(orthogonality.cosine_overlap)


def test_examples_worked_out_by_hand():
    np.testing.assert_allclose(simbal(GOLDEN), 2.8, rtol=1e-6)
    np.testing.assert_allclose(overlap(GOLDEN), 2.0, rtol=1e-6)


def test_orthonormal_columns_cost_nothing_and_length_matters_to_simbal_only():
    kernel = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 4)))[0].astype(np.float32)
    np.testing.assert_allclose(simbal(kernel), 0.0, atol=1e-5)
    np.testing.assert_allclose(overlap(kernel), 0.0, atol=1e-5)
    np.testing.assert_allclose(simbal(3 * kernel), 4 * 8.0, rtol=1e-5)
    np.testing.assert_allclose(overlap(3 * kernel), 0.0, atol=1e-5)


def test_more_experts_than_dimensions_cannot_reach_zero():
    rng = np.random.default_rng(1)
    kernel = rng.normal(size=(2, 5)).astype(np.float32)
    step = jax.jit(lambda w: w - 0.02 * jax.grad(lambda w: orthogonality.cosine_overlap(w))(w))
    for _ in range(200):
        kernel = step(kernel)
    np.testing.assert_allclose(overlap(kernel), 5**2 / 2 - 5, rtol=1e-2)  # the Welch bound


@pytest.mark.parametrize("function", [orthogonality.simbal, orthogonality.cosine_overlap])
def test_gradient_equals_finite_differences(function):
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        kernel, direction = jnp.asarray(rng.normal(size=(2, 3, 6, 4)))
        loss = jax.jit(lambda w: function(w).sum())
        slope = (jax.jit(jax.grad(loss))(kernel) * direction).sum()
        numeric = (loss(kernel + 1e-6 * direction) - loss(kernel - 1e-6 * direction)) / 2e-6
        slope, numeric = float(slope), float(numeric)
    np.testing.assert_allclose(slope, numeric, rtol=1e-5)
    assert abs(slope) > 1e-2


def test_a_column_of_zeros_has_a_finite_gradient():
    kernel = jnp.asarray(GOLDEN).at[:, 1].set(0.0)
    gradient = jax.jit(jax.grad(orthogonality.cosine_overlap))(kernel)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("loss", "function"),
    [
        (orthogonality.simbal_loss, orthogonality.simbal),
        (orthogonality.orthogonality_loss, orthogonality.cosine_overlap),
    ],
)
def test_losses_are_means_over_layers_whose_microbatches_add_up(loss, function):
    kernels = np.random.default_rng(3).normal(size=(3, 6, 4)).astype(np.float32)
    valid = np.arange(6) < np.array([[6], [2], [4]])
    routing = routed(topk.ROUTER.route, random_logits((3, 6, 4)), valid, k=2)
    expected = np.mean([function(w) for w in jnp.asarray(kernels)])

    def part(rows):
        report = stacked(jax.tree.map(lambda x: x[rows], routing), valid[rows])
        return jax.jit(loss)(report, kernels=jnp.asarray(kernels), total_tokens=valid.sum())

    np.testing.assert_allclose(part(slice(None)), expected, rtol=1e-5)
    np.testing.assert_allclose(part(slice(1)) + part(slice(1, 3)), expected, rtol=1e-5)
