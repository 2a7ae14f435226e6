"""Every grouped product against its twin and against a plain loop, gradients included."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
import numpy as np
import pytest

from moe.dispatch import blas_matmul
from moe.dispatch.blocks import cut, ladder
from moe.dispatch.grouped_matmul import (
    BACKENDS,
    check_backend,
    default_backend,
    grouped_matmul,
)
from moe.dispatch.tpu_matmul import tpu_matmul
from moe.dispatch.tpu_tiles import Tiles
from moe.errors import ConfigError

N, X, Y = 203, 5, 7
SIZES = {
    "even": [40, 40, 40, 40],
    "empty": [0, 90, 0, 70],
    "hot": [1, 195, 3, 4],
    "last": [0, 0, 0, 203],
    "nothing": [0, 0, 0, 0],
    "tiles": [16, 48, 0, 64],  # on the borders of tiles of 16 rows
    "uneven": [67, 1, 64, 71],
}
# Pallas fills what a kernel has not written, and the rest of a tile beyond the rows, with NaN here.
INTERPRETED = functools.partial(tpu_matmul, tiles=Tiles(16, 8, 8, step=4), interpret=True)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    row = BACKENDS["megablox"]._replace(matmul=INTERPRETED)
    monkeypatch.setitem(BACKENDS, "megablox", row)


def loop(rows, weights, sizes):
    """Numpy, group by group."""
    out, start = np.zeros((rows.shape[0], weights.shape[2]), np.float32), 0
    for weight, size in zip(weights, sizes, strict=True):
        out[start : start + size] = rows[start : start + size] @ weight
        start += size
    return out


def both(backend, rows, weights, sizes, cotangent):
    """Product and both gradients."""
    out, pull = jax.vjp(lambda r, w: grouped_matmul(r, w, sizes, backend), rows, weights)
    return out, *pull(cotangent)


BOTH = {  # compiled once; the sizes are traced
    name: jax.jit(functools.partial(both, name))
    for name in ("blas", "blocks", "megablox", "ragged_dot")
}
FAST = ("blas", "blocks", "megablox")


def inputs(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = (N, X), (4, X, Y), (N, Y)
    return [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("backend", FAST)
def test_backends_agree(backend, name):
    rows, weights, cotangent = inputs()
    total = sum(SIZES[name])
    rows = rows.at[total:].set(jnp.nan)  # beyond the last group: must not leak
    cotangent = cotangent.at[total:].set(jnp.nan)
    sizes = jnp.array(SIZES[name], jnp.int32)
    fast, twin = (BOTH[b](rows, weights, sizes, cotangent) for b in (backend, "ragged_dot"))
    for a, b in zip(fast, twin, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        fast[0], loop(np.asarray(rows), np.asarray(weights), SIZES[name]), rtol=1e-5, atol=1e-5
    )
    assert (fast[0][total:] == 0).all()
    assert (fast[1][total:] == 0).all()
    assert (fast[2][sizes == 0] == 0).all()


@pytest.mark.parametrize("backend", FAST)
def test_bfloat16(backend):
    rows, weights, cotangent = inputs(jnp.bfloat16)
    sizes = jnp.array(SIZES["uneven"], jnp.int32)
    got = BOTH[backend](rows, weights, sizes, cotangent)
    full = [a.astype(jnp.float32) for a in (rows, weights, cotangent)]
    want = BOTH["ragged_dot"](*full[:2], sizes, full[2])
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=2e-2, atol=2e-2 * abs(b).max())


@pytest.mark.parametrize(
    ("backend", "check_vma"),
    # Pallas cannot interpret a kernel under the check: test_tpu_matmul lowers it under the check, for TPU.
    [("blas", True), ("blocks", True), ("megablox", False)],
)
def test_in_shard_map(backend, check_vma):
    """Rows of two shards, the same weights on both, whose gradient is the sum over the shards."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("expert",))
    shards, everywhere = PartitionSpec("expert"), PartitionSpec()

    def shard(rows, weights, sizes, cotangent):
        out, d_rows, d_weights = both(backend, rows, weights, sizes[0], cotangent)
        return out, d_rows, d_weights if check_vma else jax.lax.psum(d_weights, "expert")

    mapped = jax.shard_map(
        shard,
        mesh=mesh,
        in_specs=(shards, everywhere, shards, shards),
        out_specs=(shards, shards, everywhere),
        check_vma=check_vma,
    )
    rows, weights, cotangent = inputs()
    sizes = jnp.array([SIZES["hot"], SIZES["empty"]], jnp.int32)
    got = jax.jit(mapped)(
        jnp.concatenate([rows, rows[::-1]]), weights, sizes, jnp.concatenate([cotangent] * 2)
    )
    one, two = (
        BOTH["ragged_dot"](r, weights, s, cotangent)
        for r, s in zip((rows, rows[::-1]), sizes, strict=True)
    )
    want = jnp.concatenate([one[0], two[0]]), jnp.concatenate([one[1], two[1]]), one[2] + two[2]
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


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
    with pytest.raises(ConfigError, match=r"blocks, .*ragged_dot"):
        grouped_matmul(jnp.ones((2, 2)), jnp.ones((1, 2, 2)), jnp.array([2]), "cutlass")
    with pytest.raises(ConfigError, match="did you mean 'megablox'"):
        check_backend("megablocks")


def test_backends_of_platforms():
    with pytest.raises(ConfigError, match=r"runs on tpu and this is cpu; use 'bl(ocks|as)'"):
        check_backend("megablox", "cpu")
    for platform in ("cpu", "gpu", "cuda", "rocm", "tpu", "a platform of next year"):
        assert default_backend(platform) in BACKENDS
    for platform in ("cpu", "gpu", "cuda", "tpu"):
        check_backend(default_backend(platform), platform)


def test_blas_is_the_default_unless_held_to_older_kernels(monkeypatch):
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    assert default_backend("cpu") == "blocks"
    monkeypatch.delenv("OPENBLAS_CORETYPE")
    assert default_backend("cpu") == "blas"


@pytest.mark.parametrize(("groups", "width"), [(1, 300), (3, 64), (40, 16)])
def test_blas_shares_out_every_piece(groups, width):
    """Few wide matrices are cut into bands, rows of large groups into windows."""
    rng = np.random.default_rng(1)
    sizes = rng.multinomial(1200, np.ones(groups) / groups).astype(np.int32)
    rows, cotangent = rng.normal(size=(1300, width)), rng.normal(size=(1300, 5))
    weights = rng.normal(size=(groups, width, 5))
    out, gradient = np.full((1300, 5), np.nan), np.full(weights.shape, np.nan)
    blas_matmul.grouped_product(rows, weights, sizes, out)
    blas_matmul.grouped_weight_gradient(rows, cotangent, sizes, gradient)
    np.testing.assert_allclose(out, loop(rows, weights, sizes), rtol=1e-5, atol=1e-5)
    ends = np.cumsum(sizes)
    for e, (start, end) in enumerate(zip(ends - sizes, ends, strict=True)):
        np.testing.assert_allclose(gradient[e], rows[start:end].T @ cotangent[start:end], atol=1e-9)
