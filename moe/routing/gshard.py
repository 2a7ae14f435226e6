"""GShard routing: two experts a token, the second of which may be left out.

Lepikhin et al. 2021 (arXiv:2006.16668), algorithm 1.

| `policy` | second expert | kept |
|---|---|---|
| `all` | second largest logit | always |
| `threshold` | second largest logit | where its gate exceeds `threshold` |
| `random` | second largest logit | with probability min(1, gate / `threshold`); GShard's is 0.5 |
| `sampling` | largest logit plus Gumbel noise among the other experts | always |

GShard seats all first choices before any second choice, which lets later tokens drop earlier ones;
seating is dispatch's (`dispatch.priority`), so that this router is causal.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from moe.errors import ConfigError
from moe.routing.router import Router
from moe.routing.selection import choices, gather, select
from moe.routing.types import Routing, Scalar

POLICIES = ("all", "threshold", "random", "sampling")
EVAL_POLICIES = ("all", "threshold")  # those that draw nothing


def route(
    logits: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    *,
    k: int = 2,
    training: bool = False,
    key: PRNGKeyArray | None = None,
    policy: str = "random",
    eval_policy: str = "all",
    threshold: Scalar = 0.5,
) -> Routing:
    """Sends each token to its most probable expert and, as the policy says, to a second one.

    The two gates are `p_1 / (p_1 + p_2)` and `p_2 / (p_1 + p_2)`, formed before the second is left
    out: a token without its second expert keeps the gate below 1 of its first. They are computed
    as a softmax of the two logits, which is the same number without the paper's 1e-9 against a
    division by zero.

    Args:
        logits: float32 `[B S E]`.
        valid: `[B S]`, True for a real token.
        k: always 2.
        training: whether `policy` or `eval_policy` decides.
        key: for the policies that draw.
        policy: one of `POLICIES`, in training.
        eval_policy: one of `EVAL_POLICIES`, in evaluation.
        threshold: tau of `threshold` and `random`; may be traced.

    Returns:
        The decision, K = 2, first choices first; a second choice that is left out is not valid.

    Raises:
        ValueError: a policy that draws and no key.
    """
    del k
    active = policy if training else eval_policy
    if key is None and active not in EVAL_POLICIES:
        raise ValueError(f"the gshard policy {active!r} draws: pass a key")
    expert = (
        _sampled(logits, key) if active == "sampling" and key is not None else select(logits, 2)
    )
    gate = jax.nn.softmax(gather(logits, expert))
    plan = choices(expert, gate, valid)
    second = gate[..., 1]
    if active == "threshold":
        keep = second > threshold
    elif active == "random" and key is not None:
        keep = jax.random.uniform(key, second.shape) * threshold <= second
    else:
        keep = jnp.ones_like(valid)
    keep = jnp.stack([jnp.ones_like(keep), keep], axis=-1)  # [B S K]
    plan = plan._replace(gate=jnp.where(keep, plan.gate, 0.0), valid=plan.valid & keep)
    return Routing(logits, jax.nn.softmax(logits), plan)


def _sampled(logits: Float[Array, "B S E"], key: PRNGKeyArray) -> Array:
    """`[B S 2]`: the best expert, and one drawn from the others in proportion to their p."""
    first = select(logits, 1)
    others = jnp.where(
        jax.nn.one_hot(first[..., 0], logits.shape[-1], dtype=bool), -jnp.inf, logits
    )
    return jnp.concatenate(
        [first, select(others + jax.random.gumbel(key, logits.shape), 1)], axis=-1
    )


def check(
    num_experts: int,
    *,
    k: int,
    policy: str = "random",
    eval_policy: str = "all",
    threshold: float = 0.5,
) -> None:
    """Refuses all but two experts a token, and policies that cannot work.

    Raises:
        ConfigError: k is not 2, a policy is unknown or draws in evaluation, or the threshold
            leaves out every second expert.
    """
    del num_experts
    if k != 2:
        raise ConfigError(
            f"router.k={k} with router.name='gshard': GShard sends a token to two experts at most. "
            "Set router.k=2, or router.name='topk' for another number."
        )
    if policy not in POLICIES:
        raise ConfigError(
            f"router.policy={policy!r} is not one of {', '.join(POLICIES)}; choose one."
        )
    if eval_policy not in EVAL_POLICIES:
        raise ConfigError(
            f"router.eval_policy={eval_policy!r} must be one of {', '.join(EVAL_POLICIES)}: "
            "evaluation draws nothing."
        )
    if threshold < 0:
        raise ConfigError(
            f"router.threshold={threshold} must not be negative: gates are not. GShard uses 0.5."
        )
    if threshold >= 0.5 and "threshold" in (policy, eval_policy):
        raise ConfigError(
            f"router.threshold={threshold} with the policy 'threshold' leaves out every second "
            "expert: the smaller of two gates that sum to 1 is at most 0.5. Lower it, for example "
            "to 0.2, or use router.name='switch'."
        )


ROUTER = Router(
    route,
    paper="Lepikhin et al. 2021, arXiv:2006.16668",
    equation="i1, i2 = top-2 of l = x W, gate = p_i / (p_i1 + p_i2); i2 kept with min(1, g2 / tau)",
    cost="D E + at most 2 experts",
    use="Two experts where the second is worth its compute only when its gate is large.",
    check=check,
    fixed_k=False,
    traced=("threshold",),
)
