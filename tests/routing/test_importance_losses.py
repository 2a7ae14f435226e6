import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.routing import importance_losses, noisy_topk
from moe.routing.report import layer_report
from tests.routing.cases import GOLDEN_LOGITS, random_logits

LOSSES = {
    "importance": importance_losses.importance_loss,
    "load": importance_losses.load_loss,
}
VALID = np.arange(6) < np.array([[6], [3], [5], [0]])


@jax.jit
def loss(report, total_tokens):
    return {name: f(report, total_tokens=total_tokens) for name, f in LOSSES.items()}


@functools.partial(jax.jit, static_argnames="normalize")
def report_of(logits, valid, normalize="topk_softmax"):
    """Two layers, one of which sees the experts in another order and twice as sure."""

    def layer(x):
        scale = jnp.full_like(x, 0.7)
        routing = noisy_topk.route(
            x, valid, k=2, noise_scale=scale, normalize=normalize, load_threshold="paper"
        )
        return layer_report(routing, routing.plan.valid, valid)

    return jax.tree.map(lambda *x: jnp.stack(x), layer(logits), layer(2 * logits[..., ::-1]))


def with_terms(values):
    """The report of one layer with one row whose experts have these sums of both terms."""
    report = jax.tree.map(lambda x: x[:1], report_of(GOLDEN_LOGITS, np.ones((1, 8), bool)))
    value = jnp.asarray(values, jnp.float32)[None, None]
    return report._replace(row_terms={"importance": value, "load": value})


def one_layer(report):
    return jax.tree.map(lambda x: x[:1], report)


def test_example_worked_out_in_float64_has_the_population_variance():
    report = one_layer(report_of(GOLDEN_LOGITS, np.ones((1, 8), bool), "none"))
    value = float(loss(report, 8)["importance"])
    np.testing.assert_allclose(value, 0.1510, atol=5e-5)
    np.testing.assert_allclose(value * 4 / 3, 0.2013, atol=5e-5)  # what torch.var would give


def test_zero_at_balance_and_experts_minus_one_when_collapsed():
    for name in LOSSES:
        assert abs(loss(with_terms([3.0, 3.0, 3.0, 3.0]), 8)[name]) < 1e-12
        np.testing.assert_allclose(loss(with_terms([0.0, 5.0, 0.0, 0.0]), 8)[name], 3.0, rtol=1e-6)


@pytest.mark.parametrize("values", [[3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
def test_the_slope_at_balance_and_of_an_empty_batch_is_zero(values):
    gradient = jax.grad(lambda v: loss(with_terms(v), 8)["load"])(jnp.asarray(values))
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


def test_the_mean_over_layers_is_of_their_losses_not_of_their_loads():
    report = report_of(random_logits((4, 6, 8)), VALID)
    alone = [loss(jax.tree.map(lambda x, i=i: x[i : i + 1], report), 14) for i in range(2)]
    for name, value in loss(report, 14).items():
        np.testing.assert_allclose(value, np.mean([a[name] for a in alone]), rtol=1e-5)
    half = with_terms([1.0, 0.0]), with_terms([0.0, 1.0])  # each layer on one expert of two
    both = jax.tree.map(lambda *x: jnp.concatenate(x), *half)
    np.testing.assert_allclose(loss(both, 8)["load"], 1.0, rtol=1e-6)


def test_repeating_the_batch_changes_nothing():
    logits = random_logits((4, 6, 8))
    once = loss(report_of(logits, VALID), 14)
    twice = loss(report_of(np.tile(logits, (2, 1, 1)), np.tile(VALID, (2, 1))), 28)
    for name, value in once.items():
        np.testing.assert_allclose(twice[name], value, rtol=1e-5)


def test_padding_counts_nothing():
    logits = random_logits((2, 3, 8))
    plain = loss(report_of(logits, np.ones((2, 3), bool)), 6)
    padded = loss(
        report_of(
            np.pad(logits, ((0, 1), (0, 2), (0, 0)), constant_values=9.0),
            np.pad(np.ones((2, 3), bool), ((0, 1), (0, 2))),
        ),
        6,
    )
    for name, value in plain.items():
        np.testing.assert_allclose(padded[name], value, rtol=1e-5)


def test_microbatches_weigh_as_their_tokens_do():
    logits = random_logits((4, 6, 8))
    parts = [report_of(logits[s], VALID[s]) for s in (slice(0, 1), slice(1, 4))]
    tokens = [6, 8]
    step = [loss(p, 14) for p in parts]
    alone = [loss(p, t) for p, t in zip(parts, tokens, strict=True)]
    for name in LOSSES:
        expected = np.average([a[name] for a in alone], weights=tokens)
        np.testing.assert_allclose(sum(s[name] for s in step), expected, rtol=1e-5)


def test_an_empty_batch_costs_nothing():
    empty = report_of(random_logits((1, 3, 8)), np.zeros((1, 3), bool))
    assert all(value == 0 for value in loss(empty, 0).values())


@pytest.mark.parametrize("name", list(LOSSES))
def test_gradient_equals_finite_differences(name):
    h = 1e-3  # report sums are float32 whatever the logits
    with jax.enable_x64(True):
        logits = random_logits((2, 3, 8)).astype(np.float64)
        valid = jnp.asarray(np.arange(3) < np.array([[3], [2]]))

        @jax.jit
        def value(x):
            return loss(report_of(x, valid), 5.0)[name]

        gradient = np.asarray(jax.grad(value)(jnp.asarray(logits)))
        numeric = np.zeros(logits.shape)
        for i in np.ndindex(logits.shape):
            step = np.zeros_like(logits)
            step[i] = h
            high, low = value(jnp.asarray(logits + step)), value(jnp.asarray(logits - step))
            numeric[i] = (high - low) / (2 * h)
    np.testing.assert_allclose(gradient, numeric, rtol=1e-2, atol=1e-3)
    assert np.abs(gradient).max() > 1e-3
    assert not gradient[~np.asarray(valid)].any()
