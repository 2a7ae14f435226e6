"""The causal gap in every evaluation, and who may generate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.dispatch.plans import by_plan
from moe.dispatch.reference import reference
from moe.errors import ConfigError
from moe.evaluation import causality
from moe.evaluation.compare import Numbers, causal_metrics, compare, make_comparison_step
from moe.evaluation.evaluate import Evaluation, evaluate, make_eval_step
from moe.model.build import model_spec
from moe.routing.table import ROUTERS
from tests import tiny

DISPATCH = by_plan(reference)
SINKHORN = ("router.name=sinkhorn", "router.k=1", "model.num_layers=1")
ROWS = tiny.batch(((16,), (7, 6), (11,), (16,)))
BYTES = jnp.ones(tiny.VOCAB, jnp.int32)


@functools.cache
def measured(*overrides: str) -> Evaluation:
    model = tiny.model(*overrides, dispatch=DISPATCH)
    gap = causality.has_causal_gap(model.spec)
    step = make_eval_step(model.skeleton, DISPATCH, BYTES, 2, causal_gap=gap)
    return evaluate(
        jax.jit(step),
        model.params,
        model.router,
        [ROWS],
        jax.random.key(0),
        domains=("code", "prose"),
        to_device=lambda batch: batch,
    )


def test_gap_is_that_of_the_two_forms():
    found = measured(*SINKHORN).metrics
    model = tiny.model(*SINKHORN, dispatch=DISPATCH)
    mine = Numbers(model.params, model.router)
    step = make_comparison_step(model.skeleton, DISPATCH, BYTES, training_form=True)
    key = jax.random.key(0)
    sums = compare(jax.jit(step), mine, mine, [ROWS], key, to_device=lambda batch: batch)
    for name, value in causal_metrics(sums).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5)
    assert abs(found["routing/causal_gap"]) > 1e-3
    assert 0.05 < found["routing/causal_flip_rate"] < 1.0


def test_causal_router_measures_no_gap():
    assert "routing/causal_gap" not in measured("model.num_layers=1").metrics


def shape(name: str):
    overrides = [f"router.name={name}", "model.num_layers=1"]
    return model_spec(tiny.config(*overrides), tiny.VOCAB, np.arange(tiny.VOCAB), training=False)


@pytest.mark.parametrize("name", ROUTERS)
def test_generation_refuses_exactly_the_routers_without_a_causal_form(name):
    row, spec = ROUTERS[name], shape("topk")
    spec = spec._replace(router=spec.router._replace(name=name))
    record = causality.causality_record(spec)
    assert record["router"] == row.causality
    if row.causality == "C3" and not row.causal_in_eval:
        assert record["causal_form"] is False
        assert not causality.has_causal_gap(spec)
        with pytest.raises(ConfigError, match=f"router.name='{name}' cannot generate"):
            causality.check_generation(spec)
    else:
        assert record["causal_form"] is True
        assert causality.has_causal_gap(spec) == (row.causality == "C3")
        causality.check_generation(spec)


def test_there_is_a_router_of_each_kind():
    kinds = {(row.causality, row.causal_in_eval) for row in ROUTERS.values()}
    assert kinds >= {("C0", True), ("C1", True), ("C3", True), ("C3", False)}


def test_classifier_and_dense_model():
    spec = shape("topk")
    classifier = spec._replace(classes=2)
    assert causality.causality_record(classifier)["causal_form"] is None
    with pytest.raises(ConfigError, match="classify"):
        causality.check_generation(classifier)
    dense = spec._replace(pattern=("dense",))
    assert causality.causality_record(dense) == {"router": None, "causal_form": True}
    causality.check_generation(dense)
