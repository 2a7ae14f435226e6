"""The GPU kernels, interpreted, against a loop in NumPy; and compiled for H100 where the plugin is."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
import numpy as np
import pytest

from moe.axes import BATCH_AXES, EXPERT, MESH_AXES
from moe.dispatch.gpu_matmul import BAND, schedule, triton_matmul
from moe.dispatch.gpu_tiles import padded_rows, product_tiles
from moe.dispatch.table import make_dispatch
from moe.dryrun.cuda_target import cuda_devices
from moe.dryrun.flops import products, total
from moe.dryrun.hlo import parse
from moe.model.experts import ExpertParams, feed_forward
from moe.routing.types import Choices

N, E, X, Y = 75, 4, 40, 300  # no multiples of a tile: 16 rows, 256 columns, steps of 32
SIZES = {
    "even": [18, 18, 18, 18],
    "empty": [0, 33, 0, 20],
    "hot": [1, 70, 3, 1],
    "last": [0, 0, 0, 75],
    "nothing": [0, 0, 0, 0],
    "tiles": [16, 32, 0, 16],
}
interpreted = functools.partial(triton_matmul, interpret=True)


def loop(rows, weights, cotangent, sizes):
    """Value and gradients, group by group, in float64."""
    rows, weights, cotangent = (np.asarray(a, np.float64) for a in (rows, weights, cotangent))
    out, d_rows = np.zeros(cotangent.shape), np.zeros(rows.shape)
    d_weights, start = np.zeros(weights.shape), 0
    for e, size in enumerate(sizes):
        own = slice(start, start + size)
        out[own] = rows[own] @ weights[e]
        d_rows[own] = cotangent[own] @ weights[e].T
        d_weights[e] = rows[own].T @ cotangent[own]
        start += size
    return out, d_rows, d_weights


def inputs(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = (N, X), (E, X, Y), (N, Y)
    return [jnp.asarray(rng.standard_normal(s, np.float32), dtype) for s in shapes]


def value_and_gradients(matmul):
    def both(rows, weights, cotangent, sizes):
        out, pull = jax.vjp(lambda r, w: matmul(r, w, sizes), rows, weights)
        return out, *pull(cotangent)

    return jax.jit(both)


BOTH = value_and_gradients(interpreted)


@pytest.mark.parametrize("name", SIZES)
def test_value_and_gradients(name):
    rows, weights, cotangent = inputs()
    total = sum(SIZES[name])
    # What lies beyond the last group is neither multiplied nor summed.
    rows, cotangent = rows.at[total:].set(jnp.nan), cotangent.at[total:].set(jnp.nan)
    got = BOTH(rows, weights, cotangent, jnp.array(SIZES[name], jnp.int32))
    for a, b in zip(got, loop(rows, weights, cotangent, SIZES[name]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)
    assert not np.any(got[0][total:])
    assert not np.any(got[1][total:])


def test_bfloat16():
    arrays = inputs(jnp.bfloat16)
    sizes = SIZES["hot"]
    for a, b in zip(BOTH(*arrays, jnp.array(sizes)), loop(*arrays, sizes), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=2e-2, atol=2e-2)


def test_unlike_dtypes_are_refused():
    rows, weights, _ = inputs()
    with pytest.raises(ValueError, match="cast one to the other"):
        interpreted(rows.astype(jnp.bfloat16), weights, jnp.array(SIZES["even"]))


def on_two_devices(matmul, devices, check_vma=True):
    """Value and gradients; each device has its own rows and sizes, the weights are the same on both."""
    mesh = Mesh(np.array(devices), ("data",))
    split, whole = PartitionSpec("data"), PartitionSpec()

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(split, whole, split),
        out_specs=split,
        check_vma=check_vma,
    )
    def sharded(rows, weights, sizes):
        return matmul(rows[0], weights, sizes[0])[None]

    def argument(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    arguments = (
        argument((2, N, X), jnp.float32, split),
        argument((E, X, Y), jnp.float32, whole),
        argument((2, N, Y), jnp.float32, split),
        argument((2, E), jnp.int32, split),
    )
    return value_and_gradients(sharded), arguments


def test_in_shard_map():
    rows, weights, cotangent = inputs()
    # JAX's interpreter of kernels does not know over which axes its own indices vary.
    both, _ = on_two_devices(interpreted, jax.devices()[:2], check_vma=False)
    sizes = jnp.array([SIZES["even"], SIZES["hot"]])
    got = both(jnp.stack([rows, -rows]), weights, jnp.stack([cotangent, 2 * cotangent]), sizes)
    one = loop(rows, weights, cotangent, SIZES["even"])
    two = loop(-rows, weights, 2 * cotangent, SIZES["hot"])
    expected = np.stack([one[0], two[0]]), np.stack([one[1], two[1]]), one[2] + two[2]
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


def test_varying_axes_are_told():
    """Tracing checks them; with their check on, the weights' gradient is summed over the axis."""
    both, arguments = on_two_devices(triton_matmul, jax.devices()[:2])
    out, d_rows, d_weights = jax.eval_shape(both, *arguments)
    assert (out.shape, d_rows.shape, d_weights.shape) == ((2, N, Y), (2, N, X), (E, X, Y))


