"""Every path equals the oracle: outputs, input gradient, gate gradient, gradients of the experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.dispatch.grouped import grouped
from moe.dispatch.reference import reference
from tests.dispatch.common import make_choices, make_experts, swiglu


def run(path, x, choices, experts):
    """Output and all gradients of a random projection of the output."""
    probe = jax.random.normal(jax.random.key(9), x.shape)

    def loss(x, gate, experts):
        output = path(x, choices._replace(gate=gate), experts, swiglu).output
        return (output.astype(jnp.float32) * probe).sum(), output

    grads, output = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(
        x, choices.gate, experts
    )
    return output, grads


@pytest.mark.parametrize("skew", [0.0, 20.0])
def test_grouped_equals_oracle(skew):
    B, S, D, F, E, K = 2, 19, 8, 12, 6, 2
    x = jax.random.normal(jax.random.key(0), (B, S, D))
    choices = make_choices(jax.random.key(1), B, S, E, K, skew)
    experts = make_experts(jax.random.key(2), E, D, F)
    want, got = run(reference, x, choices, experts), run(grouped, x, choices, experts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), want, got)
