from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from moe.routing import topk
from moe.routing.gates import LinearGate
from moe.routing.residual import ROUTER, ResidualGate

B, S, D, E, L = 2, 6, 8, 4, 3
rng = np.random.default_rng(0)
TOKENS = rng.standard_normal((L, B, S, D), np.float32)  # what each of three layers sees


@nnx.split_rngs(splits=L)
@nnx.vmap(in_axes=0, out_axes=0)
def stack(rngs):
    return ResidualGate(D, E, rngs=rngs)


def gates(scale=0.5):
    """Three layers' gates, stacked, as after some training."""
    graph, state = nnx.split(stack(nnx.Rngs(0)))
    residual = scale * rng.standard_normal((L, E, E), np.float32)
    state["residual"] = state["residual"].replace(jnp.asarray(residual))
    return graph, state


def deep(graph, state, tokens):
    """Logits of each layer, by a scan over layers."""

    def layer(memory, scanned):
        gated = nnx.merge(graph, scanned[0])(scanned[1], memory=memory)
        return gated.memory, gated.logits

    start = ResidualGate.initial_memory(B, S, E)
    return jax.lax.scan(layer, start, (state, jnp.asarray(tokens)))[1]


def test_without_residual_it_is_top_k():
    gate, linear = ResidualGate(D, E, rngs=nnx.Rngs(3)), LinearGate(D, E, rngs=nnx.Rngs(3))
    x, memory = jnp.asarray(TOKENS[0]), jnp.asarray(rng.standard_normal((B, S, E), np.float32))
    gated = gate(x, memory=memory)  # the residual is zeros at first
    np.testing.assert_array_equal(gated.logits, linear(x).logits)
    valid = jnp.ones((B, S), bool)
    ours = ROUTER.route(gated.logits, valid, k=2).plan
    np.testing.assert_array_equal(ours.expert, topk.route(linear(x).logits, valid, k=2).plan.expert)


def test_logits_add_those_of_the_layer_before():
    graph, state = gates()
    kernel, residual = (np.asarray(state[n][...], np.float64) for n in ("kernel", "residual"))
    expected, memory = [], 0.0
    for j in range(L):
        memory = TOKENS[j] @ kernel[j] + (memory @ residual[j] if j else 0.0)
        expected.append(memory)
    np.testing.assert_allclose(deep(graph, state, TOKENS), expected, rtol=1e-4, atol=1e-5)


def test_layers_see_below_themselves_and_tokens_see_themselves_only():
    graph, state = gates()
    changed = TOKENS.copy()
    changed[1, 0, 2] += 1.0  # one token as the second layer sees it
    moved = np.asarray(deep(graph, state, TOKENS) != deep(graph, state, changed)).any(-1)
    expected = np.zeros((L, B, S), bool)
    expected[1:, 0, 2] = True
    np.testing.assert_array_equal(moved, expected)


def test_the_residual_learns_from_zeros_where_there_is_memory():
    graph, state = gates(scale=0.0)
    weight = jnp.asarray(rng.standard_normal((L, B, S, E), np.float32))
    gradient = jax.grad(lambda s: (deep(graph, s, TOKENS) * weight).sum())(state)["residual"][...]
    assert not np.asarray(gradient[0]).any()
    assert (np.abs(gradient[1:]).max(axis=(1, 2)) > 1e-2).all()
