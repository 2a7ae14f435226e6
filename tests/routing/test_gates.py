from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.routing.gates import LinearGate
from moe.routing.table import ROUTERS


@pytest.fixture
def gate():
    return LinearGate(16, 4, rngs=nnx.Rngs(0))


def tokens(dtype=jnp.float32):
    return jax.random.normal(jax.random.key(1), (2, 5, 16)).astype(dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_logits_are_the_float32_product_whatever_the_type_of_the_tokens(gate, dtype):
    x = tokens(dtype)
    expected = np.asarray(x, np.float64) @ np.asarray(gate.kernel[...], np.float64)
    assert gate(x).dtype == jnp.float32
    np.testing.assert_allclose(gate(x), expected, atol=1e-6)


def test_kernel_gives_logits_of_unit_scale():
    kernel = LinearGate(256, 64, rngs=nnx.Rngs(0)).kernel[...]
    assert kernel.dtype == jnp.float32
    np.testing.assert_allclose(kernel.std(), 256**-0.5, rtol=0.03)
    np.testing.assert_allclose(kernel.mean(), 0.0, atol=1e-3)


def test_names_of_the_axes_survive_stacking_and_splitting():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs):
        return LinearGate(16, 4, rngs=rngs)

    gates = stack(nnx.Rngs(0))
    assert gates.kernel.shape == (3, 16, 4)
    definition, state = nnx.split(gates, nnx.Param)
    merged = nnx.merge(definition, state)
    assert merged.kernel.get_metadata()["axes"] == ("D", "E")
    assert float(jnp.abs(gates.kernel[0] - gates.kernel[1]).max()) > 0


def test_jitter_acts_only_with_a_key_and_zero_jitter_is_none(gate):
    key = jax.random.key(2)
    np.testing.assert_array_equal(gate(tokens(), jitter=0.5), gate(tokens()))
    np.testing.assert_array_equal(gate(tokens(), jitter=0.0, key=key), gate(tokens()))
    noisy = gate(tokens(), jitter=0.5, key=key)
    assert float(jnp.abs(noisy - gate(tokens())).max()) > 1e-3
    np.testing.assert_array_equal(noisy, gate(tokens(), jitter=0.5, key=key))


def test_jitter_is_multiplicative_uniform_within_its_bounds():
    gate = LinearGate(1, 1, rngs=nnx.Rngs(0))
    gate.kernel[...] = jnp.ones((1, 1))
    x = gate(jnp.full((1, 20000, 1), 3.0), jitter=0.1, key=jax.random.key(0)) / 3.0
    assert 0.9 <= float(x.min()) < 0.901
    assert 1.099 < float(x.max()) <= 1.1 + 1e-6
    np.testing.assert_allclose(x.mean(), 1.0, atol=5 * 0.1 / np.sqrt(3 * 20000))
    np.testing.assert_allclose(x.std(), 0.1 / np.sqrt(3), rtol=0.02)


def test_jitter_may_be_traced_without_recompiling(gate):
    traces = []

    @jax.jit
    def logits(x, jitter):
        traces.append(1)
        return gate(x, jitter=jitter, key=jax.random.key(0))

    logits(tokens(), jnp.float32(0.0))
    logits(tokens(), jnp.float32(0.3))
    assert len(traces) == 1


@pytest.mark.parametrize("name", [n for n, r in ROUTERS.items() if r.learned])
def test_the_task_reaches_the_kernel_through_every_learned_router(gate, name):
    router = ROUTERS[name]
    valid = jnp.ones((2, 5), bool)
    definition, params = nnx.split(gate, nnx.Param)

    def loss(params):
        logits = nnx.merge(definition, params)(tokens())
        plan = router.route(logits, valid, k=1 if name == "switch" else 2).plan
        return (plan.gate[..., 0] ** 2).sum()

    gradient = jax.jit(jax.grad(loss))(params)
    assert float(jnp.abs(gradient["kernel"][...]).max()) > 1e-4
