"""Query-key routing: each token asks, each expert answers to a key, as in attention.

The keys of product-key memories (Lample et al. 2019, arXiv:1907.05242) and of BASE layers (Lewis et
al. 2021, arXiv:2103.16716), here with any number of heads, whose scores are averaged: that average
is this project's own. Choice and gates are those of `moe.routing.topk`.
"""

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe.errors import ConfigError
from moe.routing import topk
from moe.routing.gates import Gated
from moe.routing.router import Router


class QueryKeyGate(nnx.Module):
    """`logits = mean_h (W_h x) . k_he / sqrt(key_dim)`.

    Args:
        width: model width `D`.
        num_experts: `E`.
        rngs: its `params` stream draws queries from normal(0, D^-1/2) and keys from
            normal(0, H^1/2), so that logits of normalised tokens start at unit scale.
        heads: `H`.
        key_dim: size of a query; 0 stands for D / H, at least 1.

    Attributes:
        query: float32 `[D H key_dim]`.
        keys: float32 `[E H key_dim]`.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        rngs: nnx.Rngs,
        heads: int = 1,
        key_dim: int = 0,
    ):
        key_dim = key_dim or max(1, width // heads)
        normal = nnx.initializers.normal
        query = normal(width**-0.5)(rngs.params(), (width, heads, key_dim), jnp.float32)
        keys = normal(heads**0.5)(rngs.params(), (num_experts, heads, key_dim), jnp.float32)
        # The few heads of a gate are no axis to shard: `H` stands for those of attention.
        self.query = nnx.Param(query, axes=("D", None, None))
        self.keys = nnx.Param(keys, axes=("E", None, None))

    def __call__(self, tokens: Float[Array, "B S D"]) -> Gated:
        """Scores every expert for every token, in float32."""
        highest = jax.lax.Precision.HIGHEST
        tokens, keys = tokens.astype(jnp.float32), self.keys[...]
        query = jnp.einsum("bsd,dhx->bshx", tokens, self.query[...], precision=highest)
        logits = jnp.einsum("bshx,ehx->bse", query, keys, precision=highest)
        return Gated(logits / (keys.shape[1] * keys.shape[2] ** 0.5))


def check(
    num_experts: int,
    *,
    k: int,
    normalize: str = "renormalize",
    score: str = "softmax",
    heads: int = 1,
    key_dim: int = 0,
) -> None:
    """Refuses options that cannot train.

    Raises:
        ConfigError: fewer than one head, a negative `key_dim`, or what `topk` refuses.
    """
    topk.check(num_experts, k=k, normalize=normalize, score=score)
    if heads < 1 or key_dim < 0:
        raise ConfigError(
            f"router.heads={heads} must be at least 1 and router.key_dim={key_dim} not negative: "
            "they are the number and the size of the queries; key_dim 0 stands for width / heads."
        )


ROUTER = Router(
    topk.route,
    paper="Lample et al. 2019, arXiv:1907.05242",
    equation="l_e = mean_h (W_h x) . k_he / sqrt(d_k), then top-k",
    cost="D H d_k + H d_k E + k experts",
    use="Experts should be told apart by several small queries, or by fewer numbers than D.",
    check=check,
    gate=QueryKeyGate,
    traced=topk.ROUTER.traced,
)
