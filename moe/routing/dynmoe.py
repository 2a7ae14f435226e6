"""DynMoE routing: every expert has its own learned threshold, and takes whatever exceeds it.

Guo et al. 2024, "Dynamic Mixture of Experts" (arXiv:2405.14297). Differs from the paper
by its test-time rule, that a token which exceeds no threshold gets its best expert, also in
training, so that the two agree, and by not adding or removing experts.
"""

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe.routing.cosine import unit
from moe.routing.gates import Gated, project
from moe.routing.router import Router
from moe.routing.selection import gather, select
from moe.routing.types import Routing
from moe.routing.variable_k import ACTIVE, check_width, straight_through, variable_choices, width


class ThresholdGate(nnx.Module):
    """`logits = cos(x, w_e)`, and a threshold for each expert.

    Args:
        width: model width `D`.
        num_experts: `E`.
        rngs: its `params` stream draws the vectors from a normal; only their directions count.

    Attributes:
        vectors: float32 `[D E]`.
        thresholds: float32 `[E]`, zeros at first: an expert then takes half of all directions.
    """

    def __init__(self, width: int, num_experts: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(width**-0.5)
        vectors = init(rngs.params(), (width, num_experts), jnp.float32)
        self.vectors = nnx.Param(vectors, axes=("D", "E"))
        self.thresholds = nnx.Param(jnp.zeros(num_experts, jnp.float32), axes=("E",))

    def __call__(self, tokens: Float[Array, "B S D"]) -> Gated:
        """Compares every token with every expert: cosines, and the thresholds `[E]` they meet."""
        tokens = unit(tokens.astype(jnp.float32), axis=-1)
        cosine = project(tokens, unit(self.vectors[...], axis=0))
        return Gated(cosine, {"thresholds": self.thresholds[...]})


def route(
    logits: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    *,
    k: int,
    thresholds: Float[Array, " E"],
    k_max: int = 0,
) -> Routing:
    """Sends each token to all experts with `sigmoid(logit) > sigmoid(threshold)`.

    The n experts of a token have gate 1/n each. The step has no slope, so each gate carries the
    gradient of `(sigmoid(logit) - sigmoid(threshold)) / n` (straight-through). A token
    that exceeds no threshold goes to the expert of its largest logit.

    Args:
        logits: float32 `[B S E]`.
        valid: `[B S]`, True for a real token.
        k: not read: the number that `losses.compute` aims at.
        thresholds: float32 `[E]`.
        k_max: largest number of experts a token, the width K of the plan; 0 stands for E. Above
            it, those of the largest logits stay.

    Returns:
        The decision; `probs` is the normalised sigmoid of the logits. Its term `active [B S]` is
        the number of experts of each token, with the gradient of the sum over all experts of
        `sigmoid(logit) - sigmoid(threshold)`.
    """
    del k
    score = jax.nn.sigmoid(logits)
    margin = score - jax.nn.sigmoid(thresholds)[None, None]
    # Scores are below 1: whoever exceeds its threshold precedes whoever does not.
    order = jnp.where(margin > 0, 1.0 + score, score)
    expert = select(order, width(logits.shape[-1], k_max))
    chosen = gather(margin, expert)
    first = (jnp.arange(expert.shape[-1]) == 0)[None, None]
    active = (chosen > 0) | first
    count = active.sum(axis=-1, keepdims=True, dtype=jnp.float32)
    gate = straight_through(jnp.ones_like(chosen), chosen) / count
    plan = variable_choices(expert, gate, active, valid)
    visited = plan.valid.sum(axis=-1, dtype=jnp.float32)
    terms = {ACTIVE: straight_through(visited, margin.sum(axis=-1))}
    # The normalised sigmoid, also where every sigmoid underflows.
    return Routing(logits, jax.nn.softmax(jax.nn.log_sigmoid(logits)), plan, terms)


def check(num_experts: int, *, k: int, k_max: int = 0) -> None:
    """Refuses a bound that does not fit the experts.

    Raises:
        ConfigError: `k_max` is negative or above E.
    """
    del k
    check_width(num_experts, k_max)


ROUTER = Router(
    route,
    paper="Guo et al. 2024, arXiv:2405.14297",
    equation="S = {e: sigmoid(cos(x, w_e)) > sigmoid(g_e)}, or the best one; gate = 1/|S|",
    cost="D E + mean-k experts",
    use="The number of experts a token should be learned rather than set.",
    check=check,
    gate=ThresholdGate,
    fixed_k=False,
)
