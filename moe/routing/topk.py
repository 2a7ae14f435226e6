"""Top-k routing, as in Mixtral, OLMoE and Qwen3.

Jiang et al. 2024 (arXiv:2401.04088), Muennighoff et al. 2024 (arXiv:2409.02060), Yang et al. 2025
(arXiv:2505.09388).

| `normalize` | gates | as in |
|---|---|---|
| `none` | `p_i` of the softmax over all experts; sum below 1 unless K = E | OLMoE, Switch |
| `renormalize` | `p_i / sum_j p_j` over the K chosen; sum 1 | Qwen3 |
| `topk_softmax` | softmax over the K chosen logits; sum 1 | Mixtral |

The last two are the same function, computed in two ways. Differs from Shazeer et al. 2017 (topk
then softmax of noisy logits) by having no noise.

With `score="sqrt_softplus"`, the score of the DeepSeek-V4 configurations in MaxText and Megatron-LM,
`s = sqrt(log(1 + exp(logit)))` takes the place of p: gates are `s_i`, or `s_i / sum_j s_j`, and a
single gate grows without bound. `scale` multiplies all gates, whatever the score.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe.errors import ConfigError
from moe.routing.router import Router
from moe.routing.selection import choices, gather, select
from moe.routing.types import Routing, Scalar

NORMALIZE = ("none", "renormalize", "topk_softmax")
SCORES = ("softmax", "sqrt_softplus")


def route(
    logits: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    *,
    k: int,
    normalize: str = "renormalize",
    score: str = "softmax",
    scale: Scalar = 1.0,
) -> Routing:
    """Sends each token to the `k` experts with the largest logits.

    Args:
        logits: float32 `[B S E]`.
        valid: `[B S]`, True for a real token.
        k: experts a token.
        normalize: how gates are formed, one of `NORMALIZE`; see the table above.
        score: what gates are formed from, one of `SCORES`.
        scale: multiplies the gates; may be traced.

    Returns:
        The decision; `probs` is the score divided by its sum over all experts (the softmax), `gate`
        is in the order of `logits`.
    """
    expert = select(logits, k)
    if score == "sqrt_softplus":
        log_score = log_sqrt_softplus(logits)
        gate = gather(log_score, expert)
        gate = jnp.exp(gate) if normalize == "none" else jax.nn.softmax(gate)
        return Routing(logits, jax.nn.softmax(log_score), choices(expert, scale * gate, valid))
    probs = jax.nn.softmax(logits)
    if normalize == "topk_softmax":
        gate = jax.nn.softmax(gather(logits, expert))
    else:
        gate = gather(probs, expert)
        if normalize == "renormalize":
            gate = gate / gate.sum(axis=-1, keepdims=True)
    return Routing(logits, probs, choices(expert, scale * gate, valid))


def log_sqrt_softplus(logits: Float[Array, "B S E"]) -> Float[Array, "B S E"]:
    """`log(sqrt(log(1 + exp(x))))`, finite where the square root underflows.

    Below -20, `log(1 + exp(x))` is `exp(x)` to nine digits. Logarithms make the quotient of two
    scores a softmax, and keep the slope of the root at 0 out of the gradient.
    """
    small = logits < -20.0
    softplus = jax.nn.softplus(jnp.where(small, 0.0, logits))
    return 0.5 * jnp.where(small, logits, jnp.log(softplus))


def check(
    num_experts: int, *, k: int, normalize: str = "renormalize", score: str = "softmax"
) -> None:
    """Refuses options that cannot train.

    Raises:
        ConfigError: `normalize` or `score` is unknown, they do not go together, or k = 1 with
            gates that are then always 1.
    """
    del num_experts
    for name, value, known in (("normalize", normalize, NORMALIZE), ("score", score, SCORES)):
        if value not in known:
            raise ConfigError(
                f"router.{name}={value!r} is not one of {', '.join(known)}; choose one."
            )
    if score == "sqrt_softplus" and normalize == "topk_softmax":
        raise ConfigError(
            "router.normalize='topk_softmax' is a softmax of logits and does not read "
            "router.score='sqrt_softplus'. Set router.normalize='renormalize'."
        )
    if k == 1 and normalize != "none":
        raise ConfigError(
            f"router.k=1 with router.normalize={normalize!r}: a single gate divided by itself is "
            "always 1, so the router would get no gradient and never learn. Set "
            "router.normalize='none' or router.k=2 or more."
        )


ROUTER = Router(
    route,
    paper="Jiang et al. 2024, arXiv:2401.04088; Muennighoff et al. 2024, arXiv:2409.02060",
    equation="S = top-k of l = x W, gate = p_i / sum_S p_j (or p_i); p = softmax or sqrt-softplus",
    cost="D E + k experts",
    use="The default: what Mixtral, OLMoE and Qwen3 train with.",
    check=check,
    traced=("scale",),
)
