"""Which device stands where, and which rows each process feeds."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from moe.axes import MESH_AXES
from moe.data.types import Batch
from moe.errors import ConfigError
from moe.parallel.feed import batch_shapes, covering_block, process_block, to_device
from moe.parallel.mesh import batch_shards, fits, make_mesh, split_slices

ONES = dict.fromkeys(MESH_AXES, 1) | {"slices": 1}


def ids(mesh):
    return [device.id for device in mesh.devices.flat]


def test_devices_keep_their_order_on_the_cpu():
    mesh = make_mesh(fsdp=2, sequence=2, tensor=2)
    assert mesh.axis_names == MESH_AXES
    assert tuple(mesh.shape.values()) == (1, 2, 1, 2, 2)
    assert ids(mesh) == [device.id for device in jax.devices()]
    assert batch_shards(mesh) == 2


def test_data_crosses_slices_and_nothing_else_does():
    mesh = make_mesh(data=4, tensor=2, slices=2)
    blocks = mesh.devices.reshape(2, -1)  # outer part of data
    assert [{device.id // 4 for device in block} for block in blocks] == [{0}, {1}]


def test_slices_are_read_from_devices_that_know_theirs():
    devices = [
        SimpleNamespace(id=i, slice_index=i % 2, platform="cpu", device_kind="cpu")
        for i in range(8)
    ]
    assert [{d.slice_index for d in part} for part in split_slices(devices, 2)] == [{0}, {1}]
    with pytest.raises(ConfigError, match=r"set mesh\.slices=2"):
        split_slices(devices, 1)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"data": 3}, "multiply to 3, but there are 8 devices"),
        ({"data": -1, "tensor": -1}, "at most one is -1"),
        ({"data": 8, "slices": 3}, "divide the number of devices, 8"),
        ({"data": 8, "slices": 0}, "must be at least 1"),
        ({"data": 1, "tensor": 8, "slices": 2}, "mesh.data=1 is not divisible by mesh.slices=2"),
    ],
)
def test_what_does_not_fit_is_refused(sizes, words):
    with pytest.raises(ConfigError, match=words):
        make_mesh(**sizes)


def test_fits_is_make_mesh_without_devices():
    assert fits(ONES | {"data": -1}, 8)
    assert not fits(ONES | {"tensor": 2}, 8)
    assert fits(ONES | {"data": 4, "tensor": 2, "slices": 4}, 8)
    assert not fits(ONES | {"data": 2, "tensor": 4, "slices": 4}, 8)


@pytest.mark.parametrize(
    ("spans", "shards", "block"),
    [
        ([(0, 2), (2, 4)], 8, (0, 4)),  # two neighbouring shards of 16 rows
        ([(8, 10), (10, 12)], 8, (2, 4)),
        ([(0, 2), (8, 10)], 8, (0, 1)),  # rows apart: all are read
        ([(8, 10), (12, 14)], 8, (1, 2)),
        ([(0, 16)], 1, (0, 1)),  # no batch axis: everyone reads all
        ([(4, 8)], 4, (1, 4)),
        ([(10, 12), (12, 14)], 8, (1, 2)),  # across the border of a block of two shards
    ],
)
def test_a_process_reads_the_block_that_holds_its_rows(spans, shards, block):
    assert covering_block(spans, 16, shards) == block


def batch(rows, length):
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, 9, (rows, length)).astype(np.int32) for _ in range(4)]
    valid = rng.random((rows, length)) < 0.5
    return Batch(*tokens, valid, np.arange(rows, dtype=np.int32))


@pytest.mark.parametrize("sizes", [{"data": 8}, {"expert": 2, "sequence": 4}, {"sequence": 8}])
@pytest.mark.parametrize("frames", [False, True])
def test_the_batch_is_whole_and_lies_where_the_step_expects_it(sizes, frames):
    mesh, local = make_mesh(**{"data": 1} | sizes), batch(8, 16)
    if frames:
        local = local._replace(
            frames=np.random.default_rng(1).normal(size=(8, 3, 5)).astype(np.float32),
            scored=local.valid,
            index=local.domain,
        )
    assert process_block(mesh, 8) == (0, 1)
    made = to_device(mesh)(local)
    shapes = batch_shapes(mesh, 8, 16, local if frames else None)
    for array, wanted, read in zip(*map(jax.tree.leaves, (made, shapes, local)), strict=True):
        assert (array.shape, array.dtype) == (wanted.shape, wanted.dtype)
        assert array.sharding == wanted.sharding
        np.testing.assert_array_equal(array, read)
    part = made.tokens.addressable_shards[0].data.shape
    assert part == (8 // batch_shards(mesh), 16 // mesh.shape["sequence"])


def test_a_block_is_placed_by_its_rows(monkeypatch):
    """As in the second of two processes: its devices ask for rows of its block, by global number."""
    mesh, local, asked = make_mesh(data=2, sequence=4), batch(4, 8), []
    monkeypatch.setattr("moe.parallel.feed.process_block", lambda *_: (1, 2))

    def make(shape, sharding, part):
        del sharding
        asked.append((shape, part((slice(4, 8), slice(2, 4))[: len(shape)])))
        return jax.numpy.zeros(())

    monkeypatch.setattr(jax, "make_array_from_callback", make)
    to_device(mesh)(local)
    assert {shape for shape, _ in asked} == {(8, 8), (8,)}
    np.testing.assert_array_equal(asked[0][1], local.tokens[:, 2:4])
    np.testing.assert_array_equal(asked[-1][1], local.domain)
