"""Gating residual: a layer's logits build on those of the sparse layer before.

MoE++, Jin et al. 2024 (arXiv:2410.07348). The recurrence is over depth, not over time:
a token's choice still depends on that token alone.
"""

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe.routing import topk
from moe.routing.gates import Gated, project
from moe.routing.router import Router


class ResidualGate(nnx.Module):
    """`logits = tokens @ kernel + memory @ residual`, memory being the previous layer's logits.

    Args:
        width: model width `D`.
        num_experts: `E`.
        rngs: its `params` stream draws the kernel from normal(0, D^-1/2), as in `LinearGate`.

    Attributes:
        kernel: float32 `[D E]`.
        residual: float32 `[E E]`, zeros at first: training starts from plain top-k routing, and
            the gradient is not zero because the memory is not.
    """

    def __init__(self, width: int, num_experts: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(width**-0.5)
        kernel = init(rngs.params(), (width, num_experts), jnp.float32)
        self.kernel = nnx.Param(kernel, axes=("D", "E"))
        residual = jnp.zeros((num_experts, num_experts), jnp.float32)
        self.residual = nnx.Param(residual, axes=(None, "E"))

    def __call__(self, tokens: Float[Array, "B S D"], *, memory: Float[Array, "B S E"]) -> Gated:
        """Scores every expert; the logits are also the memory for the next sparse layer."""
        logits = project(tokens, self.kernel[...]) + project(memory, self.residual[...])
        return Gated(logits, memory=logits)

    @staticmethod
    def initial_memory(batch: int, length: int, num_experts: int) -> Float[Array, "B S E"]:
        """Zeros: the first sparse layer has no term from below."""
        return jnp.zeros((batch, length, num_experts), jnp.float32)


ROUTER = Router(
    topk.route,
    paper="Jin et al. 2024, arXiv:2410.07348",
    equation="l_j = x_j W_j + l_(j-1) W_gj, then top-k",
    cost="D E + E^2 + k experts",
    use="Deep stacks whose layers should agree on a token: a layer sees what the last one decided.",
    check=topk.check,
    gate=ResidualGate,
    traced=("scale",),
)
