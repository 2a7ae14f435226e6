"""Balance of each level of two-level routing: groups among each other, experts inside their group.

For reports with the terms `group_probs` and `within_probs` (`moe.routing.two_level`,
`moe.routing.balanced_groups`). Both losses are 1 at balance, means over layers, and follow the rules
of `moe.routing.losses`: a report's part of the loss of a whole optimiser step, f without gradient.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from moe.errors import ConfigError
from moe.routing.losses import SCOPES, Total, fractions
from moe.routing.types import LayerReport

GROUP_PROBS = "group_probs"
WITHIN_PROBS = "within_probs"


def group_balance_loss(
    report: LayerReport,
    *,
    total_tokens: Total,
    global_counts: Shaped[Array, "L E"] | None = None,
    scope: str = "global",
) -> Float[Array, ""]:
    """Balance over groups: `G * sum_g f_g a_g`, with f over choices and a the mean probability.

    G when one group takes every choice with probability 1. As the
    inter-node part of the loss of SMILE (arXiv:2212.05191).

    Args:
        report: stacked over layers, leading `L`.
        total_tokens: valid tokens of the whole step.
        global_counts: choices of each expert in each layer over the step, for the scope `global`
            under gradient accumulation.
        scope: the set of tokens that f is counted on, as for `balance_loss`.

    Returns:
        This report's part of the loss.
    """
    probs = report.row_terms[GROUP_PROBS]  # [L B G]
    G = probs.shape[-1]
    f = fractions(_grouped(_counts(report, "group_balance", scope, global_counts), G).sum(axis=-1))
    return G * (f * probs).sum(axis=(1, 2)).mean() / jnp.maximum(total_tokens, 1)


def within_group_balance_loss(
    report: LayerReport,
    *,
    total_tokens: Total,
    global_counts: Shaped[Array, "L E"] | None = None,
    scope: str = "global",
) -> Float[Array, ""]:
    """Balance inside groups: `sum_g share_g * Y * sum_e f_{e|g} b_{e|g}`, Y experts a group.

    `share_g` is the part of all visits to groups that goes to g, `f_{e|g}` the part of the choices
    inside g, `b_{e|g}` the mean over the tokens that reach g. Y when every group sends all its tokens
    to one expert. Arguments as for `group_balance_loss`.

    Returns:
        This report's part of the loss.
    """
    within = report.row_terms[WITHIN_PROBS]  # [L B E], sums over visits
    L, _, E = within.shape
    G = report.row_terms[GROUP_PROBS].shape[-1]
    f = fractions(
        _grouped(_counts(report, "within_group_balance", scope, global_counts), G)
    )  # [L B|1 G Y]
    visits = jax.lax.stop_gradient(within.sum(axis=(1, 2)))  # b sums to 1 for each visit
    per_layer = E // G * (f.reshape(L, -1, E) * within).sum(axis=(1, 2))
    share_of_step = report.row_tokens[0].sum() / jnp.maximum(total_tokens, 1)
    return (per_layer / jnp.maximum(visits, 1)).mean() * share_of_step


def _counts(
    report: LayerReport, name: str, scope: str, global_counts: Shaped[Array, "L E"] | None
) -> Float[Array, "L _ E"]:
    """Choices of each expert on the scope: `[L B E]` or `[L 1 E]`."""
    if scope not in SCOPES:
        raise ConfigError(
            f"losses.{name}_scope={scope!r} is not one of {', '.join(SCOPES)}; choose one."
        )
    if scope == "sequence":
        return report.row_requested
    if scope == "global" and global_counts is not None:
        return jnp.asarray(global_counts, jnp.float32)[:, None]
    return report.row_requested.sum(axis=1, keepdims=True)


def _grouped(counts: Float[Array, "L B E"], groups: int) -> Float[Array, "L B G Y"]:
    L, B, E = counts.shape
    return counts.reshape(L, B, groups, E // groups)
