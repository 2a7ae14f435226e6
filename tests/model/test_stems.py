"""Stems against plain NumPy loops, with their gradients, and what padding of frames may not do."""

import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import ConfigError
from moe.model.spec import Stem
from moe.model.stems import check, make_stem, stem_positions

B, D = 2, 6
STEMS = {
    "linear": Stem("patches", frames=4, size=5),
    "perceptron": Stem("patches", frames=4, size=5, hidden=7),
    "conv": Stem("conv", frames=16, size=5),
}


def made(stem: Stem) -> tuple[nnx.GraphDef, dict]:
    """The module with numbers drawn by NumPy."""
    rng = np.random.default_rng(0)
    graph, state = nnx.split(nnx.eval_shape(lambda: make_stem(stem, D, nnx.Rngs(params=0))))
    return graph, jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), state)


def run(graph: nnx.GraphDef, state: nnx.State, frames, valid) -> jax.Array:
    return nnx.merge(graph, state)(jnp.asarray(frames), jnp.asarray(valid))


def frames_of(stem: Stem, filled=(4, 4)) -> tuple[np.ndarray, np.ndarray]:
    """Frames, of which the first positions are real: [B N F] and [B P]."""
    frames = np.random.default_rng(1).normal(size=(B, stem.frames, stem.size)).astype(np.float32)
    valid = np.arange(stem_positions(stem))[None] < np.asarray(filled)[:, None]
    group = stem.frames // stem_positions(stem)
    return np.where(valid.repeat(group, axis=1)[..., None], frames, 0.0), valid


def plain_gelu(x: np.ndarray) -> np.ndarray:
    """The approximation by tanh."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def plain_patches(p: dict, frames: np.ndarray) -> np.ndarray:
    out = np.zeros((*frames.shape[:2], D))
    for b, n in np.ndindex(*frames.shape[:2]):
        x = frames[b, n]
        if "wi" in p:
            x = plain_gelu(x @ p["wi"])
        out[b, n] = x @ p["wo"] + p["position"][n]
    return out


def plain_convolution(p: dict, x: np.ndarray, steps: int) -> np.ndarray:
    """One row `[N X]`, of which `steps` outputs are asked for."""
    out = np.zeros((steps, D))
    for i in range(steps):
        total = p["bias"].copy()
        for k, at in enumerate((2 * i - 1, 2 * i, 2 * i + 1)):
            if 0 <= at < len(x):
                total += x[at] @ p["kernel"][k]
        out[i] = plain_gelu(total)
    return out


def plain_conv(p: dict, frames: np.ndarray, valid: np.ndarray) -> list[np.ndarray]:
    """Each row by itself, as long as it is."""
    rows = []
    for row, count in zip(frames, valid.sum(axis=1), strict=True):
        hidden = plain_convolution(p["first"], row[: 4 * count], 2 * count)
        rows.append(plain_convolution(p["second"], hidden, count))
    return rows


def plain(p: dict, frames: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """The positions that are real, one row after another."""
    if "first" in p:
        return np.concatenate(plain_conv(p, frames, valid))
    return plain_patches(p, frames)[valid]


@pytest.mark.parametrize("name", STEMS)
def test_equals_plain_loops_and_their_slope(name):
    stem = STEMS[name]
    graph, state = made(stem)
    frames, valid = frames_of(stem, (4, 2))
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(state))
    probe = np.cos(np.arange(valid.sum() * D)).reshape(-1, D)

    def loss(state, frames):
        out = run(graph, state, frames, valid)
        return (out[valid] * probe).sum(), out

    (_, out), (slope, frame_slope) = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    )(state, frames)
    assert out.shape == (B, 4, D)
    np.testing.assert_allclose(out[valid], plain(wide, frames.astype(np.float64), valid), atol=1e-5)

    rng, h = np.random.default_rng(2), 1e-5
    way = jax.tree.map(lambda a: rng.normal(size=a.shape), wide)
    real = frames != 0.0
    frame_way = rng.normal(size=frames.shape) * real

    def at(step: float) -> float:
        moved = jax.tree.map(lambda a, b: a + step * b, wide, way)
        return (plain(moved, frames + step * frame_way, valid) * probe).sum()

    along = jax.tree.map(lambda a, b: (np.asarray(a) * b).sum(), nnx.to_pure_dict(slope), way)
    total = sum(jax.tree.leaves(along)) + (np.asarray(frame_slope) * frame_way).sum()
    np.testing.assert_allclose(total, (at(h) - at(-h)) / (2 * h), rtol=1e-4)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(slope))


@pytest.mark.parametrize("name", STEMS)
def test_what_frames_of_padding_hold_changes_nothing(name):
    stem = STEMS[name]
    graph, state = made(stem)
    frames, valid = frames_of(stem, (3, 1))
    group = stem.frames // stem_positions(stem)
    junk = np.where(valid.repeat(group, axis=1)[..., None], frames, np.nan).astype(np.float32)
    one, two = (run(graph, state, a, valid) for a in (frames, junk))
    np.testing.assert_array_equal(one[valid], two[valid])


@pytest.mark.parametrize("name", STEMS)
def test_runs_in_the_dtype_of_its_frames(name):
    stem = STEMS[name]
    graph, state = made(stem)
    frames, valid = frames_of(stem)
    half = run(graph, state, jnp.asarray(frames, jnp.bfloat16), valid)
    assert half.dtype == jnp.bfloat16
    whole = np.asarray(run(graph, state, frames, valid))
    np.testing.assert_allclose(half.astype(jnp.float32), whole, atol=0.03 * np.abs(whole).max())


@pytest.mark.parametrize(
    ("stem", "words"),
    [
        (Stem("pixels", 4, 5), "stem 'pixels' is not one of patches, conv"),
        (Stem("conv", 10, 5), "10 frames a row .* The next number that fits is 12"),
        (Stem("conv", 0, 5), "0 frames a row .* The next number that fits is 4"),
        (Stem("conv", 8, 5, hidden=3), "only 'patches' has a hidden layer"),
        (Stem("patches", 17, 5), "data.sequence_length=16 is less than the 17 positions"),
    ],
)
def test_a_stem_that_cannot_work_is_refused(stem, words):
    with pytest.raises(ConfigError, match=words):
        check(stem, 16)
    check(Stem("conv", 64, 5), 16)
