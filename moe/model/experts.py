"""Experts: one stacked array a weight, leading axis `E`, and the function that every dispatch path runs."""

import math
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe.dispatch.types import Matmul
from moe.parallel.rules import Rules, parameter_spec, token_rows

# name -> (parallel input projections, non-linearity). A gated unit multiplies two projections.
ACTIVATIONS = {
    "swiglu": (2, jax.nn.silu),  # Shazeer 2020, arXiv:2002.05202
    "gelu": (1, jax.nn.gelu),
}


class ExpertParams(NamedTuple):
    """Weights of `E` experts of hidden width `F`; `P` is 2 for gated units, else 1."""

    wi: Float[Any, "E D P F"]  # an array, or how it is sharded
    wo: Float[Any, "E F D"]


EXPERT_LETTERS = ExpertParams(wi=("E", "D", None, "F"), wo=("E", "F", "D"))


def expert_specs(rules: Rules) -> ExpertParams:
    """How a shard of the exchange sees the weights: its experts, its slice of `F`, all of `D`.

    Where the rules cut `D` of the experts, it is gathered before the exchange.
    """
    whole = rules._replace(experts={**rules.experts, "D": ()})
    return ExpertParams(
        *(parameter_spec(letters, len(letters), whole) for letters in EXPERT_LETTERS)
    )


def fan_in_init(fan_in: int, scale: float = 1.0):
    """Normal of standard deviation `scale / sqrt(fan_in)`, truncated at two of them, which leaves 0.88.

    The expert axis is no fan-in.
    """
    return nnx.initializers.truncated_normal(stddev=scale * fan_in**-0.5)


def feed_forward(params: ExpertParams, rows: Array, matmul: Matmul, activation: str) -> Array:
    """Runs each row through its expert; `matmul` knows which rows belong to which expert.

    Args:
        params: the weights, or one device's share of them.
        rows: `[E n D]` or grouped `[N D]`, whichever `matmul` takes.
        matmul: product of rows with stacked weights `[E X Y]`.
        activation: a name of `ACTIVATIONS`.

    Returns:
        An array like `rows`; a partial sum where `F` is sharded.
    """
    experts, width, parts, hidden = params.wi.shape
    act = ACTIVATIONS[activation][1]
    h = matmul(rows, params.wi.reshape(experts, width, parts * hidden))
    h = act(h[..., :hidden]) * h[..., hidden:] if parts == 2 else act(h)
    return matmul(h, params.wo)


class Experts(nnx.Module):
    """`E` feed-forward experts of one shape."""

    def __init__(
        self,
        num_experts: int,
        width: int,
        hidden: int,
        activation: str,
        *,
        out_scale: float,
        rngs: nnx.Rngs,
    ):
        """`out_scale` shrinks the output projection's initial values (residual depth)."""
        parts = ACTIVATIONS[activation][0]
        self.wi = nnx.Param(
            fan_in_init(width)(rngs.params(), (num_experts, width, parts, hidden)),
            axes=EXPERT_LETTERS.wi,
        )
        self.wo = nnx.Param(
            fan_in_init(hidden, out_scale)(rngs.params(), (num_experts, hidden, width)),
            axes=EXPERT_LETTERS.wo,
        )

    def params(self, dtype: jnp.dtype) -> ExpertParams:
        """The weights in the compute dtype."""
        return ExpertParams(self.wi[...].astype(dtype), self.wo[...].astype(dtype))


def project(x: Float[Array, "B S ..."], kernel: Array, inputs: int = 1) -> Float[Array, "B S ..."]:
    """Product over the last `inputs` axes of `x` and the first of `kernel`, in the dtype of `x`."""
    size = math.prod(kernel.shape[:inputs])
    rows = token_rows(x.reshape(*x.shape[:2], size))
    out = rows @ kernel.astype(x.dtype).reshape(size, -1)
    return out.reshape(*x.shape[:2], *kernel.shape[inputs:])


class MLP(nnx.Module):
    """The dense layer: one expert that every token visits."""

    def __init__(
        self, width: int, hidden: int, activation: str, *, out_scale: float, rngs: nnx.Rngs
    ):
        """Hidden width `hidden`; arguments as for `Experts`."""
        parts = ACTIVATIONS[activation][0]
        self.activation = activation
        self.wi = nnx.Param(
            fan_in_init(width)(rngs.params(), (width, parts, hidden)), axes=("D", None, "F")
        )
        self.wo = nnx.Param(
            fan_in_init(hidden, out_scale)(rngs.params(), (hidden, width)), axes=("F", "D")
        )

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Computes in the dtype of `x`."""
        one = ExpertParams(self.wi[...].astype(x.dtype)[None], self.wo[...].astype(x.dtype)[None])
        out = feed_forward(
            one, token_rows(x), lambda rows, weights: rows @ weights[0], self.activation
        )
        return out.reshape(x.shape)
