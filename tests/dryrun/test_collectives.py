"""Collectives of compiled modules: bytes, groups and mesh axes against counts by hand."""

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from moe.dryrun.collectives import _wire_bytes, by_axes, collectives
from moe.dryrun.hlo import parse
from moe.dryrun.replica_groups import axes_of, parse_groups, spanned_axes
from tests.dryrun.texts import read

MESH = {"data": 2, "tensor": 4}
TPU = {"data": 4, "tensor": 4}


def compiled(f, *shapes_and_specs):
    mesh = jax.make_mesh(tuple(MESH.values()), tuple(MESH))
    args = [
        jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in shapes_and_specs
    ]
    specs = tuple(spec for _, spec in shapes_and_specs)
    mapped = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=False)
    return parse(jax.jit(mapped).lower(*args).compile().as_text(), own=("tests/",))


def test_every_kind_over_either_axis():
    def f(x, w):  # [32 32] and [32 16] a device
        y = jax.lax.all_gather(x, "tensor", axis=0, tiled=True)  # [128 32]
        y = jax.lax.psum(y @ w, "data")  # [128 16]
        y = jax.lax.ppermute(y, "tensor", [(i, (i + 1) % 4) for i in range(4)])
        y = jax.lax.all_to_all(y, "tensor", 0, 0, tiled=True)
        return jax.lax.psum_scatter(y, "tensor", scatter_dimension=0, tiled=True)

    found = collectives(compiled(f, ((64, 32), P("data")), ((32, 64), P(None, "tensor"))), MESH)
    big, small = 128 * 32 * 4, 128 * 16 * 4
    assert {
        each.kind: (
            each.axes,
            each.group_size,
            each.operand_bytes,
            each.output_bytes,
            each.wire_bytes,
        )
        for each in found
    } == {
        "all-gather": (("tensor",), 4, big // 4, big, big * 3 // 4),
        "all-reduce": (("data",), 2, small, small, small),
        "collective-permute": (("tensor",), 2, small, small, small),
        "all-to-all": (("tensor",), 4, small, small, small * 3 // 4),
        "reduce-scatter": (("tensor",), 4, small, small // 4, small * 3 // 4),
    }
    assert all(each.whole_axes and each.count == 1 and not each.is_async for each in found)
    assert len({each.source.line for each in found}) == 5
    assert by_axes(found)["all-gather", ("tensor",)] == big * 3 // 4


def test_a_collective_in_a_scan_counts_its_trips():
    def f(x):
        def body(x, _):
            return jax.lax.psum(x * 0.1, ("data", "tensor")), None

        return jax.lax.scan(body, x, None, length=7)[0]

    (found,) = collectives(compiled(f, ((16, 8), P("data"))), MESH)
    assert (found.count, found.axes, found.group_size) == (7, ("data", "tensor"), 8)
    assert found.total_wire_bytes == 7 * 2 * (8 * 8 * 4) * 7 // 8


def test_tpu_exchanges():
    found = {each.kind: each for each in collectives(read("tpu_exchange"), TPU)}
    ragged = found["ragged-all-to-all"]
    assert ragged.axes == ("data",)
    assert (ragged.operand_bytes, ragged.output_bytes) == (1024 * 512 * 2, 2048 * 512 * 2)
    assert ragged.wire_bytes == 1024 * 512 * 2 * 3 // 4
    assert str(ragged.source) == "moe/dispatch/exchange.py:37"
    # The way back reads the buffer with room to spare and writes the rows.
    assert _wire_bytes("ragged-all-to-all", 8 * 1024, 1024, 4) == 1024 * 3 // 4
    permute = found["collective-permute"]
    assert (permute.axes, permute.operand_bytes, permute.is_async) == (
        ("tensor",),
        2048 * 512 * 2,
        True,
    )
    assert found["all-to-all"].wire_bytes == 2048 * 512 * 2 * 3 // 4


def test_a_tpu_collective_fused_with_products_is_one():
    found = {each.kind: each for each in collectives(read("tpu_async"), TPU)}
    assert set(found) == {"all-gather", "all-reduce"}
    gather = found["all-gather"]
    assert (gather.count, gather.axes, gather.output_bytes) == (6, ("data",), 512 * 512 * 2)
    assert gather.is_async
    assert str(gather.source) == "moe/model/experts.py:16"
    assert found["all-reduce"].axes == ("tensor",)


def test_a_fused_all_reduce_with_a_slice_is_a_reduce_scatter():
    found = {each.kind: each for each in collectives(read("tpu_reduce_scatter"), TPU)}
    scatter = found["reduce-scatter"]
    # XLA pads 8192 rows to 8512 and mends the shards with a permute.
    assert (scatter.operand_bytes, scatter.output_bytes) == (8512 * 4096 * 2, 2128 * 4096 * 2)
    assert scatter.wire_bytes == 8512 * 4096 * 2 * 3 // 4
    assert str(scatter.source) == "moe/dispatch/exchange.py:15"
    assert "all-reduce" not in found


def test_cuda_collectives_in_two_halves():
    found = {each.kind: each for each in collectives(read("cuda_exchange"), MESH)}
    exchange, scatter = found["all-to-all"], found["reduce-scatter"]
    assert (exchange.operand_bytes, exchange.output_bytes) == (8192 * 512 * 2, 8192 * 512 * 2)
    assert (scatter.operand_bytes, scatter.output_bytes) == (8192 * 512 * 2, 2048 * 512 * 2)
    assert (exchange.is_async, scatter.is_async) == (False, True)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("{}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("[2,4]<=[2,2,2]T(1,0,2)", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("mesh['a'=2,'b'=4] {'b'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh['a'=2,'b'=1,'c'=4] {'a'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=2,'b'=4] {'b':(1)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['a'=2,'b'=4] {'b':(2)2}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'b'}", ((3, 1), (2, 0))),
    ],
)
def test_notations_of_groups(text, groups):
    assert parse_groups(text, 8) == groups


def test_axes_of_groups():
    mesh = {"data": 2, "fsdp": 1, "expert": 2, "tensor": 2}
    assert axes_of(((0, 1), (2, 3), (4, 5), (6, 7)), mesh) == ("tensor",)
    assert axes_of(((0, 4, 2, 6), (1, 3, 5, 7)), mesh) == ("data", "expert")
    assert axes_of((tuple(range(8)),), mesh) == ("data", "expert", "tensor")
    assert axes_of(tuple((i,) for i in range(8)), mesh) == ()
    part_of_an_axis = ((0, 2), (1, 3), (4, 6), (5, 7))
    assert axes_of(part_of_an_axis, MESH) is None
    assert spanned_axes(part_of_an_axis, MESH) == ("tensor",)
