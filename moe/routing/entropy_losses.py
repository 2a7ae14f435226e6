"""Losses on the entropy of routing and on the number of experts a token.

In the manner of `moe.routing.losses`: unweighted, means over sparse layers, parts that add up over
the microbatches of a step. Where a loss is no mean over tokens (mutual information, the entropy of
a mean, a squared budget), its statistics stop at the border of a microbatch, and microbatches are
averaged by tokens.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe.errors import ConfigError
from moe.routing.losses import Total
from moe.routing.types import LayerReport
from moe.routing.variable_k import ACTIVE

COMPUTE_KINDS = ("squared", "hinge")

# What a router over several modalities reports in `Routing.terms`; sums over a row give
# `[B M]`, `[B M E]` and `[B M]`.
MODALITY_TOKENS = "modality_tokens"
MODALITY_PROBS = "modality_probs"
MODALITY_ENTROPY = "modality_entropy"


def mutual_information_loss(report: LayerReport, *, total_tokens: Total) -> Float[Array, ""]:
    """Minus the mutual information of tokens and experts: `-(H(mean p) - mean H(p))`, nats.

    Chen et al. 2022, Mod-Squad (arXiv:2212.08066); Shen et al. 2023, ModuleFormer
    (arXiv:2306.04640). In [-ln E, 0]; least if every token is sure of one expert and all experts
    have equal shares.

    Args:
        report: stacked over layers, leading `L`.
        total_tokens: valid tokens of the whole step.

    Returns:
        This report's part of the loss.
    """
    tokens = report.row_tokens.sum(axis=1)  # [L]
    apart = report.row_entropy.sum(axis=1) - tokens * entropy_of_mean(report.row_probs, tokens)
    return apart.mean() / jnp.maximum(total_tokens, 1)


def entropy_loss(report: LayerReport, *, total_tokens: Total) -> Float[Array, ""]:
    """Makes tokens sure of their experts: the mean over tokens of the entropy of `probs`, nats.

    Alone it collapses all tokens onto one expert; give it a balance loss as a counterweight.

    Args:
        report: stacked over layers, leading `L`.
        total_tokens: valid tokens of the whole step.

    Returns:
        This report's part of the loss.
    """
    return report.row_entropy.sum(axis=1).mean() / jnp.maximum(total_tokens, 1)


def modality_local_loss(report: LayerReport, *, total_tokens: Total) -> Float[Array, ""]:
    """The mean entropy of tokens, each modality weighing the same.

    Mustafa et al. 2022, LIMoE (arXiv:2206.02770), the local loss. With one modality it is
    `entropy_loss`.

    Args:
        report: stacked over layers, leading `L`; per modality if it has the terms above.
        total_tokens: valid tokens of the whole step.

    Returns:
        This report's part of the loss.
    """
    tokens, _, entropy = by_modality(report)
    return over_modalities(entropy / jnp.maximum(tokens, 1), tokens, total_tokens)


def modality_global_loss(
    report: LayerReport, *, total_tokens: Total, experts: float | int = 0.0
) -> Float[Array, ""]:
    """Makes each modality use several experts: the mean of `max(0, ln(experts) - H(mean p))`.

    Mustafa et al. 2022, LIMoE (arXiv:2206.02770), the global loss. Zero, without gradient, for a
    modality that spreads as widely as over `experts` experts of equal share.

    Args:
        report: stacked over layers, leading `L`; per modality if it has the terms above.
        total_tokens: valid tokens of the whole step.
        experts: the least number of experts of a modality; 0 stands for half of all, at least 1.

    Returns:
        This report's part of the loss.
    """
    tokens, probs, _ = by_modality(report)
    least = jnp.log(experts or max(1.0, probs.shape[-1] / 2))
    short = jax.nn.relu(least - entropy_of_mean(probs, tokens))
    return over_modalities(short, tokens, total_tokens)


def compute_loss(
    report: LayerReport,
    *,
    total_tokens: Total,
    k: int,
    target: float | int = 0.0,
    kind: str = "squared",
) -> Float[Array, ""]:
    """Holds the mean number of experts a token at a target.

    A count has no slope; the term `active` of routers with variable k has the value of the count
    and the gradient of a smooth stand-in that the router names in its docstring.

    Args:
        report: stacked over layers, leading `L`, with the term `active`.
        total_tokens: valid tokens of the whole step.
        k: the target in experts a token if `target` is 0.
        target: as above; may be a fraction.
        kind: `squared`, `(mean - target)^2`, or `hinge`, `max(0, mean - target)`, which leaves
            spending less alone.

    Returns:
        This report's part of the loss.

    Raises:
        ConfigError: `kind` is unknown.
    """
    if kind not in COMPUTE_KINDS:
        raise ConfigError(
            f"losses.compute_kind={kind!r} is not one of {', '.join(COMPUTE_KINDS)}; choose one."
        )
    tokens = report.row_tokens.sum(axis=1)  # [L]
    excess = report.row_terms[ACTIVE].sum(axis=1) / jnp.maximum(tokens, 1) - (target or k)
    loss = jnp.square(excess) if kind == "squared" else jax.nn.relu(excess)
    return (tokens * loss).mean() / jnp.maximum(total_tokens, 1)


def entropy_of_mean(
    row_probs: Float[Array, "L B *M E"], tokens: Float[Array, " L *M"]
) -> Float[Array, " L *M"]:
    """Entropy, in nats, of the mean probabilities; 0 without tokens."""
    mean = row_probs.sum(axis=1) / jnp.maximum(tokens, 1)[..., None]
    # A log of 0 would turn the gradient of an expert that nobody considers into NaN.
    return jax.scipy.special.entr(jnp.where(mean > 0, mean, 1.0)).sum(axis=-1)


def by_modality(
    report: LayerReport,
) -> tuple[Float[Array, "L M"], Float[Array, "L B M E"], Float[Array, "L M"]]:
    """Tokens, probabilities by row, and entropy of each modality; all in one if none is reported."""
    terms = report.row_terms
    if MODALITY_TOKENS in terms:
        tokens, entropy = terms[MODALITY_TOKENS].sum(axis=1), terms[MODALITY_ENTROPY].sum(axis=1)
        return tokens, terms[MODALITY_PROBS], entropy
    tokens, entropy = report.row_tokens.sum(axis=1), report.row_entropy.sum(axis=1)
    return tokens[:, None], report.row_probs[:, :, None], entropy[:, None]


def over_modalities(
    values: Float[Array, "L M"], tokens: Float[Array, "L M"], total_tokens: Total
) -> Float[Array, ""]:
    """Mean over layers and over the modalities that occur, times this report's share of the step."""
    occurs = tokens > 0
    kinds = jnp.maximum(occurs.sum(axis=1), 1)
    mean = jnp.where(occurs, values, 0.0).sum(axis=1) / kinds
    return (tokens.sum(axis=1) * mean).mean() / jnp.maximum(total_tokens, 1)
