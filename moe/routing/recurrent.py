"""Recurrent router: one GRU runs over depth and tells each layer what was decided below.

RMoE, Qiu et al. 2025 (arXiv:2408.06793). Each token has its own hidden state, handed
from sparse layer to sparse layer, so that a choice depends on that token alone.
"""

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe.errors import ConfigError
from moe.routing import topk
from moe.routing.gates import Gated, project
from moe.routing.router import Router

_normal = nnx.initializers.normal
_orthogonal = nnx.initializers.orthogonal()


class GRU(nnx.Module):
    """Gated recurrent unit (Cho et al. 2014, arXiv:1406.1078), one for all layers.

    With input `u` and state `h`: `r, z = sigmoid(u W + b + h V)`, `n = tanh(u W_n + b_n + r * h V_n)`,
    `h' = (1 - z) n + z h`. Differs from `nnx.GRUCell` in running at the highest precision only.

    Args:
        width: not used; tokens are projected before they come here.
        num_experts: not used.
        rngs: its `params` stream draws the kernels.
        memory_width: `X`, size of input and state.

    Attributes:
        input_kernel: float32 `[X 3X]`, columns of r, z, n in this order.
        memory_kernel: float32 `[X 3X]`, orthogonal blocks in the same order.
        bias: float32 `[3X]`.
    """

    def __init__(self, width: int, num_experts: int, *, rngs: nnx.Rngs, memory_width: int = 64):
        del width, num_experts
        X = memory_width
        self.input_kernel = nnx.Param(_normal(X**-0.5)(rngs.params(), (X, 3 * X), jnp.float32))
        blocks = [_orthogonal(rngs.params(), (X, X), jnp.float32) for _ in range(3)]
        self.memory_kernel = nnx.Param(jnp.concatenate(blocks, axis=1))
        self.bias = nnx.Param(jnp.zeros(3 * X, jnp.float32))

    def __call__(
        self, inputs: Float[Array, "B S X"], memory: Float[Array, "B S X"]
    ) -> Float[Array, "B S X"]:
        """Returns the next state."""
        from_inputs = project(inputs, self.input_kernel[...]) + self.bias[...][None, None]
        ur, uz, un = jnp.split(from_inputs, 3, axis=-1)
        hr, hz, hn = jnp.split(project(memory, self.memory_kernel[...]), 3, axis=-1)
        r, z = jax.nn.sigmoid(ur + hr), jax.nn.sigmoid(uz + hz)
        return (1.0 - z) * jnp.tanh(un + r * hn) + z * memory


class RecurrentGate(nnx.Module):
    """`h = GRU(tokens @ projection, h of the layer below)`, `logits = h @ kernel`.

    Projection and kernel are the layer's own, the GRU is shared.

    Args:
        width: model width `D`.
        num_experts: `E`.
        rngs: its `params` stream draws both matrices.
        memory_width: `X`, size of the hidden state.

    Attributes:
        projection: float32 `[D X]`.
        kernel: float32 `[X E]`.
    """

    def __init__(self, width: int, num_experts: int, *, rngs: nnx.Rngs, memory_width: int = 64):
        projection = _normal(width**-0.5)(rngs.params(), (width, memory_width), jnp.float32)
        self.projection = nnx.Param(projection, axes=("D", None))
        kernel = _normal(memory_width**-0.5)(rngs.params(), (memory_width, num_experts))
        self.kernel = nnx.Param(kernel, axes=(None, "E"))

    def __call__(
        self, tokens: Float[Array, "B S D"], *, memory: Float[Array, "B S X"], shared: GRU
    ) -> Gated:
        """Scores every expert; the new hidden state goes to the next sparse layer."""
        hidden = shared(project(tokens, self.projection[...]), memory)
        return Gated(project(hidden, self.kernel[...]), memory=hidden)

    @staticmethod
    def initial_memory(
        batch: int, length: int, num_experts: int, *, memory_width: int = 64
    ) -> Float[Array, "B S X"]:
        """Zeros: `h_0` of the paper."""
        del num_experts
        return jnp.zeros((batch, length, memory_width), jnp.float32)


def check(
    num_experts: int,
    *,
    k: int,
    normalize: str = "renormalize",
    score: str = "softmax",
    memory_width: int = 64,
) -> None:
    """Refuses what `topk.check` refuses, and an empty state.

    Raises:
        ConfigError: see above.
    """
    if memory_width < 1:
        raise ConfigError(
            f"router.memory_width={memory_width} must be at least 1: it is the size of the state "
            "that routers hand from layer to layer. Use 64, or the model's width."
        )
    topk.check(num_experts, k=k, normalize=normalize, score=score)


ROUTER = Router(
    topk.route,
    paper="Qiu et al. 2025, arXiv:2408.06793",
    equation="h_j = GRU(x_j P_j, h_(j-1)), l_j = h_j W_j, then top-k",
    cost="D X + 6 X^2 + X E + k experts, X = memory_width",
    use="Deep stacks whose layers should remember how a token was routed below.",
    check=check,
    gate=RecurrentGate,
    traced=("scale",),
    shared=GRU,
)
