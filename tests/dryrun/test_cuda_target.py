"""Compiling for GPUs that are not there; what needs the CUDA plugin is skipped without it."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import pytest

from moe.dryrun.cuda_target import GPUS, cuda_devices, target_text
from moe.errors import ConfigError

HAS_PLUGIN = importlib.util.find_spec("jax_cuda13_plugin") is not None
needs_plugin = pytest.mark.skipif(not HAS_PLUGIN, reason="needs the extra `gpu`")


@pytest.mark.parametrize(
    ("kind", "count", "says"),
    [("h10", 8, "h100"), ("h100", 12, "multiple of 8"), ("h100", 0, "multiple of 8")],
)
def test_refusals(kind, count, says):
    with pytest.raises(ConfigError, match=says):
        cuda_devices(kind, count)


@pytest.mark.skipif(HAS_PLUGIN, reason="is about its absence")
def test_names_the_extra():
    with pytest.raises(ConfigError, match=r"\.\[gpu\]"):
        cuda_devices("h100", 8)


def test_text_states_the_device():
    text = target_text(GPUS["a100"])
    assert "core_count: 108" in text
    assert "feature_extension: NONE" in text
    assert text.count("{") == text.count("}")


@needs_plugin
@pytest.mark.parametrize("kind", GPUS)
def test_devices_of_two_machines(kind):
    devices = cuda_devices(kind, 16)
    assert [d.process_index for d in devices] == [0] * 8 + [1] * 8
    assert {d.platform for d in devices} == {"gpu"}
    assert devices[0].device_kind == GPUS[kind].name


@needs_plugin
@pytest.mark.slow
def test_compiles_a_sharded_program():
    mesh = Mesh(np.array(cuda_devices("h100", 8)), ("data",))
    split, whole = PartitionSpec("data"), PartitionSpec()

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(split, whole), out_specs=split)
    def program(x, w):
        y = x @ w
        swapped = jax.lax.all_to_all(y.reshape(8, -1, 128), "data", 0, 0).reshape(y.shape)
        return swapped + jax.lax.psum(y, "data")

    def argument(shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    compiled = program.lower(argument((1024, 64), split), argument((64, 128), whole)).compile()
    text = compiled.as_text()
    for operation in ("all-to-all", "all-reduce", "dot("):
        assert operation in text
    assert compiled.memory_analysis().argument_size_in_bytes == 2 * (128 * 64 + 64 * 128)
