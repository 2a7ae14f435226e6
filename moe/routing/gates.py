"""Gates: what a router learns. Tokens in, a logit for each expert out, always float32."""

from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from moe.parallel.rules import token_rows
from moe.routing.types import Scalar


class Gated(NamedTuple):
    """What a gate says of every token."""

    logits: Float[Array, "B S E"]  # float32
    inputs: dict[str, Array] = {}  # noqa: RUF012 - further arguments of `route`, by name
    memory: Any = None  # handed to the gate of the next sparse layer: recurrence over depth


def jittered(
    tokens: Float[Array, "B S D"], jitter: Scalar, key: PRNGKeyArray
) -> Float[Array, "B S D"]:
    """Multiplies each element by `u ~ U[1 - jitter, 1 + jitter]` (Fedus et al. 2022, section 2.2).

    For the input of a gate only: experts see clean tokens.

    Args:
        tokens: `[B S D]`, any float type.
        jitter: relative noise; may be traced; 0 changes nothing.
        key: noise key.

    Returns:
        float32 `[B S D]`.
    """
    noise = jax.random.uniform(key, tokens.shape, minval=-1.0, maxval=1.0)
    return tokens.astype(jnp.float32) * (1.0 + jitter * noise)


def project(tokens: Float[Array, "B S D"], kernel: Float[Array, "D X"]) -> Float[Array, "B S X"]:
    """`tokens @ kernel` in float32 at the highest precision.

    A choice between two experts hangs on differences that bfloat16 cannot hold (Fedus et al. 2022,
    section 2.4, "selective precision").
    """
    rows = token_rows(tokens.astype(jnp.float32))
    logits = jnp.matmul(rows, kernel, precision=jax.lax.Precision.HIGHEST)
    return logits.reshape(*tokens.shape[:2], kernel.shape[1])


class LinearGate(nnx.Module):
    """`logits = tokens @ kernel`, with no bias.

    Args:
        width: model width `D`.
        num_experts: `E`.
        rngs: its `params` stream draws the kernel from normal(0, D^-1/2), so that logits of
            normalised tokens start at unit scale and choices are firm from the first step. (The
            customary 0.02 is that scale at D = 2,500 and leaves a narrow model undecided.) Zeros
            would tie all logits and send every token to experts 0 to K-1.

    Attributes:
        kernel: float32 `[D E]`; its metadata key `axes` names the two dimensions.
    """

    def __init__(self, width: int, num_experts: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(width**-0.5)
        kernel = init(rngs.params(), (width, num_experts), jnp.float32)
        self.kernel = nnx.Param(kernel, axes=("D", "E"))

    def __call__(self, tokens: Float[Array, "B S D"]) -> Gated:
        """Scores every expert for every token; the product runs in float32 (`project`)."""
        return Gated(project(tokens, self.kernel[...]))
