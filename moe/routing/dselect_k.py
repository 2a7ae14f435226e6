"""DSelect-k: differentiable selectors on a binary code of the experts.

Hazimeh et al. 2021 (arXiv:2106.03760). Every expert works at first; selectors
harden as training goes on, helped by the entropy term, until at most k experts have a gate.
"""

import functools
import math
import operator

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
import numpy as np

from moe.errors import ConfigError
from moe.routing.gates import Gated, project
from moe.routing.router import Router
from moe.routing.selection import gather, select
from moe.routing.types import Routing, Scalar
from moe.routing.variable_k import ACTIVE, effective_experts, straight_through, variable_choices

SELECTORS = ("linear", "static")
FLOOR = 1e-9  # below it, logits and the share inside the experts stop


def code_bits(num_experts: int) -> int:
    """Bits of the code of `num_experts` experts: `ceil(log2 E)`."""
    return (num_experts - 1).bit_length()


class SelectorGate(nnx.Module):
    """The code `z [k bits]` that each selector names, and the selectors' weights before softmax.

    Args:
        width: model width `D`.
        num_experts: `E`.
        rngs: its `params` stream draws codes from U(-g/100, g/100), g = `step_width`: all experts
            start near equal, no two selectors alike.
        k: number of selectors.
        selector: `linear` in the token, or `static`: the same for all tokens.
        step_width: the paper's gamma.

    Attributes:
        codes: float32 `[D k*bits]`, or `[k*bits]` if static.
        mix: float32 `[D k]`, or `[k]` if static.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        rngs: nnx.Rngs,
        k: int,
        selector: str = "linear",
        step_width: float = 1.0,
    ):
        self.k, self.num_experts = k, num_experts
        size = k * code_bits(num_experts)
        shape, axes = ((width,), ("D", None)) if selector == "linear" else ((), (None,))
        scale = step_width / 100
        codes = jax.random.uniform(rngs.params(), (*shape, size), minval=-scale, maxval=scale)
        mix = nnx.initializers.normal(width**-0.5)(rngs.params(), (*shape, k), jnp.float32)
        self.codes = nnx.Param(codes, axes=axes)
        self.mix = nnx.Param(mix, axes=axes)

    def __call__(self, tokens: Float[Array, "B S D"]) -> Gated:
        """Computes `codes [B S k bits]` and `mix [B S k]`; there are no logits but those of `route`."""
        B, S, _ = tokens.shape

        def read(kernel: Array) -> Array:
            if kernel.ndim == 2:
                return project(tokens, kernel)
            return jnp.broadcast_to(kernel, (B, S, *kernel.shape))

        codes = read(self.codes[...]).reshape(B, S, self.k, code_bits(self.num_experts))
        logits = jnp.zeros((B, S, self.num_experts), jnp.float32)
        return Gated(logits, {"codes": codes, "mix": read(self.mix[...])})


def route(
    logits: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    *,
    k: int,
    codes: Float[Array, "B S K M"],
    mix: Float[Array, "B S K"],
    step_width: Scalar = 1.0,
) -> Routing:
    """Mixes the distributions of the selectors.

    With smooth steps `s = smooth_step(codes)`, selector j gives expert e the product over bits of
    `s` where the bit of e is set and `1 - s` where it is not; `gate_e = sum_j softmax(mix)_j r_je`.

    Args:
        logits: only the shape is read.
        valid: `[B S]`, True for a real token.
        k: number of selectors; not read, the codes have it.
        codes: float32 `[B S k bits]`.
        mix: float32 `[B S k]`.
        step_width: the paper's gamma; may be traced.

    Returns:
        The decision, E entries wide, of which those with a gate above 0 are valid; a token whose
        selectors all name codes beyond E has none. `probs` is the gate over its sum; `logits` is
        the logarithm of `probs`, at least log(1e-9). Terms, all `[B S]`:

        * `selector_entropy`: sum over selectors of their entropy, nats.
        * `selector_outside`: sum over selectors of `1/m - 1`, m the share of the selector that
          falls on experts: 0 if E is a power of two (the paper's penalty less its minimum).
        * `active`: number of experts, with the gradient of `exp(entropy)` of `probs`.
    """
    del k
    E = logits.shape[-1]
    selectors = selector_probs(codes, E, step_width)  # [B S K E]
    dense = (jax.nn.softmax(mix)[..., None] * selectors).sum(axis=2)
    expert = select(dense, E)
    gate = gather(dense, expert)
    plan = variable_choices(expert, gate, gate > 0, valid)

    total = dense.sum(axis=-1, keepdims=True)
    probs = jnp.where(total > FLOOR, dense / jnp.maximum(total, FLOOR), 1.0 / E)
    entropy = jax.scipy.special.entr(jnp.where(selectors > 0, selectors, 1.0))
    inside = jnp.maximum(selectors.sum(axis=-1), FLOOR)
    count = plan.valid.sum(axis=-1, dtype=jnp.float32)
    terms = {
        "selector_entropy": entropy.sum(axis=(2, 3)),
        "selector_outside": (1.0 / inside - 1.0).sum(axis=-1),
        ACTIVE: straight_through(count, effective_experts(probs)),
    }
    return Routing(jnp.log(jnp.maximum(probs, FLOOR)), probs, plan, terms)


def smooth_step(t: Array, width: Scalar) -> Array:
    """A cubic from 0 at `-width/2` to 1 at `width/2`, flat at both ends and beyond."""
    t = jnp.clip(t / width, -0.5, 0.5)
    return t * (1.5 - 2.0 * t * t) + 0.5


def selector_probs(codes: Float[Array, "B S K M"], num_experts: int, width: Scalar) -> Array:
    """The share `[B S K E]` that each selector gives to each expert."""
    step = smooth_step(codes, width)
    names = np.arange(num_experts)[None, None, None]
    # One factor a bit: exact zeros and ones keep an exact gradient, which logarithms would not.
    factors = [
        jnp.where(names >> bit & 1, step[..., bit, None], 1.0 - step[..., bit, None])
        for bit in range(step.shape[-1])
    ]
    whole = jnp.ones((*codes.shape[:3], num_experts), step.dtype)
    return functools.reduce(operator.mul, factors, whole)


def check(num_experts: int, *, k: int, selector: str = "linear", step_width: float = 1.0) -> None:
    """Refuses unknown selectors and a step without width.

    Raises:
        ConfigError: `selector` is unknown, or `step_width` is not positive.
    """
    del num_experts, k
    if selector not in SELECTORS:
        raise ConfigError(
            f"router.selector={selector!r} is not one of {', '.join(SELECTORS)}; choose one."
        )
    if not 0.0 < step_width < math.inf:
        raise ConfigError(
            f"router.step_width={step_width} must be above 0: it is the width of the slope between "
            "the two flat ends of a smooth step. The paper uses 1.0."
        )


ROUTER = Router(
    route,
    paper="Hazimeh et al. 2021, arXiv:2106.03760",
    equation="gate_e = sum_j softmax(a)_j prod_b (S(z_jb) if bit b of e else 1 - S(z_jb))",
    cost="k D (log2 E + 1) + E experts early, at most k late",
    use="The choice itself should be trained by gradient, and dense compute at first is no matter.",
    check=check,
    gate=SelectorGate,
    fixed_k=False,
    permutes_experts=False,
    traced=("step_width",),
)
