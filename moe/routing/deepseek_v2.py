"""DeepSeek-V2 routing: raw softmax gates, and a limit on how many devices a token reaches.

DeepSeek-AI 2024 (arXiv:2405.04434), section 2.2; fine-grained and shared experts are Dai et al. 2024
(arXiv:2401.06066): `model.expert_width` splits experts, `model.shared_experts` adds those that every
token visits. The paper has 160 routed and 2 shared experts on 8 devices, K = 6, 3 devices a token,
scale 16, and the losses of `moe.routing.group_losses`. Its device-level token dropping is left out.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe.routing.deepseek_v3 import check, keep_groups
from moe.routing.router import Router
from moe.routing.selection import choices, gather, select
from moe.routing.types import Routing, Scalar


def route(
    logits: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    *,
    k: int,
    groups: int = 1,
    groups_kept: int = 1,
    scale: Scalar = 1.0,
) -> Routing:
    """Picks the `k` best experts inside the `groups_kept` groups that hold a token's best experts.

    A group is a device, judged by its best expert. Gates are `scale * p_i` of the softmax over all
    experts, not divided by their sum, so that k = 1 learns too. Choices are made on logits, whose
    order is that of p and does not underflow.

    Args:
        logits: float32 `[B S E]`.
        valid: `[B S]`, True for a real token.
        k: experts a token.
        groups: groups of neighbouring experts, a divisor of E.
        groups_kept: groups that a token may reach.
        scale: multiplies the gates; may be traced.

    Returns:
        The decision. Its term `groups_reached`, `[B S G]` without gradient, is 1 / groups_kept for
        each group where the token has a chosen expert: the communication loss is made of it.
    """
    probs = jax.nn.softmax(logits)
    expert = select(keep_groups(logits, groups, groups_kept, best=1), k)
    gate = scale * gather(probs, expert)
    group = expert // (logits.shape[-1] // groups)
    reached = jax.nn.one_hot(group, groups, dtype=bool).any(axis=-2)
    terms = {"groups_reached": reached.astype(jnp.float32) / groups_kept}
    return Routing(logits, probs, choices(expert, gate, valid), terms)


ROUTER = Router(
    route,
    paper="DeepSeek-AI 2024, arXiv:2405.04434; Dai et al. 2024, arXiv:2401.06066",
    equation="S = top-k of p in the M groups of largest max p, gate = alpha p_i",
    cost="D E + k experts",
    use="Many fine experts spread over devices, where a token should cross few links.",
    check=check,
    traced=("scale",),
)
