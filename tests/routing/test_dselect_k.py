import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import ConfigError
from moe.routing import dselect_k
from tests.routing.direct import gated, make_gate, parameter_gradients, random_tokens, routed

TOKENS = random_tokens((2, 16, 12))


def drawn(num_experts, k, scale=0.3, seed=0):
    """Codes and mixing weights as a gate would make them."""
    rng = np.random.default_rng(seed)
    bits = dselect_k.code_bits(num_experts)
    codes = scale * rng.standard_normal((2, 16, k, bits), np.float32)
    return {"codes": codes, "mix": rng.standard_normal((2, 16, k), np.float32)}


def route(inputs, num_experts, **options):
    logits = np.zeros((2, 16, num_experts), np.float32)
    return routed(dselect_k.route, logits, inputs=inputs, k=2, **options)


def reference(inputs, num_experts):
    """Selectors and gates written as loops, in float64."""
    codes, mix = (np.asarray(x, np.float64) for x in inputs.values())
    t = np.clip(codes, -0.5, 0.5)
    step = -2 * t**3 + 1.5 * t + 0.5
    selectors = np.ones((*mix.shape, num_experts))
    for e in range(num_experts):
        for bit in range(codes.shape[-1]):
            one = step[..., bit]
            selectors[..., e] *= one if (e >> bit) & 1 else 1 - one
    weights = np.exp(mix) / np.exp(mix).sum(-1, keepdims=True)
    return selectors, (weights[..., None] * selectors).sum(-2)


def dense(plan, num_experts):
    hot = plan.expert[..., None] == np.arange(num_experts)
    return (hot * plan.gate[..., None]).sum(-2)


@pytest.mark.parametrize("num_experts", [1, 2, 6, 8])
def test_gates_equal_the_definition(num_experts):
    inputs = drawn(num_experts, 2)
    routing, (selectors, gates) = route(inputs, num_experts), reference(inputs, num_experts)
    np.testing.assert_allclose(dense(routing.plan, num_experts), gates, atol=1e-6)
    np.testing.assert_array_equal(routing.plan.valid, routing.plan.gate > 0)
    assert (np.diff(routing.plan.gate) <= 0).all()
    np.testing.assert_allclose(
        routing.probs, gates / gates.sum(-1, keepdims=True), rtol=1e-4, atol=1e-6
    )
    entropy = -(selectors * np.log(np.where(selectors > 0, selectors, 1))).sum((-1, -2))
    np.testing.assert_allclose(routing.terms["selector_entropy"], entropy, rtol=1e-4, atol=1e-6)
    outside = (1 / selectors.sum(-1) - 1).sum(-1)
    np.testing.assert_allclose(routing.terms["selector_outside"], outside, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [0.01, 0.3, 5.0])
