"""The one-hot dispatch and `capacity` are twins: the same drops, outputs and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.dispatch.capacity import PRIORITIES, capacity
from moe.dispatch.einsum import einsum
from moe.dispatch.reference import reference
from moe.errors import ConfigError
from moe.routing.types import Choices
from tests.dispatch.common import Experts, run, swiglu
from tests.dispatch.test_mesh import assert_close

B, S, D, F, E, K = 2, 12, 4, 4, 4, 2


@functools.cache
def make_case():
    rng = np.random.default_rng(0)
    expert = rng.permuted(np.tile(np.arange(E), (B, S, 1)), axis=-1)[..., :K].astype(np.int32)
    expert[rng.random((B, S)) < 0.4] = [0, 3]  # so that some experts are full
    valid = rng.random((B, S, K)) < 0.9
    valid[1, 9:] = False
    gate = np.where(valid, rng.random((B, S, K)), 0).astype(np.float32)
    x = rng.normal(size=(B, S, D)).astype(np.float32)
    wi, wo = rng.normal(size=(E, D, 2, F)) / D**0.5, rng.normal(size=(E, F, D)) / F**0.5
    experts = Experts(jnp.asarray(wi, jnp.float32), jnp.asarray(wo, jnp.float32))
    return jnp.asarray(x), Choices(*map(jnp.asarray, (expert, gate, valid))), experts


@pytest.mark.parametrize("priority", PRIORITIES)
def test_twins_agree(priority):
    options = {"capacity_factor": 0.7, "priority": priority, "group": 6, "renormalize": True}
    want, got = (run(functools.partial(f, **options), *make_case())[1] for f in (capacity, einsum))
    np.testing.assert_array_equal(want["kept"], got["kept"])
    assert 0 < want["kept"].sum() < make_case()[1].valid.sum()
    assert_close(want, got)


def test_room_for_all_equals_the_oracle():
    """Slots are rounded up to a multiple that no group fills."""
    options = {"capacity_factor": None, "capacity_multiple": 8}
    want = run(reference, *make_case())[1]
    assert_close(want, run(functools.partial(einsum, **options), *make_case())[1])


def test_ntlb_gives_a_token_the_first_expert_with_a_slot():
    """Two slots an expert: tokens 2 and 3 fall to their second choice, where token 3 finds none."""
    expert = jnp.array([[[0, 1], [0, 1], [0, 1], [0, 2], [2, 0], [2, 1]]], jnp.int32)
    choices = Choices(expert, jnp.full(expert.shape, 0.5), jnp.ones(expert.shape, bool))
    x = jnp.ones((1, 6, D))
    experts = jax.tree.map(lambda a: a[:3], make_case()[2])
    for path in (capacity, einsum):
        one = functools.partial(path, capacity_factor=0.5, priority="ntlb")
        out = jax.jit(lambda *args, one=one: one(*args, swiglu))(x, choices, experts)
        kept = [(int(t), int(k)) for _, t, k in zip(*np.nonzero(out.kept), strict=True)]
        assert kept == [(0, 0), (1, 0), (2, 1), (4, 0), (5, 0)]


def test_unknown_priority():
    x, choices, experts = make_case()
    with pytest.raises(ConfigError, match="token_major, choice_major, gate, batch, ntlb"):
        einsum(x, choices, experts, swiglu, capacity_factor=1.0, priority="first")
