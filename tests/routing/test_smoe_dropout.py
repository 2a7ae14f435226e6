import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import ConfigError
from moe.routing import smoe_dropout

B, S, D, E = 2, 6, 16, 8
TOKENS = np.random.default_rng(0).normal(size=(B, S, D)).astype(np.float32)
VALID = np.arange(S) < np.array([[S], [4]])
STATE = smoe_dropout.init_state(E, 11, 4, jax.random.key(1), D)


@functools.partial(jax.jit, static_argnames=("k", "training", "k_min", "ramp_steps"))
def routed(tokens, state, k=4, training=True, k_min=2, ramp_steps=100):
    options = {"k_min": k_min, "ramp_steps": ramp_steps}
    return smoe_dropout.route(
        jnp.zeros((B, S, E)),
        jnp.asarray(VALID),
        k=k,
        tokens=tokens,
        state=state,
        training=training,
        **options,
    )


def at_step(step, **options):
    return jax.device_get(routed(TOKENS, {**STATE, "step": jnp.int32(step)}, **options))


def test_ramp_goes_from_k_min_to_k_and_never_falls():
    steps = jnp.arange(0, 130)
    active = jax.vmap(lambda s: smoe_dropout.active_experts(s, 16, 8, 100))(steps)
    assert active[0] == 8
    assert active[50] == 12
    assert (active[100:] == 16).all()
    assert (jnp.diff(active) >= 0).all()
    assert int(smoe_dropout.active_experts(jnp.int32(7), 3, 3, 100)) == 3


@pytest.mark.parametrize(("step", "active"), [(0, 2), (50, 3), (100, 4), (1000, 4)])
def test_choices_beyond_the_ramp_are_masked_and_the_others_keep_their_softmax(step, active):
    plan = at_step(step).plan
    assert plan.expert.shape == (B, S, 4)
    np.testing.assert_array_equal(plan.valid, VALID[..., None] & (np.arange(4) < active))
    assert not plan.gate[~plan.valid].any()
    logits = TOKENS.astype(np.float64) @ np.asarray(STATE["kernel"], np.float64)
    best = np.argsort(-logits, axis=-1)[..., :active]
    np.testing.assert_array_equal(plan.expert[..., :active], best)
    weight = np.exp(np.take_along_axis(logits, best, -1))
    expected = weight / weight.sum(-1, keepdims=True)
    np.testing.assert_allclose(plan.gate[0, :, :active], expected[0], rtol=1e-5)
    np.testing.assert_allclose(plan.gate.sum(-1), VALID, rtol=1e-6)


def test_one_compilation_serves_the_whole_ramp():
    traced = []

    def active(state):
        traced.append(1)
        return routed(TOKENS, state).plan.valid.sum()

    compiled = jax.jit(active)
    counts = [int(compiled({**STATE, "step": jnp.int32(step)})) for step in (0, 50, 100)]
    assert counts == [2 * VALID.sum(), 3 * VALID.sum(), 4 * VALID.sum()]
    assert len(traced) == 1


def test_evaluation_takes_any_k_and_all_experts_are_the_dense_mixture():
    assert at_step(0, training=False).plan.valid[0].all()
    assert at_step(0, training=False, k=1).plan.expert.shape == (B, S, 1)
    routing = at_step(0, training=False, k=E)
    outputs = np.random.default_rng(1).normal(size=(B, S, E, 3))
    chosen = np.take_along_axis(outputs, routing.plan.expert[..., None], axis=2)
    sparse = (chosen * routing.plan.gate[..., None]).sum(2)
    dense = np.einsum("bse,bsed->bsd", routing.probs, outputs)
    np.testing.assert_allclose(sparse[0], dense[0], atol=1e-5)


def test_the_router_is_frozen():
    assert smoe_dropout.ROUTER.gate is None

    def loss(tokens, kernel):
        state = {"kernel": kernel, "step": jnp.int32(60)}
        routing = smoe_dropout.route(
            jnp.zeros((B, S, E)),
            jnp.asarray(VALID),
            k=4,
            tokens=tokens,
            state=state,
            ramp_steps=100,
        )
        weight = jnp.arange(4.0)[None, None]
        return (routing.plan.gate * weight).sum() + (routing.probs**2).sum() + routing.logits.sum()

    gradients = jax.grad(loss, argnums=(0, 1))(jnp.asarray(TOKENS), STATE["kernel"])
    assert not any(np.asarray(g).any() for g in gradients)
    new = STATE
    for _ in range(3):
        new = smoe_dropout.update_state(new)
    np.testing.assert_array_equal(new["kernel"], STATE["kernel"])
    assert int(new["step"]) == 3


def test_state_is_drawn_from_the_key_at_the_scale_of_a_learned_gate():
    make = jax.vmap(lambda key: smoe_dropout.init_state(64, 11, 2, key, 128))
    kernel = make(jax.random.split(jax.random.key(0), 2))["kernel"]
    assert kernel.shape == (2, 128, 64)
    np.testing.assert_allclose(kernel.std(axis=(1, 2)), 128**-0.5, rtol=0.03)
    assert not np.allclose(kernel[0], kernel[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k_min": 5}, r"k_min=5 must be between 1 and router\.k=4"),
        ({"k_min": 0}, "k_min=0"),
        ({"ramp_steps": 0}, r"ramp_steps=0 must be at least 1.*k_min=4"),
    ],
)
def test_a_ramp_that_does_not_rise_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        smoe_dropout.check(E, k=4, **options)
