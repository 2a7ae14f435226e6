"""Every path equals the oracle: outputs, input gradient, gate gradient, gradients of the experts."""

import jax
import numpy as np
import pytest

from moe.dispatch.grouped import grouped
from moe.dispatch.reference import reference
from tests.dispatch.common import make_choices, make_experts, run


@pytest.mark.parametrize("skew", [0.0, 20.0])
def test_grouped_equals_oracle(skew):
    B, S, D, F, E, K = 2, 19, 8, 12, 6, 2
    x = jax.random.normal(jax.random.key(0), (B, S, D))
    choices = make_choices(jax.random.key(1), B, S, E, K, skew)
    experts = make_experts(jax.random.key(2), E, D, F)
    want, got = run(reference, x, choices, experts)[1], run(grouped, x, choices, experts)[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), want, got)
