"""Saturation, churn and the causal gap, measured on a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.dispatch.reference import reference
from moe.evaluation import routing_analysis as analysis
from moe.evaluation.compare import (
    Comparison,
    Numbers,
    causal_metrics,
    compare,
    make_comparison_step,
    overlap_sums,
    saturation_metrics,
)
from tests import tiny

ROWS = tiny.batch(((16,), (7, 6), (11,), (16,)))


def measure(model: tiny.Model, one: Numbers, two: Numbers, **options: bool) -> Comparison:
    step = make_comparison_step(
        model.skeleton, reference, jnp.ones(tiny.VOCAB, jnp.int32), **options
    )
    return compare(
        jax.jit(step),
        one,
        two,
        [jax.tree.map(lambda a, i=i: a[i : i + 2], ROWS) for i in (0, 2)],
        jax.random.key(0),
        to_device=lambda batch: batch,
    )


def test_saturation_against_another_checkpoint():
    model = tiny.model()
    now, then = (Numbers(*tiny.numbers(model.skeleton, seed)) for seed in (0, 1))
    sums = measure(model, now, then)
    found = saturation_metrics(sums)
    one, two = (np.asarray(model.forward(*n, ROWS, {}).reports.expert) for n in (now, then))
    counts = analysis.overlap_counts(one, two, 8)
    for a, b in zip(sums.overlap, counts, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(found["routing/per_layer/saturation"], analysis.saturation(counts))
    assert found["routing/saturation"] + found["routing/churn"] == pytest.approx(1.0)
    assert 0.05 < found["routing/saturation"] < 0.6, "unrelated routers share 2 of 8 by chance"
    mine = saturation_metrics(measure(model, now, now))
    assert mine["routing/saturation"] == 1.0
    assert mine["routing/churn"] == 0.0


def test_twins_on_choices_with_holes():
    rng = np.random.default_rng(0)
    one, two = (np.where(rng.random((2, 3, 9, 3)) < 0.3, -1, rng.integers(0, 5, (2, 3, 9, 3)))
                for _ in range(2))  # fmt: skip
    twin = overlap_sums(jnp.asarray(one), jnp.asarray(two), 5)
    for a, b in zip(twin, analysis.overlap_counts(one, two, 5), strict=True):
        np.testing.assert_array_equal(a, b)


def test_causal_router_has_no_gap():
    model = tiny.model()
    mine = Numbers(model.params, model.router)
    found = causal_metrics(measure(model, mine, mine, training_form=True))
    assert found["routing/causal_gap"] == 0.0
    assert found["routing/causal_flip_rate"] == 0.0


def test_router_that_balances_over_the_row_has_a_gap():
    model = tiny.model("router.name=sinkhorn", "router.k=1")
    mine = Numbers(model.params, model.router)
    sums = measure(model, mine, mine, training_form=True)
    found = causal_metrics(sums)
    gap = (sums.nll - sums.reference_nll) / ROWS.valid.sum()
    assert found["routing/causal_gap"] == pytest.approx(float(gap))
    assert abs(found["routing/causal_gap"]) > 1e-3
    assert 0.05 < found["routing/causal_flip_rate"] < 1.0