@pytest.mark.parametrize("name", SIZES)
def test_schedule_covers_every_row_once(name):
    sizes = SIZES[name]
    visits = schedule(jnp.array(sizes), N, 16)
    assert visits.group.shape[0] % BAND == 0
    covered = np.full(N, -1)
    multiplied = 0
    for group, start, end in zip(*map(np.asarray, visits), strict=True):
        if start < end:
            assert (covered[start:end] == -1).all()
            covered[start:end] = group
            multiplied += 16 * (group < E)
    groups = np.repeat(np.arange(E + 1), [*sizes, N - sum(sizes)])
    np.testing.assert_array_equal(covered, groups)
    assert multiplied == padded_rows(jnp.array(sizes), 16)


def test_tiles_waste_little():
    assert product_tiles(8192, 8, 2048, 2).rows == 128
    tile = product_tiles(8192, 64, 2048, 2).rows
    rng = np.random.default_rng(0)
    sizes = rng.multinomial(8192, rng.dirichlet(np.full(64, 20.0)))
    assert padded_rows(jnp.array(sizes), tile) <= 1.3 * 8192


needs_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the extra `gpu`"
)


@needs_plugin
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_compiles_to_three_kernels(dtype):
    """No product is left to XLA, which would make it dense, and no array is as large as that needs."""
    N, E, X, Y = 4096, 16, 512, 1024
    sharding = SingleDeviceSharding(cuda_devices("h100", 1)[0])
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for shape in ((N, X), (E, X, Y), (N, Y), (E,))
    ]
    arguments[-1] = arguments[-1].update(dtype=jnp.int32)
    compiled = value_and_gradients(triton_matmul).lower(*arguments).compile()
    text = compiled.as_text()
    assert len(re.findall(r'custom_call_target="__gpu\$xla.gpu.triton"', text)) == 3
    assert not re.search(r" dot\(|ragged-dot|__cublas", text)
    sizes = [int(np.prod([*map(int, d.split(","))])) for d in re.findall(r"\w+\[([\d,]+)\]", text)]
    assert max(sizes) < E * N * min(X, Y)
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20


@needs_plugin
@pytest.mark.slow
def test_compiles_in_shard_map():
    both, arguments = on_two_devices(triton_matmul, cuda_devices("h100", 2))
    text = both.lower(*arguments).compile().as_text()
    assert "all-reduce" in text  # of the weights' gradient
    assert not re.search(r" dot\(|ragged-dot|__cublas", text)


@needs_plugin
@pytest.mark.slow
@pytest.mark.parametrize(
    ("exchange", "collective", "rows"),
    [
        ("ragged", "ragged-all-to-all", 1.25),
        ("all_to_all", "all-to-all", 8),
        ("all_gather", "reduce-scatter", 8),
    ],
)
def test_layer_on_eight(exchange, collective, rows):
    """The whole sparse layer and its gradients, `rows` being what a shard has room for over its share."""
    B, S, D, F, experts, K = 8, 512, 128, 256, 16, 2
    mesh = Mesh(
        np.array(cuda_devices("h100", 8)).reshape([8 if a == EXPERT else 1 for a in MESH_AXES]),
        MESH_AXES,
    )
    dispatch = make_dispatch(
        "grouped",
        mesh,
        param_specs=ExpertParams(PartitionSpec(EXPERT), PartitionSpec(EXPERT)),
        exchange=exchange,
        buffer_factor=rows if exchange == "ragged" else None,
    )

    def argument(shape, dtype, axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(axes)))

    x = argument((B, S, D), jnp.bfloat16, BATCH_AXES)
    choices = Choices(
        *(argument((B, S, K), t, BATCH_AXES) for t in (jnp.int32, jnp.float32, jnp.bool_))
    )
    params = ExpertParams(
        argument((experts, D, 2, F), jnp.bfloat16, EXPERT),
        argument((experts, F, D), jnp.bfloat16, EXPERT),
    )
    expert_fn = functools.partial(feed_forward, activation="swiglu")

    @jax.jit
    def layer(x, choices, params):
        def output(x, gate, params):
            return dispatch(x, choices._replace(gate=gate), params, expert_fn).output

        out, pull = jax.vjp(output, x, choices.gate, params)
        return out, *pull(out)

    compiled = layer.lower(x, choices, params).compile()
    assert collective in compiled.as_text()
    found = products(parse(compiled.as_text()))
    assert {each.kind for each in found} == {"grouped_product", "grouped_weight_gradient"}
    share = B * S * K // 8 * D * F * 3  # products forward of what a shard gets at balance
    assert total(found) == 2 * 3 * rows * share
