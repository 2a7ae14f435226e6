"""Balance by the spread of soft loads (Shazeer et al. 2017, arXiv:1701.06538, section 4).

Pure functions of a stacked report, unweighted, means over sparse layers, each this report's part of
the loss of a whole optimiser step. The spread is taken over this report's tokens, as in the paper
over a batch: with gradient accumulation the loss is the mean over microbatches, weighed by tokens.

The spread is the squared coefficient of variation with the population variance, that is
`E * sum_e v_e^2 / (sum_e v_e)^2 - 1`: 0 at balance, E - 1 when one expert has all. Ports to torch
use the unbiased variance, which is E / (E - 1) times larger. There is no square root, whose slope at
balance has no bound.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe.routing.losses import Total
from moe.routing.types import LayerReport


def importance_loss(report: LayerReport, *, total_tokens: Total) -> Float[Array, ""]:
    """Spread of the experts' importance: the sum of their gates over tokens.

    Shazeer et al. weigh it with 0.1, V-MoE with 0.005.

    Args:
        report: stacked over layers, leading `L`; `row_terms["importance"]` is `[L B E]`.
        total_tokens: valid tokens of the whole step.

    Returns:
        This report's part of the loss.
    """
    return _spread(report, "importance", total_tokens)


def load_loss(report: LayerReport, *, total_tokens: Total) -> Float[Array, ""]:
    """Spread of the experts' expected loads under another draw of the noise.

    Weights as for the importance.

    Args:
        report: stacked over layers, leading `L`; `row_terms["load"]` is `[L B E]`.
        total_tokens: valid tokens of the whole step.

    Returns:
        This report's part of the loss.
    """
    return _spread(report, "load", total_tokens)


def squared_variation(values: Float[Array, "*A E"]) -> Float[Array, "*A"]:
    """Population variance over squared mean, over the last axis; 0 where all are 0."""
    mean = values.mean(axis=-1, keepdims=True)
    variance = jnp.square(values - mean).mean(axis=-1)
    square = jnp.square(mean[..., 0])
    return variance / jnp.where(square > 0, square, 1.0)


def _spread(report: LayerReport, name: str, total_tokens: Total) -> Float[Array, ""]:
    spread = squared_variation(report.row_terms[name].sum(axis=1))  # [L]
    share = report.row_tokens.sum(axis=1) / jnp.maximum(total_tokens, 1)  # [L]
    return (spread * share).mean()
