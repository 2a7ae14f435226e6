"""Attention against a plain NumPy loop, and what rotary positions promise."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.model.attention import Attention, RMSNorm, rotary
from tests import tiny

D, H, X = 16, 4, 8


def make_attention(kv_heads: int, qk_norm: str) -> Attention:
    """With weights drawn by NumPy."""
    attention = nnx.eval_shape(
        lambda: Attention(
            D,
            H,
            kv_heads,
            X,
            qk_norm=qk_norm,
            rope_base=100.0,
            norm_eps=1e-5,
            out_scale=1.0,
            rngs=nnx.Rngs(params=0),
        )
    )
    rng = np.random.default_rng(0)
    graph, state = nnx.split(attention)
    drawn = jax.tree.map(lambda a: jnp.asarray(rng.uniform(-0.8, 0.8, a.shape), a.dtype), state)
    return nnx.merge(graph, drawn)


def plain_norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean() + 1e-5) * scale


def plain_rotary(x: np.ndarray, position: int) -> np.ndarray:
    """Rotates the pairs (i, i + X/2) of one head by `position * base^(-2i/X)`."""
    out = x.copy()
    for i in range(X // 2):
        angle = position * 100.0 ** (-2 * i / X)
        a, b = x[i], x[i + X // 2]
        out[i] = a * np.cos(angle) - b * np.sin(angle)
        out[i + X // 2] = b * np.cos(angle) + a * np.sin(angle)
    return out


def plain_attention(attention: Attention, x, positions, segments, prefix=None) -> np.ndarray:
    """Token by token, head by head, in float64."""
    wq, wk, wv, wo = (
        np.asarray(w[...], np.float64)
        for w in (attention.wq, attention.wk, attention.wv, attention.wo)
    )
    x = np.asarray(x, np.float64)
    out = np.zeros_like(x)
    for row in range(x.shape[0]):
        q = np.einsum("sd,dhx->shx", x[row], wq)
        k = np.einsum("sd,dhx->shx", x[row], wk)
        v = np.einsum("sd,dhx->shx", x[row], wv)
        for each, norm in ((q, "q_norm"), (k, "k_norm")):
            if attention.qk_norm == "none":
                continue
            scale = np.asarray(getattr(attention, norm).scale[...], np.float64)
            for s in range(each.shape[0]):
                if attention.qk_norm == "full":
                    each[s] = plain_norm(each[s].ravel(), scale).reshape(each[s].shape)
                else:
                    each[s] = [plain_norm(head, scale) for head in each[s]]
        for t in range(x.shape[1]):
            before = [s <= t or (prefix is not None and prefix[row, s]) for s in range(x.shape[1])]
            seen = [s for s, b in enumerate(before) if b and segments[row, s] == segments[row, t]]
            for h in range(H):
                g = h // (H // k.shape[1])
                query = plain_rotary(q[t, h], positions[row, t])
                keys = [plain_rotary(k[s, g], positions[row, s]) for s in seen]
                scores = np.array([query @ key for key in keys]) / np.sqrt(X)
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                out[row, t] += sum(w * v[s, g] for w, s in zip(weights, seen, strict=True)) @ wo[h]
    return out


@pytest.mark.parametrize(
    ("kv_heads", "qk_norm"), [(4, "none"), (2, "head"), (1, "full"), (4, "full")]
)
def test_equals_plain_loops(kv_heads, qk_norm):
    attention = make_attention(kv_heads, qk_norm)
    batch = tiny.batch()
    x = jax.random.normal(jax.random.key(3), (tiny.B, tiny.S, D))
    out, cache = nnx.jit(attention)(x, batch.positions, batch.segments)
    expected = plain_attention(attention, x, np.asarray(batch.positions), batch.segments)
    assert cache is None
    np.testing.assert_allclose(out, expected, atol=2e-5)


def some_prefix(batch) -> np.ndarray:
    """The first positions of every document, and none of the last row."""
    return np.asarray(batch.valid & (batch.positions < 4)) & (np.arange(tiny.B) < 2)[:, None]


def test_a_prefix_is_seen_by_all_of_its_document():
    attention, batch = make_attention(2, "head"), tiny.batch()
    x = jax.random.normal(jax.random.key(3), (tiny.B, tiny.S, D))
    prefix = some_prefix(batch)
    out, _ = nnx.jit(attention)(x, batch.positions, batch.segments, prefix=prefix)
    expected = plain_attention(attention, x, np.asarray(batch.positions), batch.segments, prefix)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    causal, _ = nnx.jit(attention)(x, batch.positions, batch.segments)
    moved = np.abs(out - causal).max(axis=-1) > 1e-3
    # All of the prefix but its last position sees more than without.
    last = prefix & ~np.pad(prefix[:, 1:], ((0, 0), (0, 1)))
    np.testing.assert_array_equal(moved, prefix & ~last)


def test_rotary_scores_depend_on_distance_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 6, 1, X))
    at = jnp.arange(6)[None]

    @jax.jit
    def scores(shift: jax.Array) -> jax.Array:
        turned = rotary(q, at + shift, 100.0), rotary(k, at + shift, 100.0)
        return jnp.einsum("bshx,bthx->bst", *turned)

    np.testing.assert_allclose(scores(0), scores(11), atol=1e-5)
    assert np.abs(scores(0) - jnp.einsum("bshx,bthx->bst", q, k)).max() > 0.1
    np.testing.assert_array_equal(rotary(q, 0 * at, 100.0), q)


def test_rms_norm_has_unit_root_mean_square_in_the_dtype_of_its_input():
    norm = RMSNorm(64, 1e-6)
    x = 100.0 * jax.random.normal(jax.random.key(0), (2, 3, 64), jnp.bfloat16)
    y = norm(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(jnp.square(y.astype(jnp.float32)).mean(axis=-1), 1.0, rtol=1e-2)
