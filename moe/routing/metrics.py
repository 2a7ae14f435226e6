"""Routing health: sums that add up over batches, and the numbers made of them at the end.

`totals` runs inside jit on every batch; counts are int32 there, exact to 2^31 choices of one
expert. `collect` takes them to the host, in float64 (exact to 2^53), where `add` may sum any
number of batches and `summarize` divides.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Shaped
import numpy as np

from moe.routing.types import LayerReport

AnyArray = jax.Array | np.ndarray

DEAD_SHARE = 0.1  # an expert below this share of a fair load counts as dead


class Totals(NamedTuple):
    """Sums over valid tokens, for each sparse layer."""

    tokens: Shaped[AnyArray, " L"]
    requested: Shaped[AnyArray, "L E"]  # choices before drops
    kept: Shaped[AnyArray, "L E"]  # choices that reached their expert
    entropy: Float[AnyArray, " L"]  # nats
    confidence: Float[AnyArray, " L"]
    margin: Float[AnyArray, " L"]
    lse_squared: Float[AnyArray, " L"]
    logit_max: Float[AnyArray, " L"]  # the one maximum among sums
    terms: dict[str, Any] = {}  # noqa: RUF012 - sums of a router's own terms, [L ...]


def totals(report: LayerReport) -> Totals:
    """Sums a stacked report, leading `L`, over its rows. Carries no gradient."""
    report = jax.lax.stop_gradient(report)

    def count(rows: jax.Array) -> jax.Array:  # [L B ...] -> [L ...]
        return rows.astype(jnp.int32).sum(axis=1)

    return Totals(
        tokens=count(report.row_tokens),
        requested=count(report.row_requested),
        kept=count(report.row_kept),
        entropy=report.row_entropy.sum(axis=1),
        confidence=report.row_confidence.sum(axis=1),
        margin=report.row_margin.sum(axis=1),
        lse_squared=report.row_lse_squared.sum(axis=1),
        logit_max=report.logit_max,
        terms={name: value.sum(axis=1) for name, value in report.row_terms.items()},
    )


def add(a: Totals, b: Totals) -> Totals:
    """Joins the totals of two batches, both on devices (jit allowed) or both from `collect`."""
    largest = jnp.maximum if isinstance(a.logit_max, jax.Array) else np.maximum
    sums = jax.tree.map(lambda x, y: x + y, a, b)
    return sums._replace(logit_max=largest(a.logit_max, b.logit_max))


def collect(sums: Totals) -> Totals:
    """Brings totals to the host, as float64."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(sums))


def load_metrics(counts: Shaped[AnyArray, "L E"]) -> dict[str, np.ndarray]:
    """Measures how evenly choices spread over experts, layer by layer.

    With q the share of each expert and E experts: `max_violation` = max q E - 1 and
    `min_violation` = 1 - min q E (Wang et al. 2024, arXiv:2408.15664); `load_cv` = population
    standard deviation over mean; `load_entropy` = H(q) / ln E, 1 for E = 1; `effective_experts` =
    exp H(q); `effective_experts_inverse_square` = 1 / sum q^2; `gini`; `dead_experts` = how many
    have q < 0.1 / E.

    A layer without any choice has q = 0: all experts dead, the other measures finite.
    """
    E = counts.shape[-1]
    q = load(counts)
    entropy = -np.sum(q * np.log(np.where(q > 0, q, 1.0)), axis=-1)
    rank = np.arange(1, E + 1)
    gini = np.sum((2 * rank - E - 1) * np.sort(q, axis=-1), axis=-1) / E
    return {
        "max_violation": q.max(axis=-1) * E - 1,
        "min_violation": 1 - q.min(axis=-1) * E,
        "load_cv": q.std(axis=-1) * E,
        "load_entropy": entropy / np.log(E) if E > 1 else np.ones_like(entropy),
        "effective_experts": np.exp(entropy),
        "effective_experts_inverse_square": 1 / np.maximum(np.square(q).sum(axis=-1), 1 / E),
        "gini": gini,
        "dead_experts": np.asarray(q < DEAD_SHARE / E, np.float64).sum(axis=-1),
    }


def load(counts: Shaped[AnyArray, "*A E"]) -> Float[np.ndarray, "*A E"]:
    """Returns the share of each expert in float64; zeros where nothing was counted."""
    counts = np.asarray(counts, np.float64)
    return counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1.0)


def summarize(sums: Totals) -> dict[str, Any]:
    """Turns totals into the `routing/*` entries of a metrics record.

    Load is what routers asked for, before drops; `drop_rate` is dropped over asked choices. Token
    averages (`entropy` in nats, `confidence`, `margin`, `lse_squared`, `choices`, and `terms/*`, a
    router's own) are over valid tokens.

    Args:
        sums: of one step or of a whole split, from devices or from `collect`.

    Returns:
        `routing/<name>`, the mean over sparse layers as float; `routing/per_layer/<name>`, a list
        of L; `routing/load`, L lists of E shares. Never NaN.
    """
    sums = collect(sums)
    tokens = np.maximum(sums.tokens, 1.0)
    requested = sums.requested.sum(axis=-1)
    layers = load_metrics(sums.requested) | {
        "drop_rate": (requested - sums.kept.sum(axis=-1)) / np.maximum(requested, 1.0),
        "entropy": sums.entropy / tokens,
        "confidence": sums.confidence / tokens,
        "margin": sums.margin / tokens,
        "logit_max": sums.logit_max,
        "lse_squared": sums.lse_squared / tokens,
        "choices": requested / tokens,
    }
    layers |= {f"terms/{n}": v / tokens for n, v in sums.terms.items() if v.ndim == 1}
    means = {f"routing/{name}": float(value.mean()) for name, value in layers.items()}
    lists = {f"routing/per_layer/{name}": value.tolist() for name, value in layers.items()}
    return means | lists | {"routing/load": load(sums.requested).tolist()}
