"""Losses that steer how many experts work, and which: ReMoE's, and MoE++'s balance of unlike experts.

As in `moe.routing.losses`: unweighted, means over sparse layers, each a report's part of the loss of a
whole optimiser step, f without gradient.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from moe.errors import ConfigError
from moe.routing.losses import Total, fractions
from moe.routing.types import LayerReport

RELU_L1 = "relu_l1"
RELU_LOAD = "relu_load"
RELU_SCOPES = ("sequence", "microbatch")


def relu_l1_loss(report: LayerReport, *, total_tokens: Total) -> Float[Array, ""]:
    """Sparsity of ReLU routing: `lambda * sum_e mean_t gate_{t,e}`.

    Wang et al. 2025, ReMoE (arXiv:2412.14711). `lambda` is the router's, moved by its
    controller; the weight of this loss is 1.

    Args:
        report: stacked over layers, leading `L`, with the term `relu_l1`.
        total_tokens: valid tokens of the whole step.

    Returns:
        This report's part of the loss.
    """
    return report.row_terms[RELU_L1].sum(axis=(1, 2)).mean() / jnp.maximum(total_tokens, 1)


def relu_balance_loss(
    report: LayerReport, *, total_tokens: Total, scope: str = "microbatch"
) -> Float[Array, ""]:
    """Sparsity and balance of ReLU routing: `lambda * E/k * sum_e f_e R_e`.

    Wang et al. 2025, ReMoE (arXiv:2412.14711): `f_e` is the fraction of tokens
    for which expert e is active, `R_e` its mean gate. E/k times `relu_l1_loss` if every gate is
    positive. In the place of that loss, with weight 1.

    Args:
        report: stacked over layers, leading `L`, with the terms `relu_l1` and `relu_load`.
        total_tokens: valid tokens of the whole step.
        scope: the set of tokens that f is counted on: each row by itself (`sequence`), or the
            tokens of this report (`microbatch`).

    Returns:
        This report's part of the loss.

    Raises:
        ConfigError: an unknown scope.
    """
    if scope not in RELU_SCOPES:
        raise ConfigError(
            f"losses.relu_balance_scope={scope!r} is not one of {', '.join(RELU_SCOPES)}; choose one."
        )
    load, tokens = report.row_terms[RELU_LOAD], report.row_tokens[..., None]  # [L B E], [L B 1]
    load, tokens = jax.lax.stop_gradient((load, tokens))
    if scope == "microbatch":
        load, tokens = load.sum(axis=1, keepdims=True), tokens.sum(axis=1, keepdims=True)
    f = load / jnp.maximum(tokens, 1)  # E/k times the fraction of active tokens
    per_layer = (f * report.row_terms[RELU_L1]).sum(axis=(1, 2))
    return per_layer.mean() / jnp.maximum(total_tokens, 1)


def heterogeneous_balance_loss(
    report: LayerReport,
    *,
    eta: Float[Array, " E"],
    total_tokens: Total,
    global_counts: Shaped[Array, "L E"] | None = None,
    factor: float = 1.0,
) -> Float[Array, ""]:
    """Balance of experts of unlike cost: `factor * sum_e eta_e f_e P_e`.

    Jin et al. 2024, MoE++ (arXiv:2410.07348): eta is 1 for experts with a network and tau
    (0.75) for those without, which are thereby allowed more tokens. f sums to 1 for every K, and is
    counted on the whole step if its counts are given.

    Args:
        report: stacked over layers, leading `L`.
        eta: weight of each expert, `[E]`.
        total_tokens: valid tokens of the whole step.
        global_counts: choices of each expert in each layer over the whole step.
        factor: 1 as in the paper; E makes it `balance_loss` where eta is 1.

    Returns:
        This report's part of the loss.
    """
    counts = report.row_requested.sum(axis=1) if global_counts is None else global_counts
    f = fractions(jnp.asarray(counts, jnp.float32))[:, None]  # [L 1 E]
    weighted = eta[None, None] * f * report.row_probs
    return factor * weighted.sum(axis=(1, 2)).mean() / jnp.maximum(total_tokens, 1)
