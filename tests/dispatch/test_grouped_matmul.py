"""The fast grouped product against its twin and against a plain loop, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.dispatch.blocks import cut, ladder
from moe.dispatch.grouped_matmul import grouped_matmul
from moe.errors import ConfigError

N, X, Y = 203, 5, 7
SIZES = {
    "even": [40, 40, 40, 40],
    "empty": [0, 90, 0, 70],
    "hot": [1, 195, 3, 4],
    "last": [0, 0, 0, 203],
    "nothing": [0, 0, 0, 0],
    "uneven": [67, 1, 64, 71],
}


def loop(rows, weights, sizes):
    """Numpy, group by group."""
    out, start = np.zeros((rows.shape[0], weights.shape[2]), np.float32), 0
    for weight, size in zip(weights, sizes, strict=True):
        out[start : start + size] = rows[start : start + size] @ weight
        start += size
    return out


def make(backend):
    """One compiled function a back end: product and both gradients; sizes are traced."""

    def both(rows, weights, sizes, cotangent):
        out, pull = jax.vjp(lambda r, w: grouped_matmul(r, w, sizes, backend), rows, weights)
        return out, *pull(cotangent)

    return jax.jit(both)


BOTH = {name: make(name) for name in ("blocks", "ragged_dot")}


def inputs(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (N, X), (4, X, Y), (N, Y)
    return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("name", SIZES)
def test_backends_agree(name):
    rows, weights, cotangent = inputs()
    total = sum(SIZES[name])
    rows = rows.at[total:].set(jnp.nan)  # beyond the last group: must not leak
    cotangent = cotangent.at[total:].set(jnp.nan)
    sizes = jnp.array(SIZES[name], jnp.int32)
    fast, twin = (BOTH[b](rows, weights, sizes, cotangent) for b in ("blocks", "ragged_dot"))
    for a, b in zip(fast, twin, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        fast[0], loop(np.asarray(rows), np.asarray(weights), SIZES[name]), rtol=1e-5, atol=1e-5
    )
    assert (fast[0][total:] == 0).all()
    assert (fast[1][total:] == 0).all()


def test_bfloat16():
    rows, weights, cotangent = inputs(jnp.bfloat16)
    sizes = jnp.array(SIZES["uneven"], jnp.int32)
    got = BOTH["blocks"](rows, weights, sizes, cotangent)
    full = [a.astype(jnp.float32) for a in (rows, weights, cotangent)]
    want = BOTH["ragged_dot"](*full[:2], sizes, full[2])
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=2e-2, atol=2e-2 * abs(b).max())


@pytest.mark.parametrize(("n", "groups"), [(203, 4), (3, 5), (1, 1), (4096, 128), (32768, 64)])
def test_windows_cover_every_row_once(n, groups):
    rng = np.random.default_rng(0)
    sizes = rng.multinomial(n, rng.dirichlet(np.ones(groups)))
    lengths, windows = ladder(n, groups), cut(jnp.asarray(sizes, jnp.int32), n)
    assert lengths[-1] <= n
    seen = np.zeros(n, int)
    for rung, length in enumerate(lengths):
        for group in windows.order[windows.first[rung] : windows.first[rung + 1]]:
            size = windows.tail_size[group]
            assert size <= length
            seen[windows.tail_start[group] :][:size] += 1
    assert int(windows.first[-1]) == groups
    for i in range(int(windows.full_end[-1])):
        group = np.searchsorted(windows.full_end, i, side="right")
        start = windows.full_start[group] + i * lengths[-1]
        seen[start:][: lengths[-1]] += 1
    assert (seen == 1).all()


def test_unknown_backend():
    with pytest.raises(ConfigError, match="blocks, ragged_dot"):
        grouped_matmul(jnp.ones((2, 2)), jnp.ones((1, 2, 2)), jnp.array([2]), "cuda")
