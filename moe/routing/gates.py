"""Gates: what a router learns. Tokens in, a logit for each expert out, always float32."""

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from moe.routing.types import Scalar


class LinearGate(nnx.Module):
    """`logits = tokens @ kernel`, with no bias.

    The product runs in float32 at the highest precision, because a choice between two experts
    hangs on differences that bfloat16 cannot hold (Fedus et al. 2022, section 2.4, "selective
    precision").

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

    def __call__(
        self,
        tokens: Float[Array, "B S D"],
        *,
        jitter: Scalar = 0.0,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B S E"]:
        """Scores every expert for every token.

        Args:
            tokens: `[B S D]`, any float type. Read only: noise stays inside the gate, so that
                experts see clean tokens.
            jitter: the gate sees `tokens * u`, `u ~ U[1 - jitter, 1 + jitter]` for each element
                (Fedus et al. 2022, section 2.2). May be traced; 0 equals no jitter.
            key: noise key; None turns jitter off, as evaluation does.

        Returns:
            Logits, float32 `[B S E]`.
        """
        tokens = tokens.astype(jnp.float32)
        if key is not None:
            noise = jax.random.uniform(key, tokens.shape, minval=-1.0, maxval=1.0)
            tokens = tokens * (1.0 + jitter * noise)
        kernel = self.kernel[...]
        return jnp.einsum("bsd,de->bse", tokens, kernel, precision=jax.lax.Precision.HIGHEST)
