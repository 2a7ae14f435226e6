from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from moe.errors import ConfigError
from moe.routing import soft_moe
from moe.routing.soft_moe import ROUTER, SoftGate

B, S, D, E, SLOTS = 2, 6, 8, 4, 2
TOKENS = np.random.default_rng(0).normal(size=(B, S, D)).astype(np.float32)


@jax.jit
def whole(gate, tokens, valid):
    gated = gate(tokens)
    return soft_moe.route(gated.logits, valid, **gated.inputs, k=1)


def route(tokens, valid=None, gate=None):
    valid = np.ones(tokens.shape[:2], bool) if valid is None else valid
    return jax.device_get(whole(make_gate() if gate is None else gate, tokens, valid))


def make_gate(slots=SLOTS, scale=5.0):
    gate = SoftGate(D, E, rngs=nnx.Rngs(0), slots=slots)
    gate.scale[...] = jnp.float32(scale)
    return gate


def mixture(plan, tokens):
    """The layer with experts `f_e(x) = tanh((e + 1) x)`, in NumPy."""
    slots = np.einsum("bsp,bsd->bpd", plan.dispatch, tokens)
    factor = 1 + np.arange(slots.shape[1]) // (slots.shape[1] // E)
    return np.einsum("bsp,bpd->bsd", plan.combine, np.tanh(factor[:, None] * slots))


def test_shares_are_those_of_the_paper():
    gate = make_gate()
    phi = np.asarray(gate.kernel[...], np.float64).reshape(D, E * SLOTS)
    phi = phi / np.linalg.norm(phi, axis=0)
    x = TOKENS / np.linalg.norm(TOKENS.astype(np.float64), axis=-1, keepdims=True)
    logits = 5.0 * x @ phi
    plan = route(TOKENS).plan
    np.testing.assert_allclose(plan.dispatch, softmax(logits, axis=1), rtol=1e-4)
    np.testing.assert_allclose(plan.combine, softmax(logits, axis=2), rtol=1e-4)
    np.testing.assert_allclose(plan.dispatch.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(plan.combine.sum(axis=2), 1, rtol=1e-5)


def test_probs_are_the_share_of_each_expert_in_what_a_token_takes():
    routing = route(TOKENS)
    shares = routing.plan.combine.reshape(B, S, E, SLOTS).sum(axis=-1)
    np.testing.assert_allclose(routing.probs, shares, rtol=1e-5)
    np.testing.assert_allclose(routing.probs, softmax(routing.logits, -1), rtol=1e-5)


def test_permuting_tokens_permutes_the_output():
    order = np.random.default_rng(1).permutation(S)
    before, after = (mixture(route(x).plan, x) for x in (TOKENS, TOKENS[:, order]))
    np.testing.assert_allclose(after, before[:, order], rtol=1e-4, atol=1e-6)


def test_permuting_experts_permutes_their_slots():
    order, gate = np.random.default_rng(1).permutation(E), make_gate()
    gate.kernel[...] = gate.kernel[...][:, order]
    plan, other = route(TOKENS).plan, route(TOKENS, gate=gate).plan
    for a, b in zip(plan, other, strict=True):
        a, b = a.reshape(B, S, E, SLOTS), b.reshape(B, S, E, SLOTS)
        np.testing.assert_allclose(b, a[:, :, order], rtol=1e-4)


def test_one_slot_in_all_gives_every_token_the_same_output():
    gate = SoftGate(D, 1, rngs=nnx.Rngs(0))
    plan = route(TOKENS, gate=gate).plan
    assert plan.combine.shape == (B, S, 1)
    output = np.einsum(
        "bsp,bpd->bsd", plan.combine, np.einsum("bsp,bsd->bpd", plan.dispatch, TOKENS)
    )
    np.testing.assert_allclose(output, output[:, :1].repeat(S, axis=1), rtol=1e-5)


@pytest.mark.parametrize("factor", [1e-2, 1e3])
def test_the_length_of_tokens_is_not_seen(factor):
    for a, b in zip(route(TOKENS).plan, route(np.float32(factor) * TOKENS).plan, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)


def test_padding_enters_no_slot_and_takes_nothing():
    valid = np.arange(S) < np.array([[4], [0]])
    tokens = np.where(valid[..., None], TOKENS, np.float32(100))
    routing, cut = route(tokens, valid), route(TOKENS[:, :4])
    assert not routing.plan.dispatch[~valid].any()
    assert not routing.plan.combine[~valid].any()
    np.testing.assert_allclose(routing.plan.dispatch[0, :4], cut.plan.dispatch[0], rtol=1e-5)
    np.testing.assert_allclose(routing.plan.combine[0, :4], cut.plan.combine[0], rtol=1e-5)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(routing))


def test_every_token_sees_later_ones_and_no_other_row():
    assert ROUTER.causality == "C3"
    assert not ROUTER.causal_in_eval
    changed = TOKENS.copy()
    changed[0, -1] *= -1
    before, after = (mixture(route(x).plan, x) for x in (TOKENS, changed))
    assert np.abs(before[0, :-1] - after[0, :-1]).max() > 1e-3
    np.testing.assert_array_equal(before[1], after[1])


def test_gradients_reach_every_slot_and_are_finite_at_a_token_of_zeros():
    valid = jnp.asarray(np.arange(S) < np.array([[S], [0]]))
    weight = np.random.default_rng(2).normal(size=(B, S, E * SLOTS)).astype(np.float32)

    def loss(gate, tokens):
        gated = gate(tokens)
        plan = soft_moe.route(gated.logits, valid, **gated.inputs, k=1).plan
        return (plan.dispatch * weight).sum() + (plan.combine * weight**2).sum()

    tokens = TOKENS.copy()
    tokens[0, 1] = 0
    of_gate, of_tokens = jax.jit(jax.grad(loss, argnums=(0, 1)))(make_gate(), tokens)
    assert (np.abs(of_gate.kernel[...]).max(axis=0) > 1e-6).all()
    assert abs(float(of_gate.scale[...])) > 1e-6
    assert np.isfinite(of_tokens).all()


def test_options_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match=r"slots=0 must be at least 1"):
        soft_moe.check(8, k=1, slots=0)
