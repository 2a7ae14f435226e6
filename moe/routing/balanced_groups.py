"""Mixture of grouped experts: every token takes the same number of experts from every group.

MoGE, in Pangu Pro MoE, Tang et al. 2025 (arXiv:2505.21411). With a group on each device,
all devices do the same work for every batch, whatever the router has learned.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe.errors import ConfigError
from moe.routing.router import Router
from moe.routing.selection import choices, gather, select
from moe.routing.types import Routing

NORMALIZE = ("none", "renormalize")


def route(
    logits: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    *,
    k: int,
    groups: int = 2,
    normalize: str = "none",
) -> Routing:
    """Sends each token to the `k / groups` most probable experts of every group.

    Args:
        logits: float32 `[B S E]`.
        valid: `[B S]`, True for a real token.
        k: experts a token, a multiple of `groups`.
        groups: `G` groups of neighbouring experts, a divisor of E.
        normalize: `none`: gates are probabilities `p_i` of the one softmax over all experts, as in
            the paper; `renormalize`: divided by the sum of the chosen.

    Returns:
        The decision; choices are ordered by group. Terms as in `moe.routing.two_level`, with
        `group_probs` the probability inside each group; every group is always reached.
    """
    B, S, E = logits.shape
    size = E // groups
    probs = jax.nn.softmax(logits)
    best = select(logits.reshape(B, S * groups, size), k // groups)
    first = size * jnp.arange(groups, dtype=best.dtype)[None, None, :, None]
    expert = (best.reshape(B, S, groups, -1) + first).reshape(B, S, k)
    gate = gather(probs, expert)
    if normalize == "renormalize":
        gate = gate / gate.sum(axis=-1, keepdims=True)
    grouped = logits.reshape(B, S, groups, size)
    terms = {
        "group_probs": probs.reshape(B, S, groups, size).sum(axis=-1),
        "within_probs": jax.nn.softmax(grouped).reshape(B, S, E),
    }
    return Routing(logits, probs, choices(expert, gate, valid), terms)


def check(num_experts: int, *, k: int, groups: int = 2, normalize: str = "none") -> None:
    """Refuses groups that do not divide the experts or the choices.

    Raises:
        ConfigError: see above, or k = 1 with gates that are then always 1.
    """
    if normalize not in NORMALIZE:
        raise ConfigError(
            f"router.normalize={normalize!r} is not one of {', '.join(NORMALIZE)}; choose one."
        )
    if groups < 1 or num_experts % groups:
        raise ConfigError(
            f"router.groups={groups} must be at least 1 and divide model.num_experts="
            f"{num_experts}, so that groups are equal; choose a divisor of {num_experts}."
        )
    if k % groups:
        raise ConfigError(
            f"router.k={k} must be a multiple of router.groups={groups}: every token takes k / groups "
            "experts from each group. Change one of them."
        )
    if k == 1 and normalize != "none":
        raise ConfigError(
            f"router.k=1 with router.normalize={normalize!r}: a single gate divided by itself is "
            "always 1, so the router would never learn. Set router.normalize='none'."
        )


ROUTER = Router(
    route,
    paper="Tang et al. 2025, arXiv:2505.21411",
    equation="p = softmax(x W); the top k/G inside each of G groups, gate = p_i",
    cost="D E + k experts, k/G in each group",
    use="Expert parallelism that must never wait for an overloaded device.",
    check=check,
)