def test_selectors_and_gates_of_a_power_of_two_sum_to_one(scale):
    inputs = drawn(8, 3, scale)
    selectors = dselect_k.selector_probs(jnp.asarray(inputs["codes"]), 8, 1.0)
    np.testing.assert_allclose(selectors.sum(-1), 1.0, rtol=1e-6)
    routing = route(inputs, 8)
    np.testing.assert_allclose(routing.plan.gate.sum(-1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(routing.terms["selector_outside"], 0.0, atol=1e-6)


def test_saturated_codes_leave_at_most_k_experts():
    inputs = drawn(8, 2)
    inputs["codes"] = np.where(inputs["codes"] > 0, 0.5, -0.7).astype(np.float32)
    routing = route(inputs, 8)
    named = ((inputs["codes"] > 0) * 2 ** np.arange(3)).sum(-1)  # [B S k]
    np.testing.assert_array_equal(
        routing.plan.valid.sum(-1), [[len(set(t)) for t in r] for r in named]
    )
    np.testing.assert_array_equal(routing.terms["active"], routing.plan.valid.sum(-1))
    assert set(np.unique(routing.plan.valid.sum(-1))) == {1, 2}
    weight = np.exp(inputs["mix"]) / np.exp(inputs["mix"]).sum(-1, keepdims=True)
    expected = ((named[..., None] == np.arange(8)) * weight[..., None]).sum(-2)
    np.testing.assert_allclose(dense(routing.plan, 8), expected, atol=1e-6)


def test_a_new_gate_uses_all_experts_about_equally():
    gate = make_gate(dselect_k.ROUTER, 12, 8, k=2)
    said = gated(gate, TOKENS)
    assert np.abs(gate.codes[...]).max() <= 0.01
    routing = routed(dselect_k.route, said.logits, inputs=said.inputs, k=2)
    assert routing.plan.valid.all()
    assert np.abs(routing.probs - 1 / 8).max() < 0.1


def test_smooth_step_is_flat_and_continuous_at_both_ends():
    t = np.linspace(-1, 1, 401, dtype=np.float32)
    value, slope = jax.vmap(jax.value_and_grad(lambda x: dselect_k.smooth_step(x, 0.8)))(t)
    assert np.abs(np.diff(slope)).max() < 0.05  # no jump: the steepest slope is 1.5 / 0.8
    np.testing.assert_array_equal(slope[np.abs(t) > 0.4001], 0.0)
    np.testing.assert_array_equal(value, np.clip(value, 0, 1))
    np.testing.assert_array_equal([value[0], value[-1]], [0.0, 1.0])
    np.testing.assert_allclose(value[200], 0.5, atol=1e-6)
    np.testing.assert_allclose(slope[200], 1.5 / 0.8, rtol=1e-5)


def test_selectors_that_name_no_expert_leave_the_token_alone():
    codes = np.full((2, 16, 2, 3), 1.0, np.float32)  # code 7, and there are 6 experts
    inputs = {"codes": codes, "mix": np.zeros((2, 16, 2), np.float32)}
    routing = route(inputs, 6)
    assert not routing.plan.valid.any()
    np.testing.assert_allclose(routing.probs, 1 / 6)
    assert (routing.terms["selector_outside"] > 1e6).all()


@pytest.mark.parametrize("scale", [0.3, 5.0])
@pytest.mark.parametrize("num_experts", [6, 8])
def test_every_gradient_is_finite_even_where_codes_are_saturated(num_experts, scale):
    inputs = jax.tree.map(jnp.asarray, drawn(num_experts, 2, scale))

    def loss(inputs):
        logits = jnp.zeros((2, 16, num_experts))
        routing = dselect_k.route(logits, jnp.ones((2, 16), bool), k=2, **inputs)
        terms = sum(term.sum() for term in routing.terms.values())
        return (routing.plan.gate**2).sum() + routing.logits.sum() + terms

    gradients = jax.jit(jax.grad(loss))(inputs)
    assert all(np.isfinite(g).all() for g in gradients.values())
    assert np.abs(gradients["mix"]).max() > 1e-3


@pytest.mark.parametrize("num_experts", [6, 8])
def test_gradient_equals_finite_differences(num_experts):
    h, names = 1e-5, ("codes", "mix")
    with jax.enable_x64(True):
        drawn64 = {name: np.asarray(x, np.float64) for name, x in drawn(num_experts, 2).items()}
        rng = np.random.default_rng(1)
        weight = jnp.asarray(rng.normal(size=num_experts))
        moves = {name: rng.normal(size=(4, *drawn64[name].shape)) for name in names}

        def loss(inputs):
            logits, valid = jnp.zeros((2, 16, num_experts)), jnp.ones((2, 16), bool)
            routing = dselect_k.route(logits, valid, k=2, **inputs)
            terms = routing.terms["selector_entropy"].sum()
            return (routing.plan.gate * weight[routing.plan.expert]).sum() + terms

        gradient = jax.jit(jax.grad(loss))(jax.tree.map(jnp.asarray, drawn64))
        moved = jax.jit(jax.vmap(loss))
        up, down = (
            np.asarray(moved({n: jnp.asarray(drawn64[n] + s * h * moves[n]) for n in names}))
            for s in (1, -1)
        )
        slopes = sum((moves[n] * np.asarray(gradient[n])).reshape(4, -1).sum(1) for n in names)
    np.testing.assert_allclose(slopes, (up - down) / (2 * h), rtol=1e-3)
    assert np.abs(slopes).min() > 1e-2


def test_padding_has_no_expert():
    valid = np.arange(16) < np.array([[16], [5]])
    logits = np.zeros((2, 16, 8), np.float32)
    plan = routed(dselect_k.route, logits, valid, inputs=drawn(8, 2), k=2).plan
    np.testing.assert_array_equal(plan.valid.any(-1), valid)
    assert not plan.gate[~valid].any()


def test_the_entropy_term_makes_selectors_choose():
    def step(codes, _):
        def loss(codes):
            routing = dselect_k.route(
                jnp.zeros((2, 16, 8)),
                jnp.ones((2, 16), bool),
                k=2,
                codes=codes,
                mix=jnp.asarray(inputs["mix"]),
            )
            return routing.terms["selector_entropy"].sum()

        return codes - 0.02 * jax.grad(loss)(codes), None

    inputs = drawn(8, 2, 0.01)
    codes = jax.jit(lambda c: jax.lax.scan(step, c, length=200)[0])(jnp.asarray(inputs["codes"]))
    after = route(inputs | {"codes": np.asarray(codes)}, 8)
    assert route(inputs, 8).plan.valid.sum(-1).min() == 8
    assert after.plan.valid.sum(-1).max() <= 2


def test_static_selectors_are_the_same_for_every_token_and_learn():
    gate = make_gate(dselect_k.ROUTER, 12, 8, k=2, selector="static")
    said = gated(gate, TOKENS)
    for value in said.inputs.values():
        np.testing.assert_array_equal(value, np.broadcast_to(value[:1, :1], value.shape))
    gradients = parameter_gradients(
        dselect_k.ROUTER, gate, TOKENS, lambda r: (r.probs * jnp.arange(8.0)[None, None]).sum(), k=2
    )
    assert {name: g.shape for name, g in gradients.items()} == {"codes": (6,), "mix": (2,)}
    assert all(np.abs(g).max() > 1e-3 for g in gradients.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selector": "mlp"}, "selector='mlp' is not one of linear, static"),
        ({"step_width": 0.0}, r"step_width=0\.0 must be above 0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        dselect_k.check(8, k=2, **options)
