from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import ConfigError
from moe.routing.recurrent import GRU, ROUTER, RecurrentGate

B, S, D, E, L, X = 2, 6, 8, 4, 3, 5
rng = np.random.default_rng(0)
TOKENS = rng.standard_normal((L, B, S, D), np.float32)
SHARED = GRU(D, E, rngs=nnx.Rngs(7), memory_width=X)


@nnx.split_rngs(splits=L)
@nnx.vmap(in_axes=0, out_axes=0)
def stack(rngs):
    return RecurrentGate(D, E, rngs=rngs, memory_width=X)


GRAPH, STATE = nnx.split(stack(nnx.Rngs(0)))
GRU_GRAPH, GRU_STATE = nnx.split(SHARED)


def deep(tokens, state=STATE, gru=GRU_STATE):
    """Logits of each layer, by a scan over layers that share the GRU."""
    shared = nnx.merge(GRU_GRAPH, gru)

    def layer(memory, scanned):
        gated = nnx.merge(GRAPH, scanned[0])(scanned[1], memory=memory, shared=shared)
        return gated.memory, gated.logits

    start = RecurrentGate.initial_memory(B, S, E, memory_width=X)
    return jax.lax.scan(layer, start, (state, jnp.asarray(tokens)))[1]


def test_the_unit_is_that_of_flax():
    cell = nnx.GRUCell(X, X, rngs=nnx.Rngs(0))
    cell.dense_i.kernel[...] = SHARED.input_kernel[...]
    cell.dense_h.kernel[...] = SHARED.memory_kernel[...]
    bias = jnp.asarray(rng.standard_normal(3 * X, np.float32))
    cell.dense_i.bias[...] = bias
    ours = GRU(D, E, rngs=nnx.Rngs(7), memory_width=X)
    ours.bias[...] = bias
    u, h = jnp.asarray(rng.standard_normal((2, B, S, X), np.float32))
    np.testing.assert_allclose(ours(u, h), cell(h, u)[0], rtol=1e-5, atol=1e-6)


def test_scan_over_layers_equals_the_layers_one_by_one():
    memory, logits = jnp.zeros((B, S, X)), []
    for j in range(L):
        gate = nnx.merge(GRAPH, jax.tree.map(lambda x, j=j: x[j], STATE))
        memory = SHARED(TOKENS[j] @ gate.projection[...], memory)
        logits.append(memory @ gate.kernel[...])
    np.testing.assert_allclose(deep(TOKENS), jnp.stack(logits), rtol=1e-5, atol=1e-6)


def test_layers_see_below_themselves_and_tokens_see_themselves_only():
    changed = TOKENS.copy()
    changed[1, 0, 2] += 1.0
    moved = np.asarray(deep(TOKENS) != deep(changed)).any(-1)
    expected = np.zeros((L, B, S), bool)
    expected[1:, 0, 2] = True
    np.testing.assert_array_equal(moved, expected)


def test_all_layers_teach_the_shared_unit_and_their_own_gate():
    weight = rng.standard_normal((L, B, S, E), np.float32)

    def loss(state, gru, last):
        return (deep(TOKENS, state, gru) * weight)[: last + 1].sum()

    grad = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    layers, gru = grad(STATE, GRU_STATE, L - 1)
    first_only = grad(STATE, GRU_STATE, 0)
    for g in jax.tree.leaves(layers):
        assert (np.abs(g).max(axis=(1, 2)) > 1e-3).all()
    assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(gru))
    # The first layer starts from no memory: its part alone does not reach the memory's kernel.
    assert not np.asarray(first_only[1]["memory_kernel"][...]).any()


def test_logits_tell_experts_apart_from_the_start():
    shared = GRU(64, 16, rngs=nnx.Rngs(0))
    gate = RecurrentGate(64, 16, rngs=nnx.Rngs(1))
    x = jnp.asarray(rng.standard_normal((2, 50, 64), np.float32))
    gated = gate(x, memory=gate.initial_memory(2, 50, 16), shared=shared)
    assert gated.logits.dtype == jnp.float32
    assert 0.1 < float(gated.logits.std()) < 1.5
    experts = ROUTER.route(gated.logits, jnp.ones((2, 50), bool), k=2).plan.expert
    assert len(np.unique(experts)) == 16


def test_an_empty_state_is_refused():
    with pytest.raises(ConfigError, match="memory_width=0 must be at least 1"):
        ROUTER.check(8, k=2, memory_width=0)
