"""Slots, mixing and merging: each path equals its twin, outputs and all gradients, on every mesh."""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.dispatch.plans import (
    dispatch_merging,
    dispatch_mixing,
    dispatch_slots,
    reference_merging,
    reference_mixing,
    reference_slots,
)
from moe.dispatch.reference import reference
from moe.dispatch.table import make_dispatch
from moe.routing.types import Choices, Merging, Mixing, Slots
from tests.dispatch.common import Experts, swiglu
from tests.dispatch.test_mesh import SPECS, assert_close, make_mesh

D, F, E = 8, 12, 4
VALID = np.array([7, 5])  # real tokens of each row


class Kind(NamedTuple):
    path: Callable
    twin: Callable
    plan: Callable  # (rng, B, S) -> plan


def experts(rng, E=E, dtype=np.float32):
    wi, wo = rng.normal(size=(E, D, 2, F)) / D**0.5, rng.normal(size=(E, F, D)) / F**0.5
    return Experts(jnp.asarray(wi, dtype), jnp.asarray(wo, dtype))


def tokens(rng, B, S):
    return jnp.asarray(rng.normal(size=(B, S, D)), jnp.float32)


def slots(rng, B, S, C=3):
    """Distinct tokens for each expert. Expert 1 has no token at all, token 0 is named by none."""
    real = np.resize(VALID, B)
    token = np.stack([[1 + rng.permutation(n - 1)[:C] for _ in range(E)] for n in real])
    valid = rng.random((B, E, C)) < 0.8
    valid[:, 1] = False
    gate = rng.random((B, E, C)) * valid
    return Slots(*map(jnp.asarray, (token.astype(np.int32), gate.astype(np.float32), valid)))


def softmax(x, axis):
    x = np.exp(x - x.max(axis, keepdims=True))
    return (x / x.sum(axis, keepdims=True)).astype(np.float32)


def mixing(rng, B, S, per_expert=2):
    logits = 2 * rng.normal(size=(B, S, E * per_expert))
    real = np.arange(S)[None, :, None] < np.resize(VALID, B)[:, None, None]
    takes = softmax(np.where(real, logits, -np.inf), 1)
    return Mixing(jnp.asarray(takes), jnp.asarray(softmax(logits, 2) * real.astype(np.float32)))


def merging(rng, B, S, M=3):
    return Merging(jnp.asarray(softmax(2 * rng.normal(size=(B, M, E)), 2)))


KINDS = {
    "slots": Kind(dispatch_slots, reference_slots, slots),
    "mixing": Kind(dispatch_mixing, reference_mixing, mixing),
    "merging": Kind(dispatch_merging, reference_merging, merging),
    # five segments of two positions: the fourth has one of the seven, the fifth none
    "merging_ragged": Kind(dispatch_merging, reference_merging, functools.partial(merging, M=5)),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def run(path, x, plan, params):
    """Output, what was kept, and all gradients of a random projection of the output."""
    probe = jnp.asarray(np.random.default_rng(9).normal(size=x.shape), jnp.float32)
    weights = {n: a for n, a in plan._asdict().items() if a.dtype == jnp.float32}

    @functools.partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
    def loss(x, weights, params):
        out = path(x, plan._replace(**weights), params, swiglu)
        return (out.output * probe).sum(), out

    return jax.block_until_ready(jax.jit(loss)(x, weights, params))


@every_kind
def test_path_equals_twin(kind):
    rng = np.random.default_rng(0)
    x, plan, params = tokens(rng, 2, 7), kind.plan(rng, 2, 7), experts(rng)
    want, got = run(kind.twin, x, plan, params), run(kind.path, x, plan, params)
    assert_close(want, got)
    assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(got[0]))
    assert got[1].kept.shape == jax.tree.leaves(plan)[-1].shape


def test_slots_give_zero_to_a_token_named_by_none_and_add_up_experts():
    rng = np.random.default_rng(1)
    x, plan, params = tokens(rng, 2, 7), slots(rng, 2, 7), experts(rng)
    weight = np.zeros((2, 7, E))
    for b, e, c in np.argwhere(plan.valid):
        weight[b, plan.token[b, e, c], e] += plan.gate[b, e, c]
    named = (weight > 0).sum(-1)
    assert named.max() > 1
    assert named[:, 0].max() == 0 == named[1, 5:].max()
    (dx, gates, dparams), out = run(dispatch_slots, x, plan, params)
    assert not np.asarray(out.output)[named == 0].any()
    assert not np.asarray(dx)[named == 0].any()
    assert not np.asarray(gates["gate"])[~np.asarray(plan.valid)].any()
    assert not np.asarray(dparams.wi[1]).any()  # the expert without tokens
    np.testing.assert_array_equal(out.kept, plan.valid)


