"""Losses on routing: pure functions of the layers' reports, unweighted, means over sparse layers.

Each returns the part that its report contributes to the loss of a whole optimiser step: sums over
rows divided by totals of the step, which the caller gives. So microbatches add up: except for the
scope `microbatch`, where statistics stop at its border by definition, the values of the
microbatches of a step sum to the value of the whole batch, whatever their sizes.

All arguments are arrays in the global view: under jit their sums already span every device.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from moe.errors import ConfigError
from moe.routing.types import LayerReport, Scalar

SCOPES = ("sequence", "microbatch", "global")
COUNTS = ("all", "first")

Total = Scalar | Shaped[Array, ""]  # a count, of any type


def balance_loss(
    report: LayerReport,
    scope: str = "global",
    *,
    total_tokens: Total,
    global_counts: Shaped[Array, "L E"] | None = None,
    counts: str = "all",
) -> Float[Array, ""]:
    """Load balance: `E * sum_e f_e P_e`, 1 at balance, E when one expert takes all.

    Fedus et al. 2022 (arXiv:2101.03961), equations 4 to 6, with f over all K choices, before any
    drop, and divided by their number, so that its sum is 1 for every K. P is the mean probability
    over valid tokens and carries the gradient; f carries none. 1 is not a lower bound.

    The scope is the set of tokens that f is counted on. P of a token always meets the f of its
    own set, and tokens weigh the same:

    * `sequence`: each row of the batch by itself, documents packed together included.
    * `microbatch`: this report's tokens.
    * `global`: the whole optimiser step (Qiu et al. 2025, arXiv:2501.11873). With gradient
      accumulation, give the step's counts as `global_counts`; without, this report has them.

    Args:
        report: stacked over layers, leading `L`.
        scope: one of `SCOPES`.
        total_tokens: valid tokens of the whole step, all microbatches together.
        global_counts: what f counts, in each layer over the whole step.
        counts: which choices f counts: `all`, or the `first` of each token (GShard and its
            descendants).

    Returns:
        This report's part of the loss.

    Raises:
        ConfigError: an unknown scope.
    """
    E = report.row_probs.shape[-1]
    rows = counted(report, counts)
    if scope == "sequence":
        f = fractions(rows)  # [L B E]
    elif scope == "microbatch" or (scope == "global" and global_counts is None):
        f = fractions(rows.sum(axis=1, keepdims=True))  # [L 1 E]
    elif scope == "global":
        f = fractions(jnp.asarray(global_counts, jnp.float32)[:, None])  # [L 1 E]
    else:
        raise ConfigError(
            f"losses.balance_scope={scope!r} is not one of {', '.join(SCOPES)}; choose one."
        )
    per_layer = E * (f * report.row_probs).sum(axis=(1, 2))
    return per_layer.mean() / jnp.maximum(total_tokens, 1)


def counted(report: LayerReport, counts: str) -> Float[Array, "L B E"]:
    """The choices that a balance loss counts.

    Raises:
        ConfigError: `counts` is not one of `COUNTS`.
    """
    if counts not in COUNTS:
        raise ConfigError(
            f"losses.balance_counts={counts!r} is not one of {', '.join(COUNTS)}; choose one."
        )
    return report.row_first if counts == "first" else report.row_requested


def term_loss(name: str) -> Callable[..., Float[Array, ""]]:
    """The loss that is the mean, over tokens and sparse layers, of a term a router reports itself.

    Args:
        name: a key of `row_terms`, one number for each token.
    """

    def loss(report: LayerReport, *, total_tokens: Total) -> Float[Array, ""]:
        return report.row_terms[name].sum(axis=1).mean() / jnp.maximum(total_tokens, 1)

    return loss


def z_loss(report: LayerReport, *, total_tokens: Total) -> Float[Array, ""]:
    """Keeps logits small: the mean over tokens of `logsumexp(logits)^2`.

    Zoph et al. 2022, ST-MoE (arXiv:2202.08906), equation 5, on logits before any bias.

    Args:
        report: stacked over layers, leading `L`.
        total_tokens: valid tokens of the whole step.

    Returns:
        This report's part of the loss.
    """
    return report.row_lse_squared.sum(axis=1).mean() / jnp.maximum(total_tokens, 1)


def sequence_balance_loss(report: LayerReport, *, total_rows: Total) -> Float[Array, ""]:
    """Balance inside each sequence: mean over rows of `sum_e f_e P_e`, 1 at balance.

    DeepSeek-V3 (arXiv:2412.19437), equations 17 to 20: f counts the K largest scores, without
    bias or groups, times E/(K n); P is the row's mean normalised score. Differs from
    `balance_loss(scope="sequence")` in that f, and in that rows, not tokens, weigh the same.

    Args:
        report: stacked over layers, leading `L`.
        total_rows: rows with at least one valid token in the whole step; `rows_with_tokens`
            counts them for one report.

    Returns:
        This report's part of the loss.
    """
    E = report.row_probs.shape[-1]
    P = report.row_probs / jnp.maximum(report.row_tokens, 1)[..., None]  # [L B E]
    per_layer = E * (fractions(report.row_ranked) * P).sum(axis=(1, 2))
    return per_layer.mean() / jnp.maximum(total_rows, 1)


def rows_with_tokens(report: LayerReport) -> Float[Array, ""]:
    """Counts the rows of a stacked report that hold at least one valid token."""
    return (report.row_tokens[0] > 0).sum(dtype=jnp.float32)


def fractions(counts: Float[Array, "*A E"]) -> Float[Array, "*A E"]:
    """Divides counts by their sum; zeros where nothing was counted. Carries no gradient."""
    counts = jax.lax.stop_gradient(counts)
    return counts / jnp.maximum(counts.sum(axis=-1, keepdims=True), 1)
