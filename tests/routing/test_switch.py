import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import ConfigError
from moe.routing import switch
from tests.routing.cases import GOLDEN_LOGITS, GOLDEN_VALID, Case, random_logits

SWITCH = Case("switch", 1)


def test_choices_worked_out_by_hand():
    plan = SWITCH.route(GOLDEN_LOGITS, GOLDEN_VALID).plan
    np.testing.assert_array_equal(plan.expert[0, :, 0], [0, 0, 0, 1, 2, 0, 3, 0])
    np.testing.assert_allclose(plan.gate[0, 0], 0.6439, atol=5e-5)


def test_gate_is_between_a_fair_share_and_one():
    gate = SWITCH.route(random_logits((4, 16, 8))).plan.gate
    assert float(gate.min()) >= 1 / 8
    assert float(gate.max()) <= 1.0


def test_equals_topk_with_raw_probabilities_forward_and_backward():
    logits = random_logits()
    weight = random_logits((3, 6, 1), seed=1)
    a, b = SWITCH, Case("topk", 1, {"normalize": "none"})
    np.testing.assert_array_equal(a.route(logits).plan.expert, route_plan(b, logits).expert)
    gradients = [jax.grad(lambda x, c=c: (route_plan(c, x).gate * weight).sum()) for c in (a, b)]
    np.testing.assert_allclose(*(g(jnp.asarray(logits)) for g in gradients), atol=1e-7)


def route_plan(case, logits):
    return case.route(logits).plan


def test_more_than_one_expert_is_refused():
    with pytest.raises(ConfigError, match=r"router\.k=2.*exactly one.*router\.name='topk'"):
        switch.check(8, k=2)
