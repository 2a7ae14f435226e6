"""Attention over experts, one token at a time, so that scores see how experts correlate.

Wu et al. 2024, Yuan 2.0-M32 (arXiv:2405.17976). Choice and gates are those of
`moe.routing.topk`; the paper takes k = 2 and the softmax of the chosen logits. Attention never
crosses tokens: a head that spanned several would show a token its successors.
"""

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe.routing import topk
from moe.routing.gates import Gated, project
from moe.routing.router import Router


class ExpertAttentionGate(nnx.Module):
    """`logits = softmax(q k^T) v` with q, k, v in R^E, one number for each expert.

    Materialises `[B S E E]` numbers: at E = 128 as much as 16,384 for each token.

    Args:
        width: model width `D`.
        num_experts: `E`.
        rngs: its `params` stream draws the kernels from normal(0, D^-1/2).

    Attributes:
        query: float32 `[D E]`.
        key: float32 `[D E]`.
        value: float32 `[D E]`.
    """

    def __init__(self, width: int, num_experts: int, *, rngs: nnx.Rngs):
        def kernel() -> nnx.Param:
            init = nnx.initializers.normal(width**-0.5)
            value = init(rngs.params(), (width, num_experts), jnp.float32)
            return nnx.Param(value, axes=("D", "E"))

        self.query, self.key, self.value = kernel(), kernel(), kernel()

    def __call__(self, tokens: Float[Array, "B S D"]) -> Gated:
        """Scores every expert for every token, in float32."""
        kernels = (self.query, self.key, self.value)
        query, key, value = (project(tokens, kernel[...]) for kernel in kernels)
        weights = jax.nn.softmax(
            query[..., :, None] * key[..., None, :]
        )  # [B S E E], rows sum to 1
        return Gated((weights * value[..., None, :]).sum(axis=-1))


ROUTER = Router(
    topk.route,
    paper="Wu et al. 2024, arXiv:2405.17976",
    equation="l = softmax(q k^T) v with q, k, v = x W_q, x W_k, x W_v in R^E, then top-k",
    cost="3 D E + 2 E^2 + k experts",
    use="Pairs of experts should be chosen together rather than one by one.",
    check=topk.check,
    gate=ExpertAttentionGate,
    traced=topk.ROUTER.traced,
)
