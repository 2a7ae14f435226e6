"""Document pools: a document may use only the few experts that its tokens want most together.

EMO, Allen Institute for AI 2026 (repository allenai/EMO). A pool of M experts is made of
`u = sum over tokens of softmax(logits)`; tokens then choose inside it. The original sums over the whole
document, through which a token sees later ones; that is `document_pool_whole`. In `document_pool` the
pool of a segment is made of what came before the segment, and of the document's first token, which is
all that the first segment has: so every segment has a pool, and no token sees its future.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.errors import ConfigError
from moe.routing import topk
from moe.routing.router import Router
from moe.routing.segment import average, check_segment, representatives, same_document
from moe.routing.selection import select
from moe.routing.types import Routing


def route(
    logits: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    *,
    k: int,
    positions: Int[Array, "B S"],
    documents: Int[Array, "B S"],
    pool_size: int = 4,
    segment_size: int = 16,
    normalize: str = "renormalize",
) -> Routing:
    """Sends each token to its `k` best experts of the pool of its segment.

    Args:
        logits: float32 `[B S E]`.
        valid: `[B S]`, True for a real token; padding has no say in a pool.
        k: experts a token.
        positions: position of each token in its document.
        documents: document of each token.
        pool_size: M, experts a pool.
        segment_size: tokens for which a pool stays the same.
        normalize: how gates are formed, as in `moe.routing.topk`, from the softmax over the pool.

    Returns:
        The decision; `probs` is the softmax over all experts, so that a balance loss reaches those
        outside the pool too.
    """
    index = positions // segment_size
    start = representatives(valid, jnp.zeros_like(index), documents, "first")
    earlier = (index[:, :, None] > index[:, None]) & valid[:, None]
    voters = (earlier | start[:, None]) & same_document(documents)
    return route_in_pool(logits, valid, voters, k, pool_size, normalize)


def route_whole(
    logits: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    *,
    k: int,
    documents: Int[Array, "B S"],
    pool_size: int = 4,
    normalize: str = "renormalize",
) -> Routing:
    """As `route`, with one pool for all tokens of a document, made of all of them."""
    voters = same_document(documents) & valid[:, None]
    return route_in_pool(logits, valid, voters, k, pool_size, normalize)


def route_in_pool(
    logits: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    voters: Bool[Array, "B S S"],
    k: int,
    pool_size: int,
    normalize: str,
) -> Routing:
    """Top-k routing of each token among the `pool_size` experts that its `voters` want most."""
    probs = jax.nn.softmax(logits)
    # The mean ranks experts as the sum does.
    pool = select(average(jax.lax.stop_gradient(probs), voters), pool_size)  # [B S M]
    inside = jax.nn.one_hot(pool, logits.shape[-1], dtype=bool).any(axis=-2)
    routing = topk.route(jnp.where(inside, logits, -jnp.inf), valid, k=k, normalize=normalize)
    return Routing(logits, probs, routing.plan)


def check_whole(
    num_experts: int, *, k: int, pool_size: int = 4, normalize: str = "renormalize"
) -> None:
    """Refuses a pool with fewer than k experts or more than there are.

    Raises:
        ConfigError: see above, and what `topk.check` refuses.
    """
    if not k <= pool_size <= num_experts:
        raise ConfigError(
            f"router.pool_size={pool_size} must be between router.k={k}, the experts of one token, "
            f"and model.num_experts={num_experts}."
        )
    topk.check(num_experts, k=k, normalize=normalize)


def check(
    num_experts: int,
    *,
    k: int,
    sequence_length: int | None = None,
    pool_size: int = 4,
    segment_size: int = 16,
    normalize: str = "renormalize",
) -> None:
    """Refuses pools and segments that do not fit.

    Raises:
        ConfigError: see `check_whole`; a segment is empty or longer than the sequence.
    """
    check_segment(segment_size, sequence_length)
    check_whole(num_experts, k=k, pool_size=pool_size, normalize=normalize)


_COMMON: dict[str, Any] = {
    "paper": "Allen Institute for AI 2026, EMO",
    "cost": "D E + S E + k experts of the pool",
}

ROUTER = Router(
    route,
    equation="pool = top-M of the sum of softmax(l) over the document before t's segment; top-k in it",
    use="Long documents served from few experts in memory, in language models.",
    check=check,
    causality="C1",
    **_COMMON,
)

WHOLE_ROUTER = Router(
    route_whole,
    equation="pool = top-M of the sum of softmax(l) over the document; top-k in it",
    use="Experts that specialise by document, where a whole document may be read first.",
    check=check_whole,
    causality="C3",
    causal_in_eval=False,
    **_COMMON,
)
