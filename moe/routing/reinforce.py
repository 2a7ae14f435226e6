"""A routing policy learned from reward alone: REINFORCE with a baseline.

Bengio et al. 2015 (arXiv:1511.06297), Rosenbaum et al. 2018 (arXiv:1711.01239), Clark et al. 2022
(arXiv:2202.01169; RL-R). The losses are in `moe.routing.policy_losses`.
"""

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, Shaped
import numpy as np

from moe.errors import ConfigError
from moe.routing.gates import Gated, project
from moe.routing.router import Router
from moe.routing.selection import choices, gather, select
from moe.routing.types import PER_TOKEN, Routing, Scalar, State, Terms

BASELINES = ("none", "ema", "learned")
GATES = ("one", "prob")


class PolicyGate(nnx.Module):
    """`logits = tokens @ kernel`, and a learned baseline beside them.

    Args:
        width: model width `D`.
        num_experts: `E`.
        rngs: its `params` stream draws the kernels from normal(0, D^-1/2).
        baseline: `learned` adds an MLP that foresees a token's cost; others add nothing.
        baseline_hidden: its hidden width; 0 takes `width`.

    Attributes:
        kernel: float32 `[D E]`.
        hidden: float32 `[D X]` of the baseline, if learned.
        out: float32 `[X 1]`; zeros, so that it starts by foreseeing 0.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        rngs: nnx.Rngs,
        baseline: str = "ema",
        baseline_hidden: int = 0,
    ):
        init = nnx.initializers.normal(width**-0.5)
        self.kernel = nnx.Param(
            init(rngs.params(), (width, num_experts), jnp.float32), axes=("D", "E")
        )
        self.learned = baseline == "learned"
        if self.learned:
            size = baseline_hidden or width
            self.hidden = nnx.Param(
                init(rngs.params(), (width, size), jnp.float32), axes=("D", None)
            )
            self.out = nnx.Param(jnp.zeros((size, 1)), axes=(None, None))

    def __call__(self, tokens: Float[Array, "B S D"]) -> Gated:
        """Scores experts, and foresees the cost as input `foreseen [B S]`, zeros if not learned.

        The baseline reads the tokens without a gradient: it watches the model, it does not move it.
        """
        foreseen = jnp.zeros(tokens.shape[:2])
        if self.learned:
            hidden = jax.nn.gelu(project(jax.lax.stop_gradient(tokens), self.hidden[...]))
            foreseen = project(hidden, self.out[...])[..., 0]
        return Gated(project(tokens, self.kernel[...]), {"foreseen": foreseen})


def route(
    logits: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    *,
    k: int,
    foreseen: Float[Array, "B S"],
    key: PRNGKeyArray | None = None,
    state: State | None = None,
    gates: str = "one",
    baseline: str = "ema",
) -> Routing:
    """Draws one expert from the softmax where it has a key, else takes the most probable.

    Args:
        logits: float32 `[B S E]`.
        valid: `[B S]`, True for a real token.
        k: always 1.
        foreseen: a learned baseline's prediction of each token's cost.
        key: of the draws; None takes the largest logit, as evaluation does.
        state: of the baseline, as `init_state` makes it.
        gates: `one`: gate 1, so that the policy loss alone moves the router; `prob`: the
            probability, which adds the task's own gradient.
        baseline: what `token/baseline` tells: `none`, `ema` of the cost, or `learned`.

    Returns:
        The decision. Its terms stay per token, `[B S]`: `token/log_prob` of the choice
        (differentiable), `token/policy_entropy` (differentiable) and `token/baseline`.
    """
    del k
    log_probs = jax.nn.log_softmax(logits)
    probs = jnp.exp(log_probs)
    # Gumbel-max: the largest perturbed logit is a draw from the softmax.
    noise = 0.0 if key is None else jax.random.gumbel(key, logits.shape)
    expert = select(logits + noise, 1)
    gate = gather(probs, expert) if gates == "prob" else jnp.ones(expert.shape)
    terms = policy_terms(
        gather(log_probs, expert)[..., 0],
        -jnp.sum(probs * log_probs, axis=-1),
        baseline_of(state, foreseen, baseline),
    )
    return Routing(logits, probs, choices(expert, gate, valid), terms)


def policy_terms(
    log_prob: Float[Array, "B S"], entropy: Float[Array, "B S"], baseline: Float[Array, "B S"]
) -> Terms:
    """Names what the policy losses read of a layer."""
    values = {"log_prob": log_prob, "policy_entropy": entropy, "baseline": baseline}
    return {PER_TOKEN + name: value for name, value in values.items()}


def baseline_of(
    state: State | None, foreseen: Float[Array, "B S"], baseline: str
) -> Float[Array, "B S"]:
    """The baseline of every token: learned, or the mean cost of earlier steps, or 0."""
    if baseline == "learned":
        return foreseen
    if baseline == "none" or state is None:
        return jnp.zeros_like(foreseen)
    # Divided by its weight the average has no memory of its start at 0 (as in Adam).
    mean = state["cost"] / jnp.maximum(state["weight"], jnp.finfo(jnp.float32).tiny)
    return jnp.full_like(foreseen, jax.lax.stop_gradient(mean))


def init_state(
    num_experts: int,
    vocab_size: int,
    k: int,
    key: PRNGKeyArray,
    token_counts: Shaped[np.ndarray, " V"] | None = None,
) -> State:
    """Returns the moving average of the cost and its weight, both 0."""
    del num_experts, vocab_size, k, key, token_counts
    return {"cost": jnp.zeros((), jnp.float32), "weight": jnp.zeros((), jnp.float32)}


def update_state(state: State, *, cost: Shaped[Array, ""], baseline_decay: Scalar = 0.99) -> State:
    """Moves the average towards this step's mean cost.

    Args:
        state: as `init_state` makes it, with leading layer axes or none.
        cost: mean cross-entropy of the step, nats a token.
        baseline_decay: weight of the past in the running mean of the cost, below 1; may be traced.
    """
    new = {"cost": cost.astype(jnp.float32), "weight": 1.0}
    return {
        name: baseline_decay * state[name] + (1.0 - baseline_decay) * value
        for name, value in new.items()
    }


def check(num_experts: int, *, k: int, gates: str = "one", baseline: str = "ema") -> None:
    """Refuses more than one expert, and unknown names.

    Raises:
        ConfigError: see the messages.
    """
    del num_experts
    if k != 1:
        raise ConfigError(
            f"router.k={k} with router.name='reinforce': the policy draws exactly one expert. Set "
            "router.k=1, or router.name='bernoulli', which learns how many experts to use."
        )
    check_names(gates, baseline)


def check_names(gates: str, baseline: str) -> None:
    """Refuses unknown gates and baselines.

    Raises:
        ConfigError: names the known ones.
    """
    for option, value, known in (("gates", gates, GATES), ("baseline", baseline, BASELINES)):
        if value not in known:
            raise ConfigError(
                f"router.{option}={value!r} is not one of {', '.join(known)}; choose one."
            )


ROUTER = Router(
    route,
    paper="Rosenbaum et al. 2018, arXiv:1711.01239; Clark et al. 2022, arXiv:2202.01169",
    equation="a ~ softmax(x W); L = w_pi (c - b) log p_a + w_v Huber(b, c) - beta H(p)",
    cost="D E for the gate, 1 expert; a learned baseline D^2 more",
    use="When the reward is not a gradient: routing judged by the loss that follows.",
    check=check,
    gate=PolicyGate,
    stateful=True,
    traced=("baseline_decay",),
    init_state=init_state,
    update_state=update_state,
)
