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
LOGITS = random_logits((4, 6, 8))
VALID = np.arange(6) < np.array([[6], [3], [5], [0]])


def rows(start, stop):
    """True for these rows: a microbatch of the same shape as the batch."""
    return (np.arange(4) >= start)[:, None] & (np.arange(4) < stop)[:, None]


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


def test_example_worked_out_in_float64_has_the_population_variance():
    report = report_of(GOLDEN_LOGITS, np.ones((1, 8), bool), "none")
    report = jax.tree.map(lambda x: x[:1], report)
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
    first, second = with_terms([1.0, 0.0, 0.0, 0.0]), with_terms([0.0, 2.0, 2.0, 2.0])
    both = jax.tree.map(lambda *x: jnp.concatenate(x), first, second)
    np.testing.assert_allclose(loss(both, 8)["load"], (3 + 1 / 3) / 2, rtol=1e-6)


def test_repeating_the_batch_changes_nothing():
    logits = np.tile(LOGITS[:2], (2, 1, 1))
    valid = np.tile(VALID[:2], (2, 1))
    once = loss(report_of(logits, valid & rows(0, 2)), 9)
    twice = loss(report_of(logits, valid), 18)
    for name, value in once.items():
        np.testing.assert_allclose(twice[name], value, rtol=1e-5)


def test_padding_counts_nothing():
    other = np.where(VALID[..., None], LOGITS, np.float32(9.0))
    a, b = (loss(report_of(x, VALID), 14) for x in (LOGITS, other))
    assert a == b
    assert a["load"] > 1e-3


def test_microbatches_weigh_as_their_tokens_do():
    parts = [report_of(LOGITS, VALID & rows(a, b)) for a, b in ((0, 1), (1, 4))]
    tokens = [6, 8]
    step = [loss(p, 14) for p in parts]
    alone = [loss(p, t) for p, t in zip(parts, tokens, strict=True)]
    for name in LOSSES:
        expected = np.average([a[name] for a in alone], weights=tokens)
        np.testing.assert_allclose(sum(s[name] for s in step), expected, rtol=1e-5)


def test_an_empty_batch_costs_nothing():
    empty = report_of(LOGITS, np.zeros((4, 6), bool))
    assert all(value == 0 for value in loss(empty, 0).values())


def test_gradients_equal_finite_differences():
    h = 1e-2  # in float32, which is what reports are made of; the functions are smooth
    losses = jax.jit(lambda x: loss(report_of(x, VALID), 14))
    gradients = jax.device_get(jax.jit(jax.jacrev(losses))(jnp.asarray(LOGITS)))
    for name, gradient in gradients.items():
        assert np.abs(gradient).max() > 1e-2
        assert not gradient[~VALID].any()
        for i in np.argwhere(np.abs(gradient) >= np.sort(np.abs(gradient), None)[-8]):
            step = np.zeros_like(LOGITS)
            step[tuple(i)] = h
            numeric = (losses(LOGITS + step)[name] - losses(LOGITS - step)[name]) / (2 * h)
            np.testing.assert_allclose(gradient[tuple(i)], numeric, rtol=1e-2)
