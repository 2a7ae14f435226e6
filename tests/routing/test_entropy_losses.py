import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import ConfigError
from moe.routing import dynmoe, entropy_losses, top_p
from moe.routing.report import layer_report
from moe.routing.topk import route as topk_route
from moe.routing.types import LayerReport
from tests.routing.cases import GOLDEN_LOGITS, one_choice, random_logits

mutual_information = jax.jit(entropy_losses.mutual_information_loss)
entropy = jax.jit(entropy_losses.entropy_loss)
modality_local = jax.jit(entropy_losses.modality_local_loss)
modality_global = jax.jit(entropy_losses.modality_global_loss, static_argnames="experts")
compute = jax.jit(entropy_losses.compute_loss, static_argnames=("k", "target", "kind"))

VALID = np.arange(6) < np.array([[6], [3], [5], [0], [1]])
TOKENS = int(VALID.sum())
TOP2 = functools.partial(topk_route, k=2)


@functools.partial(jax.jit, static_argnames="route")
def report(logits, valid, route=TOP2) -> LayerReport:
    """The report of two layers, the second with its experts' logits turned round."""

    def one(logits):
        routing = route(logits, valid)
        return layer_report(routing, routing.plan.valid, valid)

    reports = [one(logits), one(0.5 * logits[..., ::-1])]
    return jax.tree.map(lambda *x: jnp.stack(x), *reports)


def of_probs(probs) -> LayerReport:
    """The report of one layer whose tokens have these probabilities."""
    routing = jax.tree.map(jnp.asarray, one_choice(probs, np.argmax(probs, -1)))
    valid = jnp.ones(np.shape(probs)[:2], bool)
    return jax.tree.map(lambda x: x[None], layer_report(routing, routing.plan.valid, valid))


def H(p):
    p = np.asarray(p, np.float64)
    return -(p * np.log(np.where(p > 0, p, 1))).sum(-1)


def softmax(x):
    x = np.exp(np.asarray(x, np.float64))
    return x / x.sum(-1, keepdims=True)


def test_mutual_information_worked_out_in_float64():
    golden = of_probs(softmax(GOLDEN_LOGITS))
    np.testing.assert_allclose(mutual_information(golden, total_tokens=8), -0.2506, atol=5e-5)
    np.testing.assert_allclose(entropy(golden, total_tokens=8), 1.0633, atol=5e-5)
    np.testing.assert_allclose(modality_local(golden, total_tokens=8), 1.0633, atol=5e-5)
    short = modality_global(golden, total_tokens=8, experts=4)
    np.testing.assert_allclose(short, np.log(4) - 1.3139, atol=5e-5)


def test_mutual_information_is_least_for_sure_tokens_on_equal_experts():
    cases = {
        "sure and equal": (np.eye(4)[np.arange(8)[None] % 4], -np.log(4)),
        "sure and collapsed": (np.eye(4)[np.zeros((1, 8), int)], 0.0),
        "unsure": (np.full((1, 8, 4), 0.25), 0.0),
    }
    for name, (probs, value) in cases.items():
        loss = mutual_information(of_probs(probs), total_tokens=8)
        np.testing.assert_allclose(loss, value, atol=1e-6, err_msg=name)


def test_layers_are_averaged_and_padding_is_left_out():
    logits = random_logits((5, 6, 8))
    probs = [softmax(x)[VALID] for x in (logits, 0.5 * logits[..., ::-1])]
    both = report(np.where(VALID[..., None], logits, 99.0).astype(np.float32), VALID)
    expected = np.mean([H(p).mean() - H(p.mean(0)) for p in probs])
    np.testing.assert_allclose(mutual_information(both, total_tokens=TOKENS), expected, rtol=1e-5)
    expected = np.mean([H(p).mean() for p in probs])
    np.testing.assert_allclose(entropy(both, total_tokens=TOKENS), expected, rtol=1e-5)
    expected = np.mean([np.log(8) - H(p.mean(0)) for p in probs])
    loss = modality_global(both, total_tokens=TOKENS, experts=8)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


def two_modalities(probs, modality) -> LayerReport:
    """The report of one layer with the terms of a router over two modalities."""
    mask = np.asarray(modality)[..., None] == np.arange(2)  # [B S M]
    probs = np.asarray(probs, np.float32)
    terms = {
        entropy_losses.MODALITY_TOKENS: mask.sum(1),
        entropy_losses.MODALITY_PROBS: (mask[..., None] * probs[:, :, None]).sum(1),
        entropy_losses.MODALITY_ENTROPY: (mask * H(probs)[..., None]).sum(1),
    }
    named = {name: jnp.asarray(x, jnp.float32)[None] for name, x in terms.items()}
    return of_probs(probs)._replace(row_terms=named)


def test_modalities_weigh_the_same_however_many_tokens_they_have():
    sure, unsure = np.eye(4)[[[0, 0, 0, 0, 0, 1]]], np.full((1, 2, 4), 0.25)
    probs = np.concatenate([sure, unsure], axis=1)
    split = two_modalities(probs, [[0] * 6 + [1] * 2])
    np.testing.assert_allclose(modality_local(split, total_tokens=8), np.log(4) / 2, rtol=1e-6)
    first = H([5 / 6, 1 / 6, 0, 0])
    loss = modality_global(split, total_tokens=8, experts=2)
    np.testing.assert_allclose(loss, (np.log(2) - first) / 2, rtol=1e-5)
    alone = two_modalities(sure, [[0] * 6])  # the other modality does not occur
    loss = modality_global(alone, total_tokens=6, experts=2)
    np.testing.assert_allclose(loss, np.log(2) - first, rtol=1e-5)


