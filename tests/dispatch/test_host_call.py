"""NumPy functions as operations of XLA: on its own buffers, with errors that come back as errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.dispatch import host_call


def scale_and_count(x, out, count):
    out[...] = 2 * x
    count[...] = x.size


def fail(x, out):
    raise ValueError(f"{x.shape} is no good")


host_call.register("test_scale_and_count", scale_and_count)
host_call.register("test_fail", fail)


def scaled(x):
    results = jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((), jnp.int32)
    return jax.ffi.ffi_call("test_scale_and_count", results)(x)


@pytest.mark.parametrize("shape", [(), (3,), (2, 0, 4), (5, 7, 2)])
def test_operands_and_results_are_xlas_buffers(shape):
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    out, count = jax.jit(scaled)(x)
    np.testing.assert_array_equal(out, 2 * np.asarray(x))
    assert count == x.size


def test_runs_inside_a_loop_and_on_every_device():
    devices = jax.devices()[:4]
    for device in devices:
        x = jax.device_put(jnp.arange(6.0), device)
        out = jax.jit(lambda x: jax.lax.fori_loop(0, 5, lambda _, x: scaled(x)[0], x))(x)
        np.testing.assert_array_equal(out, 32 * np.arange(6.0))
        assert out.devices() == {device}


def test_an_exception_fails_the_computation_with_its_words():
    call = jax.ffi.ffi_call("test_fail", jax.ShapeDtypeStruct((2,), jnp.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"ValueError: \(2,\) is no good"):
        jax.block_until_ready(jax.jit(call)(jnp.ones(2)))
