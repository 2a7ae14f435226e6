"""Top-k softmax routing, as in Mixtral, OLMoE and Qwen3.

Jiang et al. 2024 (arXiv:2401.04088), Muennighoff et al. 2024 (arXiv:2409.02060), Yang et al. 2025
(arXiv:2505.09388).

| `normalize` | gates | as in |
|---|---|---|
| `none` | `p_i` of the softmax over all experts; sum below 1 unless K = E | OLMoE, Switch |
| `renormalize` | `p_i / sum_j p_j` over the K chosen; sum 1 | Qwen3 |
| `topk_softmax` | softmax over the K chosen logits; sum 1 | Mixtral |

The last two are the same function, computed in two ways. Differs from Shazeer et al. 2017 (topk
then softmax of noisy logits) by having no noise.
"""

import jax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from moe.errors import ConfigError
from moe.routing.selection import choices, gather, select
from moe.routing.types import Routing, State

NORMALIZE = ("none", "renormalize", "topk_softmax")


def route(
    logits: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    *,
    k: int,
    key: PRNGKeyArray | None = None,
    state: State | None = None,
    token_ids: Int[Array, "B S"] | None = None,
    normalize: str = "renormalize",
) -> Routing:
    """Sends each token to the `k` experts with the largest logits.

    Args:
        logits: float32 `[B S E]`.
        valid: `[B S]`, True for a real token.
        k: experts a token.
        key: not used.
        state: not used.
        token_ids: not used.
        normalize: how gates are formed, one of `NORMALIZE`; see the table above.

    Returns:
        The decision; `probs` is the softmax over all experts, `gate` is in the order of `logits`.
    """
    del key, state, token_ids
    probs = jax.nn.softmax(logits)
    expert = select(logits, k)
    if normalize == "topk_softmax":
        return Routing(
            logits, probs, choices(expert, jax.nn.softmax(gather(logits, expert)), valid)
        )
    gate = gather(probs, expert)
    if normalize == "renormalize":
        gate = gate / gate.sum(axis=-1, keepdims=True)
    return Routing(logits, probs, choices(expert, gate, valid))


def check(num_experts: int, *, k: int, normalize: str = "renormalize") -> None:
    """Refuses options that cannot train.

    Raises:
        ConfigError: `normalize` is unknown, or k = 1 with gates that are then always 1.
    """
    del num_experts
    if normalize not in NORMALIZE:
        raise ConfigError(
            f"router.normalize={normalize!r} is not one of {', '.join(NORMALIZE)}; choose one."
        )
    if k == 1 and normalize != "none":
        raise ConfigError(
            f"router.k=1 with router.normalize={normalize!r}: a single gate divided by itself is "
            "always 1, so the router would get no gradient and never learn. Set "
            "router.normalize='none' or router.k=2 or more."
        )
