"""What a sparse layer reports of one batch: sums over the tokens of each row."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.routing.types import (
    PER_TOKEN,
    Choices,
    LayerReport,
    Merging,
    Mixing,
    Plan,
    Routing,
    Slots,
)


def layer_report(routing: Routing, kept: Array, valid: Bool[Array, "B S"]) -> LayerReport:
    """Reduces a routing decision to the sums that losses and metrics are made of.

    Everything is a product, a comparison and a sum, with no scatter; padding adds nothing to any
    field. A row's counts are exact: whole numbers below 2^24 in float32.

    Args:
        routing: the router's decision.
        kept: which parts of the plan reached an expert: `[B S K]` of `Choices`, `[B E C]` of
            `Slots`; soft plans keep everything, and do not read it.
        valid: `[B S]`, True for a real token.

    Returns:
        The report of one layer.
    """
    usage = plan_usage(routing.plan, kept, valid, routing.probs.shape[-1])
    logits = jnp.where(valid[..., None], routing.logits, 0.0)
    probs = jnp.where(valid[..., None], routing.probs, 0.0)
    lse = jnp.where(valid, jax.nn.logsumexp(logits, axis=-1), 0.0)
    fixed = jax.lax.stop_gradient(probs)
    last_in, first_out = _border(fixed, usage.rank)
    ranked = (fixed >= last_in[..., None]) & valid[..., None]
    row_terms, token_terms = _terms(routing, valid)
    return LayerReport(
        row_tokens=valid.sum(axis=1, dtype=jnp.float32),
        row_requested=usage.requested,
        row_kept=usage.kept,
        row_ranked=ranked.sum(axis=1, dtype=jnp.float32),
        row_first=usage.first,
        row_gates=usage.gates,
        row_probs=probs.sum(axis=1),
        row_lse_squared=jnp.square(lse).sum(axis=1),
        row_entropy=jax.scipy.special.entr(jnp.where(probs > 0, probs, 1.0)).sum(axis=(1, 2)),
        row_confidence=fixed.max(axis=-1).sum(axis=1),
        row_margin=(last_in - first_out).sum(axis=1),
        logit_max=jnp.abs(jax.lax.stop_gradient(logits)).max(),
        expert=usage.expert,
        row_terms=row_terms,
        token_terms=token_terms,
    )


class Usage(NamedTuple):
    """How a plan uses the experts, summed over the tokens of each row."""

    requested: Float[Array, "B E"]
    kept: Float[Array, "B E"]
    first: Float[Array, "B E"]
    gates: Float[Array, "B E"]
    expert: Int[Array, "B S K"]  # -1 where nothing was kept
    rank: int  # choices a token that the plan has room for


def plan_usage(plan: Plan, kept: Array, valid: Bool[Array, "B S"], num_experts: int) -> Usage:
    """Counts what a plan asks of each expert."""
    if isinstance(plan, Choices):
        return _choices_usage(plan, kept, valid, num_experts)
    if isinstance(plan, Slots):
        return _slots_usage(plan, kept, valid)
    if isinstance(plan, Mixing):
        B, S, P = plan.combine.shape
        weight = plan.combine.reshape(B, S, num_experts, P // num_experts).sum(axis=-1)
        return _soft_usage(weight, valid)
    return _soft_usage(merging_weights(plan, valid.shape[1]), valid)


def merging_weights(plan: Merging, length: int) -> Float[Array, "B S E"]:
    """Spreads the weights of segments over their `ceil(S/M)` positions."""
    size = -(-length // plan.weight.shape[1])
    return jnp.repeat(plan.weight, size, axis=1)[:, :length]


def _choices_usage(
    plan: Choices, kept: Bool[Array, "B S K"], valid: Bool[Array, "B S"], num_experts: int
) -> Usage:
    requested = plan.valid & valid[..., None]
    kept = kept & requested
    hits = jax.nn.one_hot(plan.expert, num_experts, dtype=bool)  # [B S K E]
    gates = jnp.where(hits & requested[..., None], plan.gate[..., None], 0.0)
    return Usage(
        requested=_count(hits, requested),
        kept=_count(hits, kept),
        first=_count(hits[:, :, :1], requested[:, :, :1]),
        gates=gates.sum(axis=(1, 2)),
        expert=jnp.where(kept, plan.expert, -1),
        rank=plan.expert.shape[-1],
    )


def _count(hits: Bool[Array, "B S K E"], counted: Bool[Array, "B S K"]) -> Float[Array, "B E"]:
    return (hits & counted[..., None]).sum(axis=(1, 2), dtype=jnp.float32)


def _slots_usage(plan: Slots, kept: Bool[Array, "B E C"], valid: Bool[Array, "B S"]) -> Usage:
    S, E = valid.shape[1], plan.token.shape[1]
    requested = plan.valid
    kept = kept & requested
    named = jax.nn.one_hot(plan.token, S, axis=1, dtype=bool) & kept[:, None]  # [B S E C]
    who = jnp.where(named.any(axis=-1), jnp.arange(E), -1)  # [B S E]
    strongest = jnp.where(named, jax.lax.stop_gradient(plan.gate)[:, None], -1.0).max(axis=-1)
    first = jax.nn.one_hot(strongest.argmax(axis=-1), E) * (who >= 0).any(axis=-1, keepdims=True)
    return Usage(
        requested=requested.sum(axis=-1, dtype=jnp.float32),
        kept=kept.sum(axis=-1, dtype=jnp.float32),
        first=first.sum(axis=1),
        gates=jnp.where(requested, plan.gate, 0.0).sum(axis=-1),
        expert=jnp.where(valid[..., None], who, -1),
        rank=min(E, max(1, round(E * plan.token.shape[-1] / S))),
    )


def _soft_usage(weight: Float[Array, "B S E"], valid: Bool[Array, "B S"]) -> Usage:
    weight = jnp.where(valid[..., None], weight, 0.0)
    best = weight.argmax(axis=-1)
    load = jnp.round(jax.lax.stop_gradient(weight).sum(axis=1))
    first = jax.nn.one_hot(best, weight.shape[-1]) * valid[..., None]
    return Usage(
        requested=load,
        kept=load,
        first=first.sum(axis=1),
        gates=weight.sum(axis=1),
        expert=jnp.where(valid, best, -1)[..., None].astype(jnp.int32),
        rank=1,
    )


def _terms(
    routing: Routing, valid: Bool[Array, "B S"]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The router's own terms: sums over each row, and those that stay per token."""
    rows, tokens = {}, {}
    for name, value in routing.terms.items():
        mask = valid.reshape(valid.shape + (1,) * (value.ndim - 2))
        value = jnp.where(mask, value, jnp.zeros((), value.dtype))
        if name.startswith(PER_TOKEN):
            tokens[name] = value
        else:
            rows[name] = value.astype(jnp.float32).sum(axis=1)
    return rows, tokens


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
