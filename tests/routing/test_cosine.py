from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import ConfigError
from moe.routing import cosine
from moe.routing.losses import balance_loss
from moe.routing.report import layer_report
from tests.routing.direct import gate_function, gated, make_gate, random_tokens, routed

TOKENS = random_tokens((2, 16, 12))
GATE = make_gate(cosine.ROUTER, 12, 8)
SAID = gated(GATE, TOKENS)
COSINE = SAID.inputs["cosine"]


def softmax(x):
    x = np.exp(np.asarray(x, np.float64))
    return x / x.sum(-1, keepdims=True)


def with_parameter(gate, name, change):
    """A gate equal to this one but for one parameter."""
    graph, parameters = nnx.split(gate)
    other = nnx.merge(graph, jax.tree.map(jnp.array, parameters))
    getattr(other, name)[...] = change(getattr(other, name)[...])
    return other


def route(k=2, **options):
    return routed(cosine.route, SAID.logits, inputs=SAID.inputs, k=k, **options)


def test_scores_are_cosines_in_the_small_space():
    small = TOKENS.astype(np.float64) @ np.asarray(GATE.projection[...])
    vectors = np.asarray(GATE.vectors[...], np.float64)
    assert small.shape[-1] == 4  # E / 2
    expected = small @ vectors
    expected /= np.linalg.norm(small, axis=-1, keepdims=True) * np.linalg.norm(vectors, axis=0)
    np.testing.assert_allclose(COSINE, expected, atol=1e-5)
    assert np.abs(COSINE).max() <= 1 + 1e-6
    np.testing.assert_allclose(SAID.logits, COSINE / 0.3, rtol=1e-5)


def test_lengths_of_tokens_and_of_vectors_do_not_matter():
    lengths = np.exp(np.random.default_rng(1).uniform(-4, 4, (2, 16, 1))).astype(np.float32)
    np.testing.assert_allclose(gated(GATE, TOKENS * lengths).logits, SAID.logits, atol=1e-5)
    longer = with_parameter(GATE, "vectors", lambda v: v * jnp.arange(1.0, 9.0)[None])
    np.testing.assert_allclose(gated(longer, TOKENS).logits, SAID.logits, atol=1e-5)


def test_choices_and_gates_of_both_forms():
    order = np.argsort(-COSINE, axis=-1)[..., :2]
    scores = {"softmax": softmax(COSINE / 0.3), "sigmoid": 1 / (1 + np.exp(-COSINE / 0.3))}
    for form, score in scores.items():
        plan = route(score=form).plan
        np.testing.assert_array_equal(plan.expert, order)
        np.testing.assert_allclose(plan.gate, np.take_along_axis(score, order, -1), rtol=1e-5)


def test_each_form_starts_at_its_own_temperature():
    sigmoid = make_gate(cosine.ROUTER, 12, 8, score="sigmoid")
    said = gated(sigmoid, TOKENS)
    np.testing.assert_allclose(said.logits, said.inputs["cosine"] / 0.07, rtol=1e-5)
    np.testing.assert_allclose(
        route(score="sigmoid").probs, softmax(COSINE.astype(np.float64) / 0.07), rtol=1e-4
    )
    np.testing.assert_allclose(route(tau0=0.5).probs, softmax(COSINE / 0.5), rtol=1e-4)


def test_a_low_temperature_hardens_the_gate_and_is_clamped():
    gates = []
    for tau in (1.0, 0.3, 0.05, 0.01, 1e-4, 1e-8):
        gate = with_parameter(GATE, "log_scale", lambda x, tau=tau: jnp.full_like(x, -np.log(tau)))
        said = gated(gate, TOKENS)
        gates.append(routed(cosine.route, said.logits, inputs=said.inputs, k=1).plan.gate)
    means = np.array([gate.mean() for gate in gates])
    assert (np.diff(means[:4]) > 0).all()
    np.testing.assert_array_equal(gates[3], gates[4])
    np.testing.assert_array_equal(gates[3], gates[5])


def test_a_token_of_zeros_ties_all_experts_and_has_a_finite_gradient():
    apply, parameters = gate_function(GATE)
    zeros = jnp.zeros((1, 2, 12))
    assert not gated(GATE, zeros).logits.any()

    def loss(parameters, tokens):
        return (apply(parameters, tokens).logits * jnp.arange(8.0)).sum()

    with jax.numpy_rank_promotion("allow"):
        gradients = jax.jit(jax.grad(loss, (0, 1)))(parameters, zeros)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


def loss_gradients(loss):
    """Gradients of `loss(routing)` by parameter."""
    apply, parameters = gate_function(GATE)

    def of_parameters(parameters):
        said = apply(parameters, jnp.asarray(TOKENS))
        return loss(cosine.route(said.logits, jnp.ones((2, 16), bool), k=2, **said.inputs))

    gradients = nnx.to_pure_dict(jax.jit(jax.grad(of_parameters))(parameters))
    return {name: np.abs(g).max() for name, g in gradients.items()}


def test_the_balance_loss_reaches_the_vectors_and_not_the_temperature():
    valid = jnp.ones((2, 16), bool)

    def balance(routing):
        report = layer_report(routing, routing.plan.valid, valid)
        return balance_loss(jax.tree.map(lambda x: x[None], report), "global", total_tokens=32)

    task = loss_gradients(lambda routing: (routing.plan.gate**2).sum())
    assert min(task.values()) > 1e-3
    gradients = loss_gradients(balance)
    assert gradients.pop("log_scale") == 0.0
    assert min(gradients.values()) > 1e-4


def test_above_the_clamp_the_temperature_gets_no_gradient():
    hot = with_parameter(GATE, "log_scale", lambda x: x + 9.0)
    apply, parameters = gate_function(hot)
    loss = jax.grad(lambda p: (apply(p, jnp.asarray(TOKENS)).logits ** 2).sum())
    assert nnx.to_pure_dict(jax.jit(loss)(parameters))["log_scale"] == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "relu"}, "score='relu' is not one of softmax, sigmoid"),
        ({"tau0": -0.1}, r"tau0=-0\.1"),
        ({"dim": -1}, r"router\.dim=-1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        cosine.check(8, k=1, **options)
