"""Token groups: named by the config, the same on every mesh, never on two devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.cli import complete_config
from moe.config import default_config
from moe.dispatch.capacity import capacity, group_size
from moe.dispatch.reference import reference
from moe.dispatch.table import make_dispatch
from moe.errors import ConfigError
from moe.model.build_dispatch import build_dispatch
from moe.model.experts import ExpertParams
from moe.routing.types import Choices
from tests.dispatch import test_einsum
from tests.dispatch.common import run, swiglu
from tests.dispatch.test_exchange import FLAT_MESH, across, make_case
from tests.dispatch.test_mesh import assert_close, make_mesh


def outcome(path, x, choices, experts):
    """Output and kept choices, compiled."""
    return jax.jit(lambda *args: path(*args, swiglu))(x, choices, experts)


def test_a_group_is_a_row_of_its_own():
    x, choices, experts = test_einsum.make_case()
    path = functools.partial(capacity, capacity_factor=0.7, priority="choice_major")
    want = outcome(functools.partial(path, group=6), x, choices, experts)
    cut = Choices(*(a.reshape(4, 6, -1) for a in choices))
    got = outcome(path, x.reshape(4, 6, -1), cut, experts)
    np.testing.assert_array_equal(want.kept.reshape(4, 6, -1), got.kept)
    np.testing.assert_allclose(want.output.reshape(4, 6, -1), got.output, rtol=1e-6)
    assert (outcome(path, x, choices, experts).kept != want.kept).any()


@pytest.mark.parametrize("name", ["capacity", "einsum"])
@pytest.mark.parametrize("priority", ["gate", "ntlb"])
def test_drops_are_those_of_one_device_where_positions_are_sharded(name, priority):
    x, choices, experts = make_case("hot")
    options = {"capacity_factor": 0.75, "priority": priority, "group": 3, "renormalize": True}
    want = run(make_dispatch("capacity", None, **options), x, choices, experts)[1]
    options |= {"exchange": "all_gather"} if priority == "gate" and name == "capacity" else {}
    got = run(across(name, FLAT_MESH, **options), x, choices, experts)[1]
    assert want["kept"].sum() < choices.valid.sum()
    np.testing.assert_array_equal(want["kept"], got["kept"])
    assert_close(want, got)


def test_renormalized_gates_keep_the_mass_of_their_token():
    x, choices, experts = test_einsum.make_case()
    path = functools.partial(capacity, capacity_factor=0.7, renormalize=True)
    got = run(path, x, choices, experts)[1]

    def by_hand(x, choices, experts, expert_fn):
        kept = choices.valid & got["kept"]
        mass = (choices.gate * choices.valid).sum(-1, keepdims=True)
        left = (choices.gate * kept).sum(-1, keepdims=True)
        gate = jnp.where(left > 0, choices.gate * kept * mass / jnp.maximum(left, 1e-20), 0)
        return reference(x, Choices(choices.expert, gate, kept), experts, expert_fn)

    partly = got["kept"].any(-1) & (got["kept"] != choices.valid).any(-1)
    assert partly.any()
    want = run(by_hand, x, choices, experts)[1]
    assert_close(want, got)  # a dropped gate has a gradient too: it gives its mass to the kept one
    assert (
        np.abs(np.asarray(got["gate"])[~got["kept"] & choices.valid & partly[..., None]]).max() > 0
    )


def test_groups_that_do_not_fit_name_one_that_does():
    assert group_size(None, 12) == group_size(99, 12) == group_size(12, 12) == 12
    assert group_size(3, 12, shards=4) == 3
    with pytest.raises(ConfigError, match=r"group=5: .* 12 positions .* Use dispatch.group=4, or"):
        group_size(5, 12)
    with pytest.raises(ConfigError, match=r"mesh.sequence=2.* Use dispatch.group=6, or"):
        group_size(None, 12, shards=2)
    with pytest.raises(ConfigError, match=r"group=4: .* Use dispatch.group=3, or .* divisor of 6"):
        group_size(4, 12, shards=2)


def test_whole_rows_are_refused_where_positions_are_sharded():
    x, choices, experts = make_case("even")
    dispatch = across("capacity", FLAT_MESH)
    with pytest.raises(ConfigError, match=r"dispatch\.group=3"):
        jax.eval_shape(lambda: dispatch(x, choices, experts, swiglu))


def config_with(*overrides):
    pairs = [tuple(text.split("=")) for text in overrides]
    return complete_config(default_config(), [(key, value) for key, value in pairs])


def test_config_refuses_groups_before_anything_compiles():
    mesh = make_mesh((1, 1, 1, 2, 1))
    config = config_with("dispatch.name=capacity", "dispatch.group=96")
    with pytest.raises(ConfigError, match=r"dispatch\.group=64"):
        build_dispatch(config, None, training=True)
    build_dispatch(config, None, training=False)  # which has no slots
    with pytest.raises(ConfigError, match="does not divide the 64 token groups of 64 positions"):
        build_dispatch(
            config_with("dispatch.name=capacity", "dispatch.group=64", "dispatch.chunks=3"),
            None,
            training=True,
        )
    whole = config_with("dispatch.name=einsum", "dispatch.eval_capacity_factor=2")
    with pytest.raises(ConfigError, match=r"dispatch\.group=128"):
        build_dispatch(whole, mesh, training=False)


def test_evaluation_drops_nothing_unless_told_to():
    x, choices, experts = make_case("hot")
    case = x, choices, ExpertParams(*experts)
    config = config_with("dispatch.name=capacity", "dispatch.capacity_factor=0.5")
    config.data.sequence_length = 6
    kept = {
        training: outcome(build_dispatch(config, None, training=training), *case).kept
        for training in (True, False)
    }
    assert kept[True].sum() < choices.valid.sum()
    np.testing.assert_array_equal(kept[False], choices.valid)
    config.dispatch.eval_capacity_factor = 0.5
    out = outcome(build_dispatch(config, None, training=False), *case)
    np.testing.assert_array_equal(out.kept, kept[True])
    config.dispatch.exchange = "ragged"  # of a run that was trained with another path
    build_dispatch(config, None, training=False)
    bounded = config_with("dispatch.exchange=ragged", "dispatch.buffer_factor=1", "mesh.expert=4")
    mesh = make_mesh((1, 1, 4, 1))
    for training in (True, False):
        out = outcome(build_dispatch(bounded, mesh, training=training), *case)
        assert bool((out.kept == choices.valid).all()) is not training