def test_a_modality_that_spreads_widely_enough_is_left_alone():
    def loss(logits, experts):
        made = report(logits, jnp.asarray(VALID))
        return entropy_losses.modality_global_loss(made, total_tokens=TOKENS, experts=experts)

    logits = jnp.asarray(0.3 * random_logits((5, 6, 8)))
    both = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    value, gradient = both(logits, 4)
    assert value == 0.0
    assert not np.asarray(gradient).any()
    value, gradient = both(logits, 8)
    assert value > 0
    assert np.asarray(gradient).any()
    assert both(logits, 0.0)[0] == 0.0  # half of the experts


def mass_route(logits, valid):
    return top_p.route(logits, valid, k=2)


def thresholds_route(logits, valid):
    return dynmoe.route(logits, valid, k=2, thresholds=jnp.zeros(8))


@pytest.mark.parametrize("route", [thresholds_route, mass_route])
def test_compute_measures_experts_a_token(route):
    logits = random_logits((5, 6, 8))
    both = report(logits, VALID, route=route)
    mean = np.asarray(both.row_requested).sum((1, 2)) / TOKENS
    loss = functools.partial(compute, both, total_tokens=TOKENS)
    np.testing.assert_allclose(loss(k=2), ((mean - 2) ** 2).mean(), rtol=1e-5)
    np.testing.assert_allclose(loss(k=2, target=1.5), ((mean - 1.5) ** 2).mean(), rtol=1e-5)
    hinge = np.maximum(mean - 1.5, 0).mean()
    np.testing.assert_allclose(loss(k=2, target=1.5, kind="hinge"), hinge, rtol=1e-5)
    assert loss(k=8, kind="hinge") == 0.0


@pytest.mark.parametrize("route", [thresholds_route, mass_route])
@pytest.mark.parametrize("target", [1.5, 3.0])
def test_descending_on_compute_reaches_the_budget(route, target):
    valid = jnp.asarray(VALID)

    def loss(logits):
        made = report(logits, valid, route=route)
        return entropy_losses.compute_loss(made, total_tokens=TOKENS, k=1, target=target)

    start = jnp.asarray(random_logits((5, 6, 8)))
    descend = lambda x, _: (x - 2.0 * jax.grad(loss)(x), None)  # noqa: E731
    end = jax.jit(lambda x: jax.lax.scan(descend, x, length=300)[0])(start)
    mean = np.asarray(report(end, VALID, route=route).row_requested).sum((1, 2))[0] / TOKENS
    assert abs(mean - target) < 0.35


def test_an_unknown_kind_of_budget_is_refused():
    both = report(random_logits((5, 6, 8)), VALID, route=mass_route)
    with pytest.raises(ConfigError, match="compute_kind='cubed' is not one of squared, hinge"):
        entropy_losses.compute_loss(both, total_tokens=8, k=2, kind="cubed")


LOSSES = {
    "mutual_information": entropy_losses.mutual_information_loss,
    "entropy": entropy_losses.entropy_loss,
    "modality_local": entropy_losses.modality_local_loss,
    "modality_global": functools.partial(entropy_losses.modality_global_loss, experts=8.0),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_equals_finite_differences(name):
    h = 1e-5
    with jax.enable_x64(True):
        logits = np.asarray(random_logits((5, 6, 8)), np.float64)
        direction = np.random.default_rng(1).standard_normal((3, *logits.shape))

        def loss(x):
            return LOSSES[name](report(x, jnp.asarray(VALID)), total_tokens=TOKENS)

        gradient = jax.jit(jax.grad(loss))(jnp.asarray(logits))
        moved = jax.jit(jax.vmap(loss))
        up, down = (moved(jnp.asarray(logits[None] + s * h * direction)) for s in (1, -1))
        numeric = (np.asarray(up, np.float64) - np.asarray(down, np.float64)) / (2 * h)
    slopes = (direction * np.asarray(gradient)).sum((1, 2, 3))
    np.testing.assert_allclose(slopes, numeric, rtol=2e-3, atol=1e-6)
    assert np.abs(slopes).min() > 1e-4


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_valid_is_no_loss_and_sure_tokens_have_finite_gradients(name):
    def loss(logits, valid, tokens):
        return LOSSES[name](report(logits, valid), total_tokens=tokens)

    both = jax.jit(jax.value_and_grad(loss))
    logits = jnp.asarray(random_logits((5, 6, 8)))
    value, gradient = both(logits, jnp.zeros((5, 6), bool), 0.0)
    assert value == 0.0
    assert not np.asarray(gradient).any()
    value, gradient = both(logits * 1e4, jnp.asarray(VALID), float(TOKENS))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_means_over_tokens_add_up_over_unequal_microbatches():
    logits = random_logits((5, 6, 8))
    whole = entropy(report(logits, VALID), total_tokens=TOKENS)
    parts = [
        entropy(report(logits[a:b], VALID[a:b]), total_tokens=TOKENS)
        for a, b in ((0, 1), (1, 3), (3, 5))
    ]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-5)


def test_other_losses_are_averaged_over_microbatches_by_tokens():
    logits, halves = random_logits((5, 6, 8)), (slice(0, 2), slice(2, 5))
    reports = [report(logits[rows], VALID[rows], route=mass_route) for rows in halves]
    tokens = [float(r.row_tokens[0].sum()) for r in reports]
    for loss in (mutual_information, functools.partial(compute, k=2)):
        alone = [loss(r, total_tokens=t) for r, t in zip(reports, tokens, strict=True)]
        step = sum(loss(r, total_tokens=TOKENS) for r in reports)
        np.testing.assert_allclose(step, np.average(alone, weights=tokens), rtol=1e-5)
