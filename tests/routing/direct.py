"""Runs one router by its functions, without a model."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from moe.routing.router import Router
from moe.routing.types import Routing


@functools.cache
def _compiled(route, options):
    return jax.jit(functools.partial(route, **dict(options)))


def routed(route, logits, valid=None, *, inputs=None, **options) -> Routing:
    """The decision on these logits, in NumPy; `inputs` are arrays that the gate would have made."""
    valid = np.ones(logits.shape[:2], bool) if valid is None else valid
    arrays = jax.tree.map(jnp.asarray, (logits, valid, inputs or {}))
    compiled = _compiled(route, tuple(options.items()))
    return jax.device_get(compiled(*arrays[:2], **arrays[2]))


def make_gate(row: Router, width: int, num_experts: int, *, seed: int = 0, **options):
    """A gate with parameters drawn from `seed`."""
    assert row.gate is not None
    return row.gate(width, num_experts, rngs=nnx.Rngs(params=seed), **options)


def gate_function(gate):
    """The gate as `function(parameters, tokens)`, and its parameters."""
    graph, parameters = nnx.split(gate)

    def apply(parameters, tokens):
        return nnx.merge(graph, parameters)(tokens)

    return apply, parameters


def gated(gate, tokens):
    """What a gate says of tokens, in NumPy."""
    apply, parameters = gate_function(gate)
    return jax.device_get(jax.jit(apply)(parameters, jnp.asarray(tokens)))


def parameter_gradients(row: Router, gate, tokens, score, **options):
    """Gradients, by parameter, of `score(routing)` for a gate and the router behind it."""
    apply, parameters = gate_function(gate)
    valid = jnp.ones(tokens.shape[:2], bool)

    def loss(parameters):
        said = apply(parameters, jnp.asarray(tokens))
        return score(row.route(said.logits, valid, **said.inputs, **options))

    return jax.device_get(nnx.to_pure_dict(jax.jit(jax.grad(loss))(parameters)))


def random_tokens(shape=(2, 6, 8), seed=0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)
