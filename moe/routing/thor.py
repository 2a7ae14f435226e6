"""THOR: experts drawn uniformly, made to agree by a loss instead of chosen by a gate.

Zuo et al. 2022, "Taming Sparsely Activated Transformer with Stochastic Experts" (arXiv:2110.04260).
Training runs two passes with two draws and adds `moe.routing.consistency` between their
predictions; nothing about the choice is learned.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from moe.errors import ConfigError
from moe.routing.router import Router
from moe.routing.selection import choices, select
from moe.routing.types import Routing

SCOPES = ("batch", "sequence", "token")
EVAL_MODES = ("token", "sentence", "ensemble")


def route(
    logits: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    *,
    k: int,
    key: PRNGKeyArray | None = None,
    training: bool = True,
    scope: str = "batch",
    eval_mode: str = "token",
    ensemble: int = 0,
) -> Routing:
    """Sends each token to `k` different experts drawn uniformly, with gate 1/k each.

    | in training, `scope` | in evaluation, `eval_mode` | who shares one draw |
    |---|---|---|
    | `batch` (the paper) | | the whole batch |
    | `sequence` | `sentence` | a row, packed documents included |
    | `token` | `token` | nobody |
    | | `ensemble` | a token takes the mean of `ensemble` experts, or of all |

    Args:
        logits: only the shape `[B S E]` is read; a layer without a gate passes zeros.
        valid: `[B S]`, True for a real token.
        k: experts a token; 1 in the paper.
        key: needed, except for an ensemble of all experts. A draw depends on the key and on the
            token's place in the batch, not on any content.
        training: which of the two columns above rules.
        scope: one of `SCOPES`.
        eval_mode: one of `EVAL_MODES`.
        ensemble: experts of an ensemble, drawn for each token; 0 takes all.

    Returns:
        The decision; `logits` are zeros and `probs` uniform, so a balance loss is constant.

    Raises:
        ValueError: no key.
    """
    B, S, E = logits.shape
    logits = jnp.zeros_like(logits)
    averaged = eval_mode == "ensemble" and not training
    width = (ensemble or E) if averaged else k
    if width == E:
        expert = jnp.arange(E)
    elif key is None:
        raise ValueError("THOR draws its experts in training and in evaluation: pass a key")
    else:
        shape = {
            "batch": (1, 1, E),
            **dict.fromkeys(("sequence", "sentence"), (B, 1, E)),
            **dict.fromkeys(("token", "ensemble"), (B, S, E)),
        }[scope if training else eval_mode]
        expert = select(jax.random.uniform(key, shape), width)
    expert = jnp.broadcast_to(expert, (B, S, width))
    gate = jnp.full(expert.shape, 1.0 / width)
    return Routing(logits, jax.nn.softmax(logits), choices(expert, gate, valid))


def check(
    num_experts: int,
    *,
    k: int,
    scope: str = "batch",
    eval_mode: str = "token",
    ensemble: int = 0,
) -> None:
    """Refuses unknown scopes and ensembles that do not fit the experts.

    Raises:
        ConfigError: an unknown name, or an ensemble that is not between 0 and E.
    """
    del k
    for option, value, known in (("scope", scope, SCOPES), ("eval_mode", eval_mode, EVAL_MODES)):
        if value not in known:
            raise ConfigError(
                f"router.{option}={value!r} is not one of {', '.join(known)}; choose one."
            )
    if not 0 <= ensemble <= num_experts:
        raise ConfigError(
            f"router.ensemble={ensemble} must be between 0 (all experts) and model.num_experts="
            f"{num_experts}: the members of an ensemble are all different."
        )


ROUTER = Router(
    route,
    paper="Zuo et al. 2022, arXiv:2110.04260",
    equation="e ~ Uniform{1..E}, gate 1; two passes, CE1 + CE2 + alpha (KL(p1||p2) + KL(p2||p1))/2",
    cost="1 expert, no gate; two passes in training",
    use="To see how far experts get without any routing, once they are made to agree.",
    check=check,
    gate=None,
    needs_key_in_eval=True,
)
