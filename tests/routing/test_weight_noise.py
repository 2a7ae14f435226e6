import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import ConfigError
from moe.routing import weight_noise
from moe.routing.weight_noise import MODES, perturb

N, D, E = 20000, 8, 3
KEY = jax.random.key(2)
RNG = np.random.default_rng(0)
W = RNG.normal(size=(D, E)).astype(np.float32)
X = RNG.normal(size=D).astype(np.float32)
SIGMA = (0.1 + RNG.random((D, E))).astype(np.float32)


def noisy(mode, scale=0.3, sigma=None, key=KEY):
    return perturb(jnp.asarray(W), key, mode, scale, sigma)


@functools.cache
def outputs(mode):
    """`x W'` of `N` draws, float64 `[N E]`."""
    sigma = jnp.asarray(SIGMA) if mode in ("learned", "factorised") else None
    draw = jax.jit(jax.vmap(lambda key: jnp.asarray(X) @ noisy(mode, sigma=sigma, key=key)))
    return np.asarray(draw(jax.random.split(KEY, N)), np.float64)


@pytest.mark.parametrize("mode", MODES)
def test_outputs_are_right_on_average(mode):
    y = outputs(mode)
    assert (np.abs(y.mean(0) - X @ W) < 5 * y.std(0) / np.sqrt(N)).all()


@pytest.mark.parametrize("mode", MODES)
def test_variance_of_an_output_is_the_sum_of_its_weights_variances(mode):
    sigma = {"literal": 0.3 * np.ones((D, E)), "relative": 0.3 * W.std() * np.ones((D, E))}.get(
        mode, 0.3 * SIGMA
    )
    # Factorised entries of a column share a factor, yet they are not correlated.
    factor = 2 / np.pi if mode == "factorised" else 1.0
    expected = factor * (sigma**2 * X[:, None] ** 2).sum(0)
    np.testing.assert_allclose(outputs(mode).var(0), expected, rtol=0.06)


def test_noise_of_one_matrix_has_the_scale_it_was_asked_for():
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(200, 100)) * 0.07, jnp.float32)
    literal = perturb(weight, KEY, "literal") - weight
    np.testing.assert_allclose(literal.std(), 1.0, rtol=0.03)
    relative = perturb(weight, KEY, "relative", 0.1) - weight
    np.testing.assert_allclose(relative.std(), 0.1 * weight.std(), rtol=0.03)
    factorised = weight_noise.factorised_noise(KEY, (300, 200))
    np.testing.assert_allclose(factorised.var(), 2 / np.pi, rtol=0.1)
    np.testing.assert_allclose(np.linalg.matrix_rank(np.asarray(factorised)), 1)


def test_literal_noise_drowns_weights_of_the_usual_scale():
    width = 256
    weight = jnp.asarray(np.random.default_rng(2).normal(size=(width, width)) * width**-0.5)
    x = jnp.asarray(np.random.default_rng(3).normal(size=width), jnp.float32)
    clean = x @ weight.astype(jnp.float32)
    y = x @ perturb(weight.astype(jnp.float32), KEY, "literal")
    assert 12 < (y - clean).std() / clean.std() < 20  # sqrt(256) = 16 times the signal


def test_experts_of_a_stack_have_noise_of_their_own_size():
    experts = jnp.asarray(np.random.default_rng(4).normal(size=(2, 60, 2, 30)), jnp.float32)
    experts = experts * jnp.array([1.0, 10.0]).reshape(2, 1, 1, 1)
    noise = np.asarray(perturb(experts, KEY, "relative", 0.1, stacked=1) - experts)
    np.testing.assert_allclose(noise.std(axis=(1, 2, 3)), [0.1, 1.0], rtol=0.05)
    assert not np.allclose(10 * noise[0], noise[1], rtol=0.1)

    rank_one = np.asarray(weight_noise.factorised_noise(KEY, (2, 60, 2, 30), 1)).reshape(2, 60, 60)
    assert np.linalg.matrix_rank(rank_one).tolist() == [1, 1]
    assert not np.allclose(rank_one[0], rank_one[1])
    sigma = weight_noise.initial_sigma((2, 64, 2, 30), 1)
    np.testing.assert_allclose(sigma, 0.5 / 8, rtol=1e-6)


