"""Cosine routing: scores of bounded size, on a small sphere (X-MoE).

Chi et al. 2022, "On the Representation Collapse of Sparse Mixture of Experts" (arXiv:2204.09179).
The clamp of the temperature is Tutel's (Hwang et al. 2022, arXiv:2206.03382).
"""

import math

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe.errors import ConfigError
from moe.routing.gates import Gated, project
from moe.routing.router import Router
from moe.routing.selection import choices, gather, select
from moe.routing.types import Routing

# Temperature at the start, and of the balance loss for good, by form of the gate: the paper's.
TAU0 = {"softmax": 0.3, "sigmoid": 0.07}
MIN_TAU = 0.01


def unit(x: Array, axis: int) -> Array:
    """Divides by the Euclidean norm along `axis`; zeros stay zeros, with gradient 0."""
    square = jnp.square(x).sum(axis=axis, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


class CosineGate(nnx.Module):
    """`logits = cos(W x, v_e) / tau`, in `dim` dimensions.

    Args:
        width: model width `D`.
        num_experts: `E`.
        rngs: its `params` stream draws both kernels from a normal; only their directions count.
        dim: of the sphere; 0 stands for the paper's E/2, at least 2.
        score: form of the gate, a key of `TAU0`.
        tau0: temperature at the start; 0 stands for the paper's.

    Attributes:
        projection: float32 `[D dim]`.
        vectors: float32 `[dim E]`.
        log_scale: float32 scalar, `log(1/tau)`; above `log(1/MIN_TAU)` it acts as that.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        rngs: nnx.Rngs,
        dim: int = 0,
        score: str = "softmax",
        tau0: float = 0.0,
    ):
        dim = dim or max(2, num_experts // 2)
        projection = nnx.initializers.normal(width**-0.5)(rngs.params(), (width, dim), jnp.float32)
        vectors = nnx.initializers.normal(dim**-0.5)(rngs.params(), (dim, num_experts), jnp.float32)
        self.projection = nnx.Param(projection, axes=("D", None))
        self.vectors = nnx.Param(vectors, axes=(None, "E"))
        tau = jnp.asarray(tau0 or TAU0[score], jnp.float32)
        self.log_scale = nnx.Param(-jnp.log(tau), axes=())

    def __call__(self, tokens: Float[Array, "B S D"]) -> Gated:
        """Compares every token with every expert.

        Returns:
            The logits, and `cosine [B S E]` in [-1, 1], which knows no temperature. A token of
            zeros has cosine 0 with all experts.
        """
        small = unit(project(tokens, self.projection[...]), axis=-1)
        cosine = project(small, unit(self.vectors[...], axis=0))
        scale = jnp.exp(jnp.minimum(self.log_scale[...], -math.log(MIN_TAU)))
        return Gated(cosine * scale, {"cosine": cosine})


def route(
    logits: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    *,
    k: int,
    cosine: Float[Array, "B S E"],
    score: str = "softmax",
    tau0: float = 0.0,
) -> Routing:
    """Sends each token to the `k` experts of the largest cosine.

    Gates are `softmax(cosine / tau)` over all experts or `sigmoid(cosine / tau)`, and never
    divided by their sum, which would leave a single gate constant.

    Args:
        logits: `cosine / tau`, float32 `[B S E]`.
        valid: `[B S]`, True for a real token.
        k: experts a token (the paper's 1).
        cosine: float32 `[B S E]`.
        score: form of the gate, a key of `TAU0`.
        tau0: fixed temperature of `probs`; 0 stands for the paper's.

    Returns:
        The decision. `probs` is `softmax(cosine / tau0)`: balance losses reach the vectors and not
        the temperature, which could satisfy them alone by growing.
    """
    probs = jax.nn.softmax(cosine / (tau0 or TAU0[score]))
    scores = jax.nn.softmax(logits) if score == "softmax" else jax.nn.sigmoid(logits)
    expert = select(logits, k)
    return Routing(logits, probs, choices(expert, gather(scores, expert), valid))


def check(
    num_experts: int, *, k: int, score: str = "softmax", tau0: float = 0.0, dim: int = 0
) -> None:
    """Refuses unknown forms and impossible numbers.

    Raises:
        ConfigError: `score` is unknown, or `tau0` or `dim` is negative.
    """
    del num_experts, k
    if score not in TAU0:
        raise ConfigError(f"router.score={score!r} is not one of {', '.join(TAU0)}; choose one.")
    if tau0 < 0 or dim < 0:
        raise ConfigError(
            f"router.tau0={tau0} and router.dim={dim} must not be negative: a temperature and a "
            "number of dimensions are positive, and 0 stands for the paper's."
        )


ROUTER = Router(
    route,
    paper="Chi et al. 2022, arXiv:2204.09179",
    equation="s_e = cos(W x, v_e), gate = softmax(s / tau)_e or sigmoid(s_e / tau), top-k of s",
    cost="D dim + dim E + k experts, dim = E/2",
    use="Token representations should not collapse towards the experts' vectors.",
    check=check,
    gate=CosineGate,
)
