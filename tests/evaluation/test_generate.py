"""Sampling: the most likely token, the nucleus, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.dispatch.reference import reference
from moe.errors import ConfigError
from moe.evaluation.generate import generate, sample, until
from moe.training.state import bind
from tests import tiny

PROBS = np.array([0.15, 0.4, 0.05, 0.3, 0.1])
LOGITS = jnp.log(jnp.asarray(PROBS, jnp.float32))


@jax.jit
def draws(temperature: jax.Array, top_p: jax.Array) -> jax.Array:
    keys = jax.random.split(jax.random.key(0), 4000)
    return jax.vmap(lambda key: sample(LOGITS, temperature, top_p, key))(keys)


def shares(temperature: float, top_p: float) -> np.ndarray:
    drawn = np.asarray(draws(jnp.float32(temperature), jnp.float32(top_p)))
    return np.bincount(drawn, minlength=5) / len(drawn)


def test_temperature_zero_takes_the_most_likely():
    np.testing.assert_array_equal(shares(0.0, 1.0), [0, 1, 0, 0, 0])


@pytest.mark.parametrize(
    ("top_p", "nucleus"),
    [(1.0, [0, 1, 2, 3, 4]), (0.8, [0, 1, 3]), (0.69, [1, 3]), (0.39, [1]), (1e-6, [1])],
)
def test_samples_from_the_smallest_set_that_reaches_top_p(top_p, nucleus):
    expected = np.zeros(5)
    expected[nucleus] = PROBS[nucleus] / PROBS[nucleus].sum()
    np.testing.assert_allclose(shares(1.0, top_p), expected, atol=0.03)
    assert np.flatnonzero(shares(1.0, top_p)).tolist() == nucleus


def test_temperature_sharpens():
    squared = PROBS**2 / (PROBS**2).sum()
    np.testing.assert_allclose(shares(0.5, 1.0), squared, atol=0.03)


def test_until_the_boundary():
    np.testing.assert_array_equal(until(np.array([3, 4, 9, 5]), 9), [3, 4])
    np.testing.assert_array_equal(until(np.array([3, 4]), 9), [3, 4])
    assert len(until(np.array([9, 4]), 9)) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": []}, "at least one token"),
        ({"length": 0}, "length=0 must be at least 1"),
        ({"temperature": -0.1}, r"temperature=-0\.1"),
        ({"top_p": 0.0}, r"top_p=0\.0"),
        ({"top_p": 1.1}, r"top_p=1\.1"),
    ],
)
def test_refuses_numbers_out_of_range(changes, message):
    model = tiny.model("model.num_layers=1")
    arguments = {"prompt": [1], "length": 2, "temperature": 1.0, "top_p": 1.0} | changes
    prompt = arguments.pop("prompt")
    whole = bind(model.skeleton, model.params, model.router)
    with pytest.raises(ConfigError, match=message):
        generate(whole, reference, prompt, key=jax.random.key(0), **arguments)