def test_a_vector_is_one_row():
    vector = jnp.zeros(500)
    noise = perturb(vector, KEY, "factorised", sigma=jnp.ones(500))
    assert noise.shape == (500,)
    assert len(np.unique(noise)) > 400


@pytest.mark.parametrize("mode", MODES)
def test_no_scale_or_no_key_changes_nothing(mode):
    sigma = jnp.asarray(SIGMA)
    np.testing.assert_array_equal(noisy(mode, 0.0, sigma), W)
    np.testing.assert_array_equal(noisy(mode, 0.3, sigma, key=None), W)
    assert (noisy(mode, 0.3, sigma) != W).all()


@pytest.mark.parametrize("mode", MODES)
def test_gradient_is_that_of_the_clean_layer(mode):
    sigma = jnp.asarray(SIGMA)
    x = jnp.asarray(X)
    gradient = jax.grad(lambda w: (x @ perturb(w, KEY, mode, 0.3, sigma)).sum())(jnp.asarray(W))
    np.testing.assert_allclose(gradient, np.broadcast_to(X[:, None], (D, E)), rtol=1e-6)


def test_learned_sizes_get_the_noise_as_their_gradient():
    x = jnp.asarray(X)
    gradient = jax.grad(lambda s: (x @ noisy("learned", 1.0, s)).sum())(jnp.asarray(SIGMA))
    noise = (noisy("learned", 1.0, jnp.asarray(SIGMA)) - W) / SIGMA
    np.testing.assert_allclose(gradient, X[:, None] * noise, rtol=1e-3, atol=1e-5)


def test_a_tree_gets_independent_noise_and_keeps_its_types():
    tree = {"a": jnp.zeros((4, 4)), "b": jnp.zeros((4, 4)), "c": jnp.ones((2, 3, 4), jnp.bfloat16)}
    new = perturb(tree, KEY, "literal", 0.5)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
        lambda x: (x.shape, x.dtype), tree
    )
    assert not np.allclose(new["a"], new["b"])


def test_a_key_fixes_the_draw():
    np.testing.assert_array_equal(noisy("literal"), noisy("literal"))
    assert (noisy("literal") != noisy("literal", key=jax.random.key(3))).all()


def test_mistakes_are_errors():
    with pytest.raises(ValueError, match="not one of literal"):
        noisy("gaussian")
    with pytest.raises(ValueError, match="needs sigma"):
        noisy("learned")


@pytest.mark.parametrize("mode", MODES)
def test_gate_explores_in_training_only_with_one_draw_for_all_tokens(mode):
    gate = weight_noise.NoisyGate(D, E, rngs=nnx.Rngs(0), noise_mode=mode, noise_scale=0.5)
    tokens = jnp.asarray(np.broadcast_to(X, (2, 3, D)))
    clean = gate(tokens).logits
    np.testing.assert_allclose(clean[0, 0], X @ np.asarray(gate.kernel[...]), rtol=1e-5)
    drawn = gate(tokens, key=KEY).logits
    assert np.abs(drawn - clean).min() > 1e-4
    np.testing.assert_array_equal(drawn, np.broadcast_to(drawn[0, 0], drawn.shape))


def test_sizes_of_a_gate_are_learned_beside_its_kernel():
    gate = weight_noise.NoisyGate(D, E, rngs=nnx.Rngs(0), noise_mode="factorised")
    sigma = gate.sigmas.sigma["kernel"]
    np.testing.assert_allclose(sigma[...], 0.5 / np.sqrt(D), rtol=1e-6)
    assert sigma.get_metadata()["axes"] == ("D", "E")
    graph, params = nnx.split(gate, nnx.Param)
    tokens = jnp.asarray(X).reshape(1, 1, D)

    def loss(params):
        return (nnx.merge(graph, params)(tokens, key=KEY).logits ** 2).sum()

    gradient = jax.grad(loss)(params)
    assert all(np.asarray(g).any() for g in jax.tree.leaves(gradient))
    assert len(jax.tree.leaves(gradient)) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_mode": "gauss"}, "noise_mode='gauss' is not one of literal"),
        ({"noise_scale": -0.1}, r"noise_scale=-0\.1 must be at least 0"),
        ({"normalize": "all"}, "normalize='all'"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        weight_noise.check(E, k=2, **options)
