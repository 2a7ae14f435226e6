from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.routing.gates import LinearGate, jittered, project
from moe.routing.table import ROUTERS
from tests.routing.cases import CASES


@pytest.fixture
def gate():
    return LinearGate(16, 4, rngs=nnx.Rngs(0))


def tokens(dtype=jnp.float32):
    return jax.random.normal(jax.random.key(1), (2, 5, 16)).astype(dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_logits_are_the_float32_product_whatever_the_type_of_the_tokens(gate, dtype):
    x = tokens(dtype)
    expected = np.asarray(x, np.float64) @ np.asarray(gate.kernel[...], np.float64)
    assert gate(x).logits.dtype == jnp.float32
    np.testing.assert_allclose(gate(x).logits, expected, atol=1e-6)


def test_the_flat_product_and_its_gradients_are_those_of_the_product_with_rows_apart(gate):
    def rows_apart(x, kernel):
        return jnp.einsum("bsd,de->bse", x, kernel, precision="highest")

    x, kernel = tokens(), gate.kernel[...]
    (one, pull_one), (two, pull_two) = (jax.vjp(f, x, kernel) for f in (project, rows_apart))
    cotangent = jnp.cos(one)
    for a, b in zip((one, *pull_one(cotangent)), (two, *pull_two(cotangent)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


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


def test_jitter_is_float32_noise_that_its_key_decides_and_zero_is_none():
    key = jax.random.key(2)
    np.testing.assert_array_equal(jittered(tokens(), 0.0, key), tokens())
    noisy = jittered(tokens(jnp.bfloat16), 0.5, key)
    assert noisy.dtype == jnp.float32
    assert float(jnp.abs(noisy - tokens()).max()) > 1e-3
    np.testing.assert_array_equal(noisy, jittered(tokens(jnp.bfloat16), 0.5, key))


def test_jitter_is_multiplicative_uniform_within_its_bounds():
    x = jittered(jnp.full((1, 20000, 1), 3.0), 0.1, jax.random.key(0)) / 3.0
    assert 0.9 <= float(x.min()) < 0.901
    assert 1.099 < float(x.max()) <= 1.1 + 1e-6
    np.testing.assert_allclose(x.mean(), 1.0, atol=5 * 0.1 / np.sqrt(3 * 20000))
    np.testing.assert_allclose(x.std(), 0.1 / np.sqrt(3), rtol=0.02)


def test_jitter_may_be_traced_without_recompiling():
    traces = []

    @jax.jit
    def noisy(x, jitter):
        traces.append(1)
        return jittered(x, jitter, jax.random.key(0))

    noisy(tokens(), jnp.float32(0.0))
    noisy(tokens(), jnp.float32(0.3))
    assert len(traces) == 1


@pytest.mark.parametrize("name", [n for n, r in ROUTERS.items() if r.gate is LinearGate])
def test_the_task_reaches_the_kernel_through_every_router_with_a_linear_gate(name):
    cases = [case for case in CASES if case.name == name]
    definition, params = nnx.split(LinearGate(16, 8, rngs=nnx.Rngs(0)), nnx.Param)

    def loss(params, case):
        plan = case.route(nnx.merge(definition, params)(tokens()).logits).plan
        return ((plan.gate if hasattr(plan, "gate") else plan[0])[..., 0] ** 2).sum()

    for case in cases:
        gradient = jax.grad(loss)(params, case)
        assert float(jnp.abs(gradient["kernel"][...]).max()) > 1e-5, case
