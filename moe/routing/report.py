"""What a sparse layer reports of one batch: sums over the tokens of each row."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.routing.types import LayerReport, Routing


def layer_report(
    routing: Routing, kept: Bool[Array, "B S K"], valid: Bool[Array, "B S"]
) -> LayerReport:
    """Reduces a routing decision to the sums that losses and metrics are made of.

    Everything is a product, a comparison and a sum, with no scatter; padding adds nothing to any
    field. Only `row_probs` and `row_lse_squared` carry a gradient. A row's counts are exact: whole
    numbers below 2^24 in float32.

    Args:
        routing: the router's decision.
        kept: `[B S K]`, the choices that found room in their expert.
        valid: `[B S]`, True for a real token.

    Returns:
        The report of one layer.
    """
    requested = routing.plan.valid & valid[..., None]
    kept = kept & requested
    E, K = routing.probs.shape[-1], routing.plan.expert.shape[-1]
    logits = jnp.where(valid[..., None], routing.logits, 0.0)
    probs = jnp.where(valid[..., None], routing.probs, 0.0)
    lse = jnp.where(valid, jax.nn.logsumexp(logits, axis=-1), 0.0)
    fixed = jax.lax.stop_gradient(probs)
    last_in, first_out = _border(fixed, K)
    ranked = (fixed >= last_in[..., None]) & valid[..., None]
    return LayerReport(
        row_tokens=valid.sum(axis=1, dtype=jnp.float32),
        row_requested=_count(routing.plan.expert, requested, E),
        row_kept=_count(routing.plan.expert, kept, E),
        row_ranked=ranked.sum(axis=1, dtype=jnp.float32),
        row_probs=probs.sum(axis=1),
        row_lse_squared=jnp.square(lse).sum(axis=1),
        row_entropy=jax.scipy.special.entr(fixed).sum(axis=(1, 2)),
        row_confidence=fixed.max(axis=-1).sum(axis=1),
        row_margin=(last_in - first_out).sum(axis=1),
        logit_max=jnp.abs(jax.lax.stop_gradient(logits)).max(),
        expert=jnp.where(kept, routing.plan.expert, -1),
    )


def _count(
    expert: Int[Array, "B S K"], counted: Bool[Array, "B S K"], num_experts: int
) -> Float[Array, "B E"]:
    """Counts each expert's choices in each row."""
    hits = jax.nn.one_hot(expert, num_experts, dtype=bool) & counted[..., None]  # [B S K E]
    return hits.sum(axis=(1, 2), dtype=jnp.float32)


def _border(
    probs: Float[Array, "B S E"], k: int
) -> tuple[Float[Array, "B S"], Float[Array, "B S"]]:
    """Returns the probabilities of rank `k` and `k + 1`; the latter is 0 for k = E.

    Picks them by weights, not by index: XLA turns an index into a slice of a full sort, which on
    CPU costs fifty times the top-k.
    """
    n = min(k + 1, probs.shape[-1])
    best = jax.lax.top_k(probs, n)[0]
    rank = 1 + jax.lax.broadcasted_iota(jnp.int32, best.shape, 2)
    return (best * (rank == k)).sum(axis=-1), (best * (rank == k + 1)).sum(axis=-1)
