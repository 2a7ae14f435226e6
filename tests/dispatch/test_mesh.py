"""Across devices: the oracle's outputs, gradients and drops on every mesh."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, PartitionSpec
import numpy as np
import pytest

from moe.axes import EXPERT, MESH_AXES, TENSOR
from moe.dispatch.reference import reference
from moe.dispatch.table import check, make_dispatch
from moe.errors import ConfigError
from tests.dispatch.common import Experts, make_choices, make_experts, run, swiglu

SPECS = Experts._make(
    [PartitionSpec(EXPERT, None, None, TENSOR), PartitionSpec(EXPERT, TENSOR, None)]
)
B, S, D, F, E, K = 8, 6, 8, 4, 8, 2
MESHES = [(1, 1, 2, 1), (2, 1, 2, 1), (1, 1, 2, 2), (1, 2, 2, 2), (1, 1, 8, 1)]


def make_mesh(sizes):
    """Of data, fsdp, expert, tensor; or of all axes."""
    sizes = (*sizes[:3], 1, sizes[3]) if len(sizes) == 4 else sizes
    devices = np.array(jax.devices()[: np.prod(sizes)]).reshape(sizes)
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def make_case(skew):
    choices = make_choices(jax.random.key(1), B, S, E, K, skew)
    if skew:  # the last shard of the expert axis gets nothing
        choices = choices._replace(expert=choices.expert // 2)
    x = jax.random.normal(jax.random.key(0), (B, S, D))
    return x, choices, make_experts(jax.random.key(2), E, D, F)


def assert_close(want, got):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), want, got)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("name", ["grouped", "capacity"])
def test_mesh_equals_oracle(name, sizes):
    backend = "blocks" if sizes == (1, 2, 2, 2) else "ragged_dot"  # quicker to compile
    dispatch = make_dispatch(name, make_mesh(sizes), param_specs=SPECS, backend=backend)
    compiled = None
    for skew in (0.0, 20.0):
        case = make_case(skew)
        compiled, got = run(dispatch, *case, compiled=compiled)
        assert_close(run(reference, *case)[1], got)


@pytest.mark.parametrize("sizes", [(1, 1, 4, 1), (1, 2, 2, 2)], ids=str)
def test_drops_do_not_depend_on_the_mesh(sizes):
    x, choices, experts = make_case(2.0)
    make = functools.partial(
        make_dispatch, "capacity", capacity_factor=0.75, priority="choice_major"
    )
    alone, dispatch = make(None), make(make_mesh(sizes), param_specs=SPECS)
    want, got = run(alone, x, choices, experts)[1], run(dispatch, x, choices, experts)[1]
    np.testing.assert_array_equal(want["kept"], got["kept"])
    assert not want["kept"].all()
    assert_close(want, got)


def test_experts_must_divide():
    mesh = make_mesh((1, 2, 4, 1))
    check(8, mesh)
    with pytest.raises(ConfigError, match=r"mesh.expert=4: .*Use 4 or 8 experts"):
        check(6, mesh)
    with pytest.raises(
        ConfigError, match=r"mesh.fsdp=2 x mesh.expert=4 = 8: .*Use 8 or 16 experts"
    ):
        check(12, mesh, ("fsdp", "expert"))


def test_specs_are_optional():
    x, choices, experts = make_case(0.0)
    dispatch = make_dispatch("grouped", make_mesh((1, 1, 2, 1)), backend="ragged_dot")
    assert_close(run(reference, x, choices, experts)[1], run(dispatch, x, choices, experts)[1])


def test_bfloat16_across_devices():
    x, choices, experts = make_case(0.0)
    small = [a.astype(jnp.bfloat16) for a in (x, *experts)]
    dispatch = make_dispatch(
        "grouped", make_mesh((1, 1, 2, 2)), param_specs=SPECS, backend="ragged_dot"
    )
    output = jax.jit(lambda x, c, p: dispatch(x, c, p, swiglu).output)(
        small[0], choices, Experts(*small[1:])
    )
    want = reference(x, choices, experts, swiglu).output
    assert output.dtype == jnp.bfloat16
    np.testing.assert_allclose(output.astype(jnp.float32), want, atol=4e-2)
