"""Balance of devices: the losses of DeepSeek-V2 above its experts' (arXiv:2405.04434, section 2.2).

Pure functions of a stacked report, unweighted, means over sparse layers, each this report's part of
the loss of a whole optimiser step. The paper weighs the three levels with 0.003, 0.05 and 0.02; the
level of experts is `moe.routing.losses.balance_loss`, counted in the paper over each sequence.

The groups, their number G and how many a token may reach are those of the router, which reports
them by the term `groups_reached`: `[L B G]`, 1 / (groups a token may reach) for each token and group
where it has a chosen expert.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from moe.errors import ConfigError
from moe.routing.losses import Total, balance_loss
from moe.routing.types import LayerReport

SCOPES = ("sequence", "microbatch")


def device_balance_loss(
    report: LayerReport,
    *,
    total_tokens: Total,
    global_counts: Shaped[Array, "L E"] | None = None,
    scope: str = "sequence",
) -> Float[Array, ""]:
    """Load of groups: `sum_g f'_g P'_g`, 1 at balance, G when one group takes all.

    `f'` is the mean of the experts' `f_i = E / (K T) * choices_i` inside a group, without gradient;
    `P'` is the sum of their mean probabilities.

    Args:
        report: stacked over layers, leading `L`.
        total_tokens: valid tokens of the whole step.
        global_counts: choices of each expert in each layer over the whole step.
        scope: the set of tokens that f' is counted on, as in `moe.routing.losses.balance_loss`.

    Returns:
        This report's part of the loss.
    """
    G = report.row_terms["groups_reached"].shape[-1]
    grouped = report._replace(
        row_requested=_sums(report.row_requested, G), row_probs=_sums(report.row_probs, G)
    )
    counts = None if global_counts is None else _sums(jnp.asarray(global_counts, jnp.float32), G)
    return balance_loss(grouped, scope, total_tokens=total_tokens, global_counts=counts)


def communication_balance_loss(
    report: LayerReport, *, total_tokens: Total, scope: str = "sequence"
) -> Float[Array, ""]:
    """Tokens received by groups: `sum_g f''_g P''_g`, 1 at balance of tokens that use their limit.

    `f''_g = G / (M T) * tokens with a chosen expert in g`, for M groups a token may reach, without
    gradient; `P''` is `P'` of the device balance. Tokens that reach fewer
    groups make it smaller.

    Args:
        report: stacked over layers, leading `L`.
        total_tokens: valid tokens of the whole step.
        scope: the set of tokens that f'' is counted on: each row by itself, or `microbatch`, this
            report's tokens.

    Returns:
        This report's part of the loss.

    Raises:
        ConfigError: an unknown scope.
    """
    if scope not in SCOPES:
        raise ConfigError(
            f"losses.communication_balance_scope={scope!r} is not one of {', '.join(SCOPES)}; "
            "choose one. Tokens received are not counted beyond a microbatch."
        )
    reached, tokens = jax.lax.stop_gradient(
        (report.row_terms["groups_reached"], report.row_tokens[..., None])
    )
    if scope == "microbatch":
        reached, tokens = (x.sum(axis=1, keepdims=True) for x in (reached, tokens))
    G = reached.shape[-1]
    f = G * reached / jnp.maximum(tokens, 1)  # [L B G] or [L 1 G]
    per_layer = (f * _sums(report.row_probs, G)).sum(axis=(1, 2))
    return per_layer.mean() / jnp.maximum(total_tokens, 1)


def _sums(values: Float[Array, "*A E"], groups: int) -> Float[Array, "*A G"]:
    """Sums over the experts of each group."""
    return values.reshape(*values.shape[:-1], groups, -1).sum(axis=-1)