def test_slots_that_are_not_valid_count_for_nothing_whatever_they_name():
    rng = np.random.default_rng(2)
    x, plan, params = tokens(rng, 2, 7), slots(rng, 2, 7), experts(rng)
    plan = plan._replace(valid=plan.valid & (plan.token != 6))
    poisoned = plan._replace(token=jnp.where(plan.valid, plan.token, 6))
    want = run(dispatch_slots, x, plan, params)
    assert_close(want, run(dispatch_slots, x.at[:, 6].set(jnp.nan), poisoned, params))


def test_slots_that_are_the_view_of_choices_equal_the_oracle():
    """Two views of one edge list: expert e has slot s for token s."""
    rng = np.random.default_rng(3)
    x, params = tokens(rng, 2, 7), experts(rng)
    expert = rng.random((2, 7, E)).argsort(-1)[..., :2].astype(np.int32)
    choices = Choices(*map(jnp.asarray, (expert, rng.random((2, 7, 2), np.float32), expert >= 0)))
    gate = np.zeros((2, E, 7), np.float32)
    for b, s, k in np.ndindex(expert.shape):
        gate[b, expert[b, s, k], s] = choices.gate[b, s, k]
    token = np.broadcast_to(np.arange(7, dtype=np.int32), gate.shape)
    view = Slots(*map(jnp.asarray, (token, gate, gate > 0)))
    (dx, _, dparams), out = run(dispatch_slots, x, view, params)
    (want_dx, _, want_dparams), want = run(reference, x, choices, params)
    assert_close((want_dx, want_dparams, want.output), (dx, dparams, out.output))


def test_merging_with_one_hot_weights_is_that_expert_and_with_equal_experts_any_of_them():
    rng = np.random.default_rng(4)
    x, params = tokens(rng, 2, 7), experts(rng)
    chosen = np.array([[0, 3, 1], [2, 2, 0]])
    one_hot = Merging(jnp.asarray(np.eye(E, dtype=np.float32)[chosen]))
    ones = jnp.ones((2, 7, 1))
    by_token = jnp.asarray(np.repeat(chosen, 3, 1)[:, :7, None], jnp.int32)  # segments of ceil(7/3)
    want = reference(x, Choices(by_token, ones, ones > 0), params, swiglu).output
    got = dispatch_merging(x, one_hot, params, swiglu).output
    np.testing.assert_allclose(got, want, atol=1e-5)

    equal = jax.tree.map(lambda a: jnp.broadcast_to(a[:1], a.shape), params)
    want = reference(x, Choices(0 * by_token, ones, ones > 0), equal, swiglu).output
    got = dispatch_merging(x, merging(rng, 2, 7), equal, swiglu).output
    np.testing.assert_allclose(got, want, atol=1e-5)


@every_kind
def test_bfloat16(kind):
    rng = np.random.default_rng(5)
    x, plan, params = tokens(rng, 2, 7), kind.plan(rng, 2, 7), experts(rng)
    small = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (x, params))
    got = jax.jit(lambda x, p: kind.path(x, plan, p, swiglu).output)(*small)
    want = kind.path(x, plan, params, swiglu).output
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=4e-2)


@pytest.mark.parametrize("name", ["slots", "mixing", "merging"])
@pytest.mark.parametrize("sizes", [(1, 1, 4, 1), (1, 2, 2, 2)], ids=str)
def test_mesh_equals_one_device(name, sizes):
    """Through `make_dispatch`, with parameters and tokens laid out as in training."""
    mesh, rng = make_mesh(sizes), np.random.default_rng(6)
    x, plan, params = tokens(rng, 4, 7), KINDS[name].plan(rng, 4, 7), experts(rng)
    path = make_dispatch("grouped", mesh, param_specs=SPECS)
    place = lambda tree, specs: jax.tree.map(  # noqa: E731
        lambda a, s: jax.device_put(a, jax.NamedSharding(mesh, s)), tree, specs
    )
    batch = jax.P(("data", "fsdp", "expert"))
    got = run(
        path,
        place(x, batch),
        place(plan, jax.tree.map(lambda _: batch, plan)),
        place(params, SPECS),
    )
    assert_close(run(make_dispatch("capacity", None), x, plan, params), got)
