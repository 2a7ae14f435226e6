"""Random tokens, choices and SwiGLU experts shared by the tests of dispatch."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe.routing.types import Choices


class Experts(NamedTuple):
    wi: jax.Array  # [E D 2 F]
    wo: jax.Array  # [E F D]


def swiglu(params: Experts, rows: jax.Array, matmul: Any) -> jax.Array:
    E, D, G, F = params.wi.shape
    hidden = matmul(rows, params.wi.reshape(E, D, G * F))
    gate, up = jnp.split(hidden, 2, axis=-1)
    return matmul(jax.nn.silu(gate) * up, params.wo)


def make_experts(key: jax.Array, E: int, D: int, F: int, dtype: Any = jnp.float32) -> Experts:
    k1, k2 = jax.random.split(key)
    wi = jax.random.normal(k1, (E, D, 2, F)) / D**0.5
    wo = jax.random.normal(k2, (E, F, D)) / F**0.5
    return Experts(wi.astype(dtype), wo.astype(dtype))


def make_choices(
    key: jax.Array, B: int, S: int, E: int, K: int, skew: float = 0.0, padding: float = 0.2
) -> Choices:
    """Distinct experts for every token; `skew` pulls them to expert 0; `padding` rows end invalid."""
    k1, k2 = jax.random.split(key)
    logits = jax.random.normal(k1, (B, S, E)).at[..., 0].add(skew)
    gate, expert = jax.lax.top_k(jax.nn.softmax(logits), K)
    valid = jnp.broadcast_to(jnp.arange(S)[None, :, None] < S * (1 - padding), (B, S, K))
    valid &= jax.random.uniform(k2, (B, S, K)) < 0.9
    return Choices(expert, jnp.where(valid, gate, 0), valid)


def run(path, x, choices, experts, *, compiled=None):
    """`(compiled, results)`: output, drops and all gradients of a random projection of the output."""
    probe = jax.random.normal(jax.random.key(9), x.shape)

    def loss(x, choices, gate, experts):
        out = path(x, choices._replace(gate=gate), experts, swiglu)
        return (out.output.astype(jnp.float32) * probe).sum(), out

    compiled = compiled or jax.jit(jax.grad(loss, argnums=(0, 2, 3), has_aux=True))
    grads, out = compiled(x, choices, choices.gate, experts)
    results = {"output": out.output, "kept": out.kept, "x": grads[0], "gate": grads[1]}
    return compiled, results | {"wi": grads[2].wi, "wo": grads[2].wo}
