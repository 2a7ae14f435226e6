import jax.numpy as jnp
import numpy as np

from moe.routing.balance import update_bias


def test_loaded_experts_fall_and_idle_ones_rise_by_one_rate():
    bias = update_bias(jnp.array([0.5, 0.0, -0.5, 0.1]), jnp.array([9, 5, 1, 5]), 0.01)
    np.testing.assert_allclose(bias, [0.49, 0.0, -0.49, 0.1], rtol=1e-6)


def test_the_step_does_not_depend_on_how_much_was_counted():
    counts = jnp.array([9, 5, 1, 2])
    np.testing.assert_array_equal(
        update_bias(jnp.zeros(4), counts, 0.01), update_bias(jnp.zeros(4), counts * 1000, 0.01)
    )


def test_balance_and_empty_batches_leave_it():
    bias = jnp.array([0.5, 0.0, -0.5, 0.1])
    for counts in (jnp.full(4, 7), jnp.zeros(4, jnp.int32)):
        np.testing.assert_array_equal(update_bias(bias, counts, 0.01), bias)


def test_layers_are_independent_and_centring_shifts_each_by_a_constant():
    bias, counts = jnp.array([[0.5, 0.1, 0.0], [1.0, 0.0, 0.0]]), jnp.array([[9, 1, 1], [0, 5, 7]])
    plain, centred = (update_bias(bias, counts, 0.01, c) for c in (0.0, 1.0))
    np.testing.assert_allclose(plain[1], update_bias(bias[1], counts[1], 0.01))
    np.testing.assert_allclose(centred.mean(-1), 0.0, atol=1e-7)
    np.testing.assert_allclose(np.diff(centred), np.diff(plain), atol=1e-6)
