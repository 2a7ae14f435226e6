"""Temporary memory from the schedule, beside what XLA itself reports."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from moe.dryrun.buffers import largest, peak
from moe.dryrun.hlo import parse
from tests.dryrun.texts import read

B, D, F, L = 256, 128, 512, 6


def compiled(f, *args, donate=()):
    made = jax.jit(f, donate_argnums=donate).lower(*args).compile()
    return parse(made.as_text(), own=("moe/", "tests/")), made.memory_analysis().temp_size_in_bytes


def loss(weights, x):
    def layer(x, weights):
        wi, wo = weights
        return x + jnp.tanh(x @ wi) @ wo, None

    return (jax.lax.scan(layer, x, weights)[0] ** 2).sum()


def arguments():
    return (jnp.ones((L, D, F)), jnp.ones((L, F, D))), jnp.ones((B, D))


@pytest.mark.parametrize("remat", [False, True])
def test_the_peak_of_a_scanned_gradient_is_near_xlas_own(remat):
    f = jax.checkpoint(loss) if remat else loss
    module, stated = compiled(jax.grad(f), *arguments())
    assert 0.8 * stated <= peak(module).bytes <= 1.25 * stated


def test_a_loop_updates_its_carry_in_place():
    def step(weights, x):
        new = jax.tree.map(lambda w, g: w - 0.1 * g, weights, jax.grad(loss)(weights, x))
        return new

    module, stated = compiled(step, *arguments(), donate=(0,))
    assert 0.7 * stated <= peak(module).bytes <= 1.3 * stated


def test_what_is_alive_at_the_peak():
    module, _ = compiled(jax.grad(loss), *arguments())
    found = peak(module)
    assert found.bytes >= sum(each.bytes for each in found.buffers)
    # The activations of all layers, kept for the backward pass: tanh's output is the widest.
    first = found.buffers[0]
    assert (first.shape.dtype, first.shape.dims, first.bytes) == ("f32", (L, B, F), L * B * F * 4)
    # The line of the layer, not of the scan that keeps its values.
    lines = Path(__file__).read_text().splitlines()
    assert first.source.file == "tests/dryrun/test_buffers.py"
    assert "jnp.tanh(x @ wi)" in lines[first.source.line - 1]
    assert first.phase == "forward"


def test_chained_elementwise_work_keeps_one_array():
    def f(x):
        for _ in range(4):
            x = jnp.sort(jnp.tanh(x), axis=0)
        return x.sum()

    x = jnp.ones((1024, 64))
    module, stated = compiled(f, x)
    assert x.nbytes <= stated <= 2.2 * x.nbytes
    assert x.nbytes <= peak(module).bytes <= 2.2 * x.nbytes


def test_the_largest_arrays_and_how_often_they_are_made():
    module, _ = compiled(jax.grad(loss), *arguments())
    found = largest(module)
    assert [each.bytes for each in found] == sorted((each.bytes for each in found), reverse=True)
    assert found[0].bytes == L * B * F * 4
    in_loop = [each for each in found if each.shape.dims == (B, F)]
    assert in_loop
    assert all(each.count % L == 0 for each in in_loop)


def test_only_main_memory_of_a_tpu_counts():
    """All arrays of this module but the loop's counter lie in VMEM."""
    assert peak(read("tpu_async")).bytes <= 2 * 512
    module = read("tpu_grouped")
    assert largest(module)[0].shape.dims == (8, 512, 1024)


def test_an_asynchronous_copy_holds_its_result_until_it_is_read():
    module = read("cuda_exchange")
    found = peak(module)
    # The exchange's result, the scattered sum that reads it and the slice of the other operand.
    assert found.bytes == (8192 * 512 + 2048 * 512 + 4 * 512 * 256) * 2 + 4
    assert found.buffers[0].name == "all-to-all-start"
