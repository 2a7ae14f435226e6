"""The TPU kernels: what their tiles cost and need, and that they compile for the chips we name.

Their values are tested among the other back ends, in `test_grouped_matmul`.
"""

import functools
import importlib.util

import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import pytest

from moe.axes import EXPERT
from moe.dispatch import tpu_tiles
from moe.dispatch.grouped_matmul import grouped_matmul
from moe.dispatch.tpu_matmul import schedule, tpu_matmul
from moe.dispatch.tpu_tiles import Chip, Tiles, divisor, even_part, padded_rows

SHAPES = [  # rows, X, Y, groups
    (8192, 2048, 1024, 4),
    (8192, 2048, 1024, 16),
    (8191, 768, 2048, 8),
    (1000, 2880, 200, 5),
    (100, 96, 64, 3),
    (65536, 7168, 2048, 8),
    (4096, 4096, 14336, 1),
]
CHIPS = {"v5e": Chip(128 * 2**20, 1), "v5p": Chip(64 * 2**20, 2)}


def both(rows, weights, sizes, cotangent, matmul):
    """Product and both gradients."""
    out, pull = jax.vjp(lambda r, w: matmul(r, w, sizes), rows, weights)
    return out, *pull(cotangent)


@pytest.mark.parametrize("sizes", [[40, 0, 1, 90], [0, 0, 0, 0], [16, 16, 0, 32], [0, 0, 131, 0]])
@pytest.mark.parametrize("visit_empty", [True, False])
def test_schedule_visits_every_row_of_a_group_once(sizes, visit_empty):
    n, tile = 140, 16
    visits, count = schedule(jnp.array(sizes, jnp.int32), n, tile, visit_empty=visit_empty)
    assert count <= visits.group.shape[0]
    group, tiles = (np.asarray(a[:count]) for a in visits[:2])
    assert (np.diff(group) >= 0).all()
    assert (np.diff(tiles) >= 0).all()
    assert (tiles < -(-n // tile)).all()
    for e, size in enumerate(sizes):
        start = sum(sizes[:e])
        rows = (tiles[group == e, None] * tile + np.arange(tile)).ravel()
        assert np.isin(np.arange(start, start + size), rows).all()
        if size:
            assert rows.shape[0] == tile * ((start + size - 1) // tile - start // tile + 1)
        else:
            assert (group == e).sum() == int(visit_empty)
    real = group[np.array(sizes)[group] > 0] if count else group
    assert int(padded_rows(jnp.array(sizes), tile)) == tile * real.shape[0]


def test_summed_axis_in_parts():
    """Of both products; and the last tiles of rows and of `Y` are not full."""
    rng = np.random.default_rng(0)
    rows, weights, cotangent = (
        rng.standard_normal(s).astype(np.float32) for s in [(19, 8), (2, 8, 12), (19, 12)]
    )
    sizes = jnp.array([5, 12], jnp.int32)
    matmul = functools.partial(tpu_matmul, tiles=Tiles(8, 4, 4, step=4), interpret=True)
    got = jax.jit(functools.partial(both, matmul=matmul))(rows, weights, sizes, cotangent)
    twin = functools.partial(grouped_matmul, backend="ragged_dot")
    want = jax.jit(functools.partial(both, matmul=twin))(rows, weights, sizes, cotangent)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_refuses_what_it_cannot_compute():
    sizes = jax.ShapeDtypeStruct((1,), jnp.int32)
    weights = jax.ShapeDtypeStruct((1, 6, 4), jnp.float32)
    rows = jax.ShapeDtypeStruct((2**31, 6), jnp.float32)
    with pytest.raises(ValueError, match="int32"):
        jax.eval_shape(tpu_matmul, rows, weights, sizes)
    few = jax.ShapeDtypeStruct((8, 6), jnp.bfloat16)
    with pytest.raises(ValueError, match="bfloat16 and weights float32"):
        jax.eval_shape(tpu_matmul, few, weights, sizes)
    few = jax.ShapeDtypeStruct((8, 6), jnp.float32)
    with pytest.raises(ValueError, match="does not divide"):
        jax.eval_shape(functools.partial(tpu_matmul, tiles=Tiles(8, 4, 4)), few, weights, sizes)


@pytest.mark.parametrize("name", CHIPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiles_are_legal_and_large(name, shape, monkeypatch):
    """Whole, or a multiple of 128; the summed axis in equal parts; a quarter over at the very most."""
    monkeypatch.setattr(tpu_tiles, "chip", lambda: CHIPS[name])
    N, X, Y, _ = shape
    for choose in (tpu_tiles.product_tiles, tpu_tiles.gradient_tiles):
        tiles = choose(X, Y, 2).clip(N, X, Y)
        for tile, size in zip(tiles[:3], (N, X, Y), strict=True):
            assert tile == size or tile % 128 == 0
        assert -(-Y // tiles.y) * tiles.y < 1.25 * Y or Y < 512
        assert tiles.x == X or tiles.x >= 512
    assert X % tpu_tiles.product_tiles(X, Y, 2).x == 0


def test_parts():
    assert divisor(11008, 4096) == 256  # 86 * 128, and 43 is prime
    assert divisor(2048, 2048) == 2048
    assert divisor(2880, 1024) == 2880
    assert even_part(768, 1024) == 768
    assert even_part(768, 1024, cores=2) == 384
    assert even_part(7168, 1024, cores=2) == 896
    assert even_part(96, 1024, cores=2) == 96


def arguments(mesh, N, X, Y, E, dtype=jnp.bfloat16):
    shapes = ((N, X), dtype), ((E, X, Y), dtype), ((E,), jnp.int32), ((N, Y), dtype)
    sharding = NamedSharding(mesh, PartitionSpec(EXPERT))
    return [jax.ShapeDtypeStruct(*s, sharding=sharding) for s in shapes]


def mapped(mesh):
    """Rows and groups of every shard by themselves, as in the exchange."""
    call = functools.partial(both, matmul=functools.partial(grouped_matmul, backend="megablox"))
    spec = PartitionSpec(EXPERT)
    return jax.jit(jax.shard_map(call, mesh=mesh, in_specs=spec, out_specs=spec))


def test_lowers_for_tpu_in_shard_map():
    """Without a TPU or its compiler: the kernels say what they vary over, and Mosaic accepts them."""
    mesh = Mesh(np.array(jax.devices()[:2]), (EXPERT,))
    lowered = (
        mapped(mesh).trace(*arguments(mesh, 2000, 256, 384, 8)).lower(lowering_platforms=("tpu",))
    )
    assert lowered.as_text().count("tpu_custom_call") == 3


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler")
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v5e:4x4", "v6e:2x2"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compiles_to_the_ideal(topology, shape, monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    n, (N, X, Y, E) = devices.size, shape
    mesh = Mesh(devices, (EXPERT,))
    compiled = mapped(mesh).lower(*arguments(mesh, n * N, X, Y, n * E)).compile()
    cost = compiled.cost_analysis()
    assert cost is not None
    assert 1 <= cost["flops"] / (3 * 2 * N * X * Y) < 1.03
