"""A model of pairs: two vectors a row, of length 1, and the temperature of their similarities."""

import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from moe.model.head import PairHead
from tests import tiny

B, S, D = 3, 8, 6
SEGMENTS = jnp.asarray(
    [[1, 1, 1, 2, 2, 2, 2, 2], [1, 2, 2, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]]
)


def head(log_scale: float | None = None) -> PairHead:
    made = PairHead(D, rngs=nnx.Rngs(params=0))
    if log_scale is not None:
        made.log_scale[...] = jnp.float32(log_scale)
    return made


def hidden() -> np.ndarray:
    """Anything at padding."""
    x = np.random.default_rng(0).normal(size=(B, S, D)).astype(np.float32)
    return np.where(np.asarray(SEGMENTS)[..., None] > 0, x, np.inf)


def test_means_of_segments_projected_to_length_1():
    made, x = head(), hidden()
    got = made(jnp.asarray(x), SEGMENTS)
    for row in range(B):
        for number in (1, 2):
            members = [x[row, s] for s in range(S) if SEGMENTS[row, s] == number]
            if members:
                y = np.mean(members, axis=0) @ np.asarray(made.projection[...])
                expected = y / np.sqrt((y * y).sum())
            else:
                expected = np.zeros(D)
            np.testing.assert_allclose(got[row, number - 1], expected, atol=1e-6)


def test_a_segment_that_is_not_there_has_finite_gradients():
    x = jnp.where(SEGMENTS[..., None] > 0, jnp.asarray(hidden()), 0.0)
    graph, state = nnx.split(head())

    def loss(state, x):
        return (nnx.merge(graph, state)(x, SEGMENTS) * jnp.arange(1.0, D + 1)[None, None]).sum()

    slope, x_slope = jax.jit(jax.grad(loss, argnums=(0, 1)))(state, x)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((slope, x_slope)))
    assert np.abs(slope["projection"][...]).max() > 0
    np.testing.assert_array_equal(np.abs(x_slope).max(axis=-1) > 0, SEGMENTS > 0)


def test_the_scale_starts_at_clips_and_stays_within_100():
    np.testing.assert_allclose(head().scale(), 1 / 0.07, rtol=1e-6)
    assert math.isclose(head(2.0).scale(), math.exp(2.0), rel_tol=1e-6)
    np.testing.assert_allclose(head(9.0).scale(), 100.0, rtol=1e-6)

    def slope(log_scale: float, sign: float) -> float:
        graph, state = nnx.split(head(log_scale))
        gradient = jax.grad(lambda state: sign * nnx.merge(graph, state).scale())(state)
        return float(gradient["log_scale"][...])

    np.testing.assert_allclose(slope(2.0, -1.0), -math.exp(2.0), rtol=1e-6)
    # Descent would go further beyond, or back.
    assert slope(9.0, -1.0) == 0.0
    np.testing.assert_allclose(slope(9.0, 1.0), 100.0, rtol=1e-6)


def test_the_vocabulary_has_no_head_in_a_model_of_pairs():
    model = tiny.model("task.name=match", "model.num_layers=1")
    batch = tiny.batch(((7, 9), (3, 6), (8, 8)))
    out = model(batch)
    assert "head" not in model.params
    assert out.logits is None
    np.testing.assert_allclose(jnp.square(out.pair).sum(axis=-1), 1.0, rtol=1e-5)
    # A segment knows nothing of the other.
    second = batch.segments == 2
    other = jnp.where(second, (batch.tokens + 5) % tiny.VOCAB, batch.tokens)
    moved = np.abs(model(batch._replace(tokens=other)).pair - out.pair).max(axis=-1)
    assert moved[:, 0].max() < 1e-6
    assert moved[:, 1].min() > 1e-3
