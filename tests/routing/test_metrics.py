import json

import jax
import numpy as np
import pytest

from moe.routing import metrics
from tests.routing.cases import GOLDEN_LOGITS, GOLDEN_VALID, Case, random_logits, stacked_report

NAMES = {
    "max_violation", "min_violation", "load_cv", "load_entropy", "effective_experts",
    "effective_experts_inverse_square", "gini", "dead_experts", "drop_rate", "entropy",
    "confidence", "margin", "logit_max", "lse_squared", "choices",
}  # fmt: skip
totals = jax.jit(metrics.totals)
TOPK = Case("topk", 3, {"normalize": "renormalize"})


@pytest.mark.parametrize(
    ("counts", "violation", "cv", "effective", "inverse_square", "gini", "dead"),
    [
        ((5, 1, 1, 1), 1.5, 0.8660, 2.9257, 2.2857, 0.375, 0),
        ((7, 4, 3, 2), 0.75, 0.4677, 3.6040, 3.2821, 0.25, 0),
        ((3, 3, 3, 3), 0, 0, 4, 4, 0, 0),
        ((0, 9, 0, 0), 3, np.sqrt(3), 1, 1, 0.75, 3),
    ],
)
def test_load_worked_out_by_hand(counts, violation, cv, effective, inverse_square, gini, dead):
    m = metrics.load_metrics(np.array([counts]))
    expected = {
        "max_violation": violation,
        "min_violation": 1 - 4 * min(counts) / sum(counts),
        "load_cv": cv,  # of the population: 0.8660, where the sample's would be 1
        "load_entropy": np.log(effective) / np.log(4),
        "effective_experts": effective,
        "effective_experts_inverse_square": inverse_square,
        "gini": gini,
        "dead_experts": dead,
    }
    assert set(m) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(m[name], [value], atol=5e-5, err_msg=name)


def test_an_expert_is_dead_below_a_tenth_of_a_fair_share():
    counts = np.array([[1000 - 26, 26, 1000, 2000], [1000 - 24, 24, 1000, 2000]])
    np.testing.assert_array_equal(metrics.load_metrics(counts)["dead_experts"], [1, 1])
    np.testing.assert_array_equal(
        metrics.load_metrics(np.array([[101, 1299, 1300, 1300]]))["dead_experts"], [0]
    )


def test_summary_of_the_golden_tokens():
    routing = Case("topk", 2, {"normalize": "none"}).route(GOLDEN_LOGITS)
    kept = routing.plan.valid.copy()
    kept[0, 0, 1] = kept[0, 5] = False
    summary = metrics.summarize(totals(stacked_report(routing, GOLDEN_VALID, kept)))
    expected = {"drop_rate": 3 / 16, "entropy": 1.0633, "lse_squared": 6.0829, "logit_max": 2.5}
    expected |= {"confidence": np.asarray(routing.probs).max(-1).mean(), "max_violation": 0.75}
    for name, value in expected.items():
        np.testing.assert_allclose(summary[f"routing/{name}"], value, atol=5e-5, err_msg=name)
    assert summary["routing/load"] == [[7 / 16, 4 / 16, 3 / 16, 2 / 16]]


def test_summary_has_every_key_as_plain_numbers_and_means_over_layers():
    reports = [
        stacked_report(TOPK.route(random_logits(seed=i)), np.ones((3, 6), bool)) for i in (0, 1)
    ]
    summary = metrics.summarize(totals(jax.tree.map(lambda *x: np.concatenate(x), *reports)))
    assert set(summary) == {"routing/load"} | {
        f"routing/{prefix}{name}" for prefix in ("", "per_layer/") for name in NAMES
    }
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    for name in NAMES:
        layers = summary[f"routing/per_layer/{name}"]
        assert len(layers) == 2
        assert summary[f"routing/{name}"] == pytest.approx(np.mean(layers))
    assert np.array(summary["routing/load"]).shape == (2, 8)
    np.testing.assert_allclose(np.sum(summary["routing/load"], axis=1), 1.0)
    alone = metrics.summarize(totals(reports[1]))
    assert alone["routing/gini"] == summary["routing/per_layer/gini"][1]


def test_totals_of_parts_add_up_to_the_whole_on_device_and_on_host():
    valid = np.arange(6) < np.array([[6], [3], [5]])
    logits = random_logits()
    whole = totals(stacked_report(TOPK.route(logits, valid), valid))
    parts = [
        totals(stacked_report(TOPK.route(logits[r], valid[r]), valid[r]))
        for r in (slice(0, 1), slice(1, 3))
    ]
    on_device = jax.jit(metrics.add)(*parts)
    on_host = metrics.add(*map(metrics.collect, parts))
    assert all(x.dtype == np.float64 for x in jax.tree.leaves(on_host))
    for joined in (on_device, on_host):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), joined, whole)
    assert whole.requested.dtype == np.int32


def test_counts_beyond_float32_stay_exact():
    one = metrics.collect(
        totals(stacked_report(TOPK.route(random_logits()), np.ones((3, 6), bool)))
    )
    many = one._replace(requested=np.full((1, 8), 2.0**40))
    assert (metrics.add(many, one).requested - many.requested == one.requested).all()


def test_no_token_gives_finite_numbers():
    empty = totals(stacked_report(TOPK.route(random_logits()), np.zeros((3, 6), bool)))
    summary = metrics.summarize(empty)
    json.dumps(summary, allow_nan=False)
    assert summary["routing/drop_rate"] == summary["routing/entropy"] == 0
    assert summary["routing/dead_experts"] == 8


def test_one_expert_is_balanced():
    m = metrics.load_metrics(np.array([[5]]))
    assert [m[n].item() for n in ("max_violation", "load_entropy", "gini")] == [0, 1, 0]
