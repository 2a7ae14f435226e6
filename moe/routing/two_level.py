"""Two-level routing: first a group of experts, then experts inside it.

Jordan and Jacobs 1994, "Hierarchical Mixtures of Experts and the EM Algorithm"; Shazeer et al. 2017
(arXiv:1701.06538), appendix B; SMILE, He et al. 2022 (arXiv:2212.05191).

With group probabilities `a = softmax(group logits)` and `b_{e|g}`, the softmax of expert logits inside
group g, an expert has the joint probability `pi_e = a_g b_{e|g}`. Groups are neighbours: with as many
groups as devices of the expert axis, a token visits at most `groups_kept` devices.

| `variant` | chosen | as in |
|---|---|---|
| `soft` | every expert, weighed by `pi` | hierarchical mixtures of experts |
| `hard` | the best `groups_kept` groups, in each the best `k / groups_kept` experts | SMILE |
| `limited` | the k largest `pi` inside the best `groups_kept` groups | DeepSeek-V2 |

| `norm` | gates |
|---|---|
| `none` | `pi_e` |
| `joint` | `pi_e` over the sum of the chosen; sum 1 |
| `level` | a over the kept groups, b over the chosen of its group, each of sum 1 |

`group_score` says where group logits come from: `learned` by a matrix of their own, or derived from
the logits of a group's experts: `max`, `top2` (sum of the two largest) or `logsumexp`, with which `pi`
is exactly the flat softmax.
"""

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.errors import ConfigError
from moe.routing.gates import Gated, project
from moe.routing.router import Router
from moe.routing.selection import choices, gather, select
from moe.routing.types import Routing

VARIANTS = ("soft", "hard", "limited")
NORMS = ("none", "joint", "level")
GROUP_SCORES = ("learned", "max", "top2", "logsumexp")


