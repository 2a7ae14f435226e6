"""Modalities and experts: separate pools for kinds of tokens, or one pool and losses by kind.

Isolated pools with shared experts are those of ERNIE 4.5 (Baidu 2025, technical report); one pool with
entropy losses for each modality is LIMoE, Mustafa et al. 2022 (arXiv:2206.02770).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from moe.errors import ConfigError
from moe.routing import topk
from moe.routing.entropy_losses import MODALITY_ENTROPY, MODALITY_PROBS, MODALITY_TOKENS
from moe.routing.router import Router
from moe.routing.types import Choices, Routing

MODALITY_LOAD = "modality_load"


def route(
    logits: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    *,
    k: int,
    modality: Int[Array, "B S"],
    modalities: int = 2,
    pools: tuple[int, ...] = (),
    pool_shared: int = 0,
    normalize: str = "renormalize",
) -> Routing:
    """Top-k routing in which a token chooses among the experts of its modality.

    Args:
        logits: float32 `[B S E]`.
        valid: `[B S]`, True for a real token.
        k: experts a token.
        modality: kind of each token, in `[0, M)`. A token of any other kind gets no expert.
        modalities: M.
        pools: experts of each modality: the first `pools[0]` are of kind 0, and so on. Empty
            stands for one pool that is open to all, which is `topk`.
        pool_shared: experts open to every modality: the last ones. `sum(pools) + pool_shared = E`.
        normalize: how gates are formed, as in `moe.routing.topk`.

    Returns:
        The decision; `probs` is the softmax over the experts open to the token.

        Terms by modality, sums over rows: `modality_tokens` `[B S M]`, `modality_probs` `[B S M E]`
        and `modality_entropy` `[B S M]`, nats, for the losses of LIMoE; `modality_load`
        `[B S M E]`, the choices.
    """
    E = logits.shape[-1]
    kind = jax.nn.one_hot(modality, modalities, dtype=bool)  # [B S M]; no hit outside [0, M)
    valid = valid & kind.any(axis=-1)
    allowed = jnp.asarray(_open_experts(E, modalities, pools))[None, None]  # [1 1 M E]
    inside = (kind[..., None] & allowed).any(axis=-2) | ~kind.any(axis=-1, keepdims=True)
    routing = topk.route(jnp.where(inside, logits, -jnp.inf), valid, k=k, normalize=normalize)
    return Routing(logits, routing.probs, routing.plan, _terms(routing, kind))


def _open_experts(
    num_experts: int, modalities: int, pools: tuple[int, ...]
) -> Bool[np.ndarray, "M E"]:
    """Which experts a modality may use."""
    if not pools:
        return np.ones((modalities, num_experts), bool)
    owner = np.full(num_experts, -1)  # shared
    owner[: sum(pools)] = np.repeat(np.arange(modalities), pools)
    return (owner == np.arange(modalities)[:, None]) | (owner == -1)


def _terms(routing: Routing, kind: Bool[Array, "B S M"]) -> dict[str, Array]:
    probs, plan = routing.probs, routing.plan
    assert isinstance(plan, Choices)
    # A log of 0 would turn the gradient of an expert outside the pool into NaN.
    entropy = jax.scipy.special.entr(jnp.where(probs > 0, probs, 1.0)).sum(axis=-1)
    chosen = jax.nn.one_hot(plan.expert, probs.shape[-1], dtype=bool) & plan.valid[..., None]
    by_kind = kind.astype(probs.dtype)
    load = chosen.sum(axis=-2).astype(probs.dtype)  # [B S E]
    return {
        MODALITY_TOKENS: by_kind,
        MODALITY_PROBS: by_kind[..., None] * probs[..., None, :],
        MODALITY_ENTROPY: by_kind * entropy[..., None],
        MODALITY_LOAD: by_kind[..., None] * load[..., None, :],
    }


def check(
    num_experts: int,
    *,
    k: int,
    modalities: int = 2,
    pools: tuple[int, ...] = (),
    pool_shared: int = 0,
    normalize: str = "renormalize",
) -> None:
    """Refuses pools that do not add up to the experts, or that hold fewer than k.

    Raises:
        ConfigError: see above, and what `topk.check` refuses.
    """
    if modalities < 1:
        raise ConfigError(f"router.modalities={modalities} must be at least 1.")
    if pools:
        _check_pools(num_experts, k, modalities, tuple(pools), pool_shared)
    elif pool_shared:
        raise ConfigError(
            f"router.pool_shared={pool_shared} without router.pools: all experts are shared already. "
            "Set router.pools to the number of experts of each modality, or router.pool_shared=0."
        )
    topk.check(num_experts, k=k, normalize=normalize)


def _check_pools(
    num_experts: int, k: int, modalities: int, pools: tuple[int, ...], pool_shared: int
) -> None:
    if len(pools) != modalities:
        raise ConfigError(
            f"router.pools={pools} has {len(pools)} entries for router.modalities={modalities}: give "
            "the number of experts of each modality."
        )
    if min(*pools, pool_shared) < 0 or sum(pools) + pool_shared != num_experts:
        raise ConfigError(
            f"router.pools={pools} and router.pool_shared={pool_shared} must be at least 0 and add up "
            f"to model.num_experts={num_experts}; their sum is {sum(pools) + pool_shared}."
        )
    if min(pools) + pool_shared < k:
        raise ConfigError(
            f"router.pools={pools} with router.pool_shared={pool_shared} leave a modality "
            f"{min(pools) + pool_shared} experts, fewer than router.k={k}. Enlarge that pool or lower "
            "router.k."
        )


ROUTER = Router(
    route,
    paper="Baidu 2025, ERNIE 4.5; Mustafa et al. 2022, arXiv:2206.02770",
    equation="top-k of l over pool(modality) and shared experts",
    cost="D E + k experts",
    use="Tokens of several kinds in one model: text and images, or code and prose.",
    check=check,
    permutes_experts=False,
)