class TwoLevelGate(nnx.Module):
    """Logits of experts and of groups of experts.

    Args:
        width: model width `D`.
        num_experts: `E`.
        rngs: its `params` stream draws both kernels from normal(0, D^-1/2).
        groups: `G`, a divisor of E.
        group_score: one of `GROUP_SCORES`.

    Attributes:
        kernel: float32 `[D E]`, for experts.
        group_kernel: float32 `[D G]`, for groups; only if their score is learned.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        rngs: nnx.Rngs,
        groups: int = 4,
        group_score: str = "learned",
    ):
        self.groups, self.group_score = groups, group_score
        init = nnx.initializers.normal(width**-0.5)
        self.kernel = nnx.Param(init(rngs.params(), (width, num_experts)), axes=("D", "E"))
        if group_score == "learned":
            self.group_kernel = nnx.Param(init(rngs.params(), (width, groups)), axes=("D", None))

    def __call__(self, tokens: Float[Array, "B S D"]) -> Gated:
        """Expert logits, and `group_logits [B S G]` for `route`."""
        logits = project(tokens, self.kernel[...])
        if self.group_score == "learned":
            group_logits = project(tokens, self.group_kernel[...])
        else:
            group_logits = derive_group_logits(logits, self.groups, self.group_score)
        return Gated(logits, {"group_logits": group_logits})


def derive_group_logits(
    logits: Float[Array, "B S E"], groups: int, score: str
) -> Float[Array, "B S G"]:
    """Judges a group by the logits of its experts: `max`, `top2` or `logsumexp`."""
    B, S, E = logits.shape
    if score == "logsumexp":
        return jax.nn.logsumexp(logits.reshape(B, S, groups, E // groups), axis=-1)
    inside = logits.reshape(B, S * groups, E // groups)
    best = select(inside, 1 if score == "max" else min(2, E // groups))
    return gather(inside, best).sum(axis=-1).reshape(B, S, groups)


def route(
    logits: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    *,
    k: int,
    group_logits: Float[Array, "B S G"],
    groups_kept: int = 2,
    variant: str = "hard",
    norm: str = "joint",
) -> Routing:
    """Sends each token to `k` experts of its best groups.

    Args:
        logits: float32 `[B S E]`, of experts; only differences inside a group count.
        valid: `[B S]`, True for a real token.
        k: experts a token, in all groups together; E for `soft`.
        group_logits: float32 `[B S G]`, from the gate.
        groups_kept: groups a token may reach.
        variant: one of `VARIANTS`, see the table above.
        norm: one of `NORMS`.

    Returns:
        The decision; `probs` is `pi`, whose rows sum to 1. `hard` orders choices by group, best
        first, the others by `pi`.

        Terms for the losses of `moe.routing.level_losses`: `group_probs` `[B S G]`, which is a, and
        `within_probs` `[B S E]`, which is b in the groups that the token may reach, else 0.
    """
    B, S, E = logits.shape
    G = group_logits.shape[-1]
    a = jax.nn.softmax(group_logits)
    b = jax.nn.softmax(logits.reshape(B, S, G, E // G)).reshape(B, S, E)
    pi = _to_experts(a, E) * b
    kept = select(group_logits, G if variant == "soft" else groups_kept)  # [B S groups_kept]
    reached = jax.nn.one_hot(kept, G, dtype=bool).any(axis=-2)  # [B S G]
    inside = _to_experts(reached, E)
    if variant == "hard":
        expert = _best_of_each(logits, kept, G, k // groups_kept)
    else:
        # Sums of logarithms rank experts whose pi underflows.
        log_pi = _to_experts(jax.nn.log_softmax(group_logits), E) + _log_within(logits, G)
        expert = select(jnp.where(inside, log_pi, -jnp.inf), k)
    gate = gather(pi, expert)
    if norm == "joint":
        gate = gate / gate.sum(axis=-1, keepdims=True)
    elif norm == "level" and variant == "hard":
        within = gather(b, expert).reshape(B, S, groups_kept, k // groups_kept)
        within = within / within.sum(axis=-1, keepdims=True)
        gate = (jax.nn.softmax(gather(group_logits, kept))[..., None] * within).reshape(B, S, k)
    terms = {"group_probs": a, "within_probs": jnp.where(inside, b, 0.0)}
    return Routing(logits, pi, choices(expert, gate, valid), terms)


def _to_experts(of_groups: Array, num_experts: int) -> Array:
    """Repeats `[B S G]` for each expert of a group: `[B S E]`."""
    return jnp.repeat(of_groups, num_experts // of_groups.shape[-1], axis=-1)


def _log_within(logits: Float[Array, "B S E"], groups: int) -> Float[Array, "B S E"]:
    """Returns `log b`."""
    B, S, E = logits.shape
    return jax.nn.log_softmax(logits.reshape(B, S, groups, E // groups)).reshape(B, S, E)


def _best_of_each(
    logits: Float[Array, "B S E"], kept: Int[Array, "B S A"], groups: int, k: int
) -> Int[Array, "B S K"]:
    """The `k` best experts of each of `A` groups: `[B S A*k]`, in the order of `kept`."""
    B, S, E = logits.shape
    size, A = E // groups, kept.shape[-1]
    columns = logits.reshape(B, S, groups, size).transpose(0, 1, 3, 2)  # [B S size G]
    columns = columns.reshape(B, S * size, groups)
    wanted = jnp.repeat(kept, size, axis=1)  # each of the `size` rows of a token
    inside = gather(columns, wanted).reshape(B, S, size, A).swapaxes(2, 3)
    best = select(inside.reshape(B, S * A, size), k).reshape(B, S, A, k)
    return (kept[..., None] * size + best).reshape(B, S, A * k)


def check(
    num_experts: int,
    *,
    k: int,
    groups: int = 4,
    groups_kept: int = 2,
    variant: str = "hard",
    norm: str = "joint",
    group_score: str = "learned",
) -> None:
    """Refuses names that do not exist, groups that do not fit, and gates that cannot learn.

    Raises:
        ConfigError: see above.
    """
    named = (("variant", variant, VARIANTS), ("norm", norm, NORMS))
    for option, value, known in (*named, ("group_score", group_score, GROUP_SCORES)):
        if value not in known:
            raise ConfigError(
                f"router.{option}={value!r} is not one of {', '.join(known)}; choose one."
            )
    if groups < 1 or num_experts % groups:
        raise ConfigError(
            f"router.groups={groups} must be at least 1 and divide model.num_experts="
            f"{num_experts}, so that groups are equal; choose a divisor of {num_experts}."
        )
    if variant == "soft":
        _check_soft(num_experts, k)
        return
    if not 1 <= groups_kept <= groups:
        raise ConfigError(
            f"router.groups_kept={groups_kept} must be between 1 and router.groups={groups}."
        )
    _check_k(k, groups, groups_kept, num_experts // groups, variant)
    _check_gradient(k, groups, groups_kept, variant, norm, group_score)


def _check_soft(num_experts: int, k: int) -> None:
    if k != num_experts:
        raise ConfigError(
            f"router.k={k} with router.variant='soft': every token visits all experts. Set router.k="
            f"{num_experts} (model.num_experts), or router.variant='hard'."
        )


def _check_k(k: int, groups: int, groups_kept: int, size: int, variant: str) -> None:
    if k > groups_kept * size:
        raise ConfigError(
            f"router.groups_kept={groups_kept} groups of {size} experts hold {groups_kept * size} "
            f"experts, fewer than router.k={k}; keep at least {-(-k // size)} of router.groups="
            f"{groups} or lower router.k."
        )
    if variant == "hard" and k % groups_kept:
        raise ConfigError(
            f"router.k={k} must be a multiple of router.groups_kept={groups_kept} with "
            "router.variant='hard', which takes the same number of experts from every kept group. "
            "Change one of them, or set router.variant='limited'."
        )


def _check_gradient(
    k: int, groups: int, groups_kept: int, variant: str, norm: str, group_score: str
) -> None:
    """A quotient of one term is 1: what it should teach gets no gradient."""
    if norm == "level" and variant != "hard":
        raise ConfigError(
            f"router.norm='level' with router.variant={variant!r}: a kept group may have no chosen "
            "expert, and its share would be lost. Set router.norm='joint' or router.variant='hard'."
        )
    if norm != "none" and groups_kept == 1 < groups and group_score == "learned":
        raise ConfigError(
            f"router.norm={norm!r} with router.groups_kept=1: the probability of a single group "
            "cancels from normalised gates, so the choice of the group would never learn. Set "
            "router.norm='none', or router.groups_kept=2 or more."
        )
    if (norm == "joint" and k == 1) or (norm == "level" and k == groups_kept):
        raise ConfigError(
            f"router.norm={norm!r} with router.k={k} and router.groups_kept={groups_kept}: a single "
            "gate divided by itself is always 1, so the choice of the expert would never learn. Set "
            "router.norm='none', or a larger router.k."
        )


ROUTER = Router(
    route,
    paper="Jordan and Jacobs 1994; He et al. 2022, arXiv:2212.05191; Shazeer et al. 2017, app. B",
    equation="pi_e = a_g b_(e|g); best groups by a, then best experts by b; gate = pi_e (normalised)",
    cost="D (G + E) + k experts in at most groups_kept groups",
    use="Many experts on several devices: bounds the devices that a token visits.",
    check=check,
    gate=TwoLevelGate,
)
