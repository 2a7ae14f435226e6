"""Random paths: every token walks from module to module, each step drawn given the one before.

A network whose sparse layers are stages and whose experts are the modules of a stage; kin to
PathNet (Fernando et al. 2017, arXiv:1701.08734) and routing networks (Rosenbaum et al. 2018,
arXiv:1711.01239). The chance of the next module given the last one `i` and the token `x` is

    P(j | i, x) = softmax_j( (w_ij + g(x)_j + prior_weight * log pi_j) / temperature )

with transitions `w [E E]` and scores `g(x) = x W` learned in every stage, and a prior `pi` that
`moe.routing.prior` updates from performance on held-out text.
"""

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped
import numpy as np

from moe.errors import ConfigError
from moe.routing import prior, reinforce
from moe.routing.gates import Gated, project
from moe.routing.router import Router, drawing
from moe.routing.selection import ROUTING_NAME, gather
from moe.routing.types import Routing, Scalar, State
from moe.routing.variable_k import straight_through, variable_choices

GRADIENTS = ("gate", "straight_through", "reinforce")
SCOPES = ("token", "sequence", "batch")
EVAL_MODES = ("map", "mean")


class PathGate(nnx.Module):
    """One stage: transitions from the modules of the stage before, and scores of the token.

    Remembers where each of `M = paths` paths stands, as weights over modules `[B S M*E]`: one-hot
    after a step was taken; uniform before the first, which stands for a start drawn uniformly;
    the whole distribution in evaluation by `mean`.

    Args:
        width: model width `D`.
        num_experts: `E`, the same in all stages.
        rngs: its `params` stream draws both kernels.
        paths: `M`, walked side by side.
        temperature: towards 0 the most likely module is taken for sure.
        prior_weight: exponent of the prior.
        scope: who shares a draw: nobody, a row, or the whole batch.
        eval_mode: without a key, `map` takes the most likely step and `mean` all at once.

    Attributes:
        kernel: float32 `[D E]`, from normal(0, D^-1/2).
        transition: float32 `[E E]`, from normal(0, 0.02): row `i` leads on from module `i`.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        rngs: nnx.Rngs,
        paths: int = 2,
        temperature: float = 1.0,
        prior_weight: float = 1.0,
        scope: str = "token",
        eval_mode: str = "map",
    ):
        init = nnx.initializers.normal
        kernel = init(width**-0.5)(rngs.params(), (width, num_experts), jnp.float32)
        transition = init(0.02)(rngs.params(), (num_experts, num_experts), jnp.float32)
        self.kernel = nnx.Param(kernel, axes=("D", "E"))
        self.transition = nnx.Param(transition, axes=(None, "E"))
        self.paths, self.scope, self.eval_mode = paths, scope, eval_mode
        self.temperature, self.prior_weight = temperature, prior_weight

    @staticmethod
    def initial_memory(
        batch: int, length: int, num_experts: int, *, paths: int = 2
    ) -> Float[Array, "B S X"]:
        """Every path may start anywhere: weights 1/E, `[B S M*E]`."""
        return jnp.full((batch, length, paths * num_experts), 1.0 / num_experts)

    def __call__(
        self,
        tokens: Float[Array, "B S D"],
        *,
        memory: Float[Array, "B S X"],
        state: State | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Gated:
        """Takes one step on every path.

        Args:
            tokens: `[B S D]`.
            memory: where the paths stand, `[B S M*E]`.
            state: `{"log_prior": float32 [E]}`; None stands for a uniform prior.
            key: of the draws; None, as in evaluation, leaves them to `eval_mode`.

        Returns:
            Logits before prior and temperature, mean over paths; the inputs `path_probs [B S M E]`
            and `path_expert [B S M]` of `route`; and where the paths stand now.
        """
        B, S = tokens.shape[:2]
        transition = self.transition[...]
        E = transition.shape[-1]
        standing = memory.reshape(B, S, self.paths, E)
        scores = project(tokens, self.kernel[...])
        log_prior = jnp.zeros(E) if state is None else jax.lax.stop_gradient(state["log_prior"])
        biased = scores + self.prior_weight * log_prior[None, None]
        probs = step_probs(standing, transition, biased, self.temperature)
        expert = checkpoint_name(step(probs, key, self.scope), ROUTING_NAME)
        here = jax.nn.one_hot(expert, E)
        if key is None and self.eval_mode == "mean":
            here = probs
        logits = scores + standing.mean(axis=2) @ transition
        memory = jax.lax.stop_gradient(here).reshape(memory.shape)
        return Gated(logits, {"path_probs": probs, "path_expert": expert}, memory)


def step_probs(
    standing: Float[Array, "B S M E"],
    transition: Float[Array, "E E"],
    scores: Float[Array, "B S E"],
    temperature: Scalar,
) -> Float[Array, "B S M E"]:
    """Chances of the next module: rows of the transition matrix, weighted by where a path stands.

    The weights multiply probabilities, not scores: a start that is not known is a mixture of
    starts, and steps from a distribution give the distribution after the step, exactly.
    """
    onward = (transition[None, None] + scores[..., None, :]) / temperature  # [B S E E]
    return jnp.einsum("bsme,bsef->bsmf", standing, jax.nn.softmax(onward))


def step(
    probs: Float[Array, "B S M E"], key: PRNGKeyArray | None, scope: str
) -> Int[Array, "B S M"]:
    """Draws the next module of each path, or without a key takes the most likely one."""
    B, S, M, _ = probs.shape
    if key is None:
        return jnp.argmax(jax.lax.stop_gradient(probs), axis=-1).astype(jnp.int32)
    shape = {"token": (B, S, M), "sequence": (B, 1, M), "batch": (1, 1, M)}[scope]
    return inverse_cdf(probs, jnp.broadcast_to(jax.random.uniform(key, shape), (B, S, M)))


def inverse_cdf(probs: Float[Array, "*A E"], u: Float[Array, "*A"]) -> Int[Array, "*A"]:
    """Turns uniform numbers in [0, 1) into draws: how many cumulated probabilities are at most `u`.

    Rounding may leave the last sum below 1 and `u` above it; the last module is then meant.
    """
    passed = jnp.cumsum(jax.lax.stop_gradient(probs), axis=-1) <= u[..., None]
    return jnp.minimum(passed.sum(axis=-1), probs.shape[-1] - 1).astype(jnp.int32)


def route(
    logits: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    *,
    k: int,
    path_probs: Float[Array, "B S M E"],
    path_expert: Int[Array, "B S M"],
    key: PRNGKeyArray | None = None,
    state: State | None = None,
    gradient: str = "gate",
    eval_mode: str = "map",
) -> Routing:
    """Gives each token the mean of the modules on its paths.

    | `gradient` | gate of a module with probability P, one of M paths | |
    |---|---|---|
    | `gate` | `P / sg(P) / M`: 1/M, gradient `P' / P` | unbiased for the mean over all modules |
    | `straight_through` | `(1 + P - sg(P)) / M`: 1/M, gradient `P'` | biased, less noisy |
    | `reinforce` | 1/M | `token/` terms for `moe.routing.policy_losses` |

    The first is unbiased for one stage; over several it is a surrogate, because the gradient
    through where a path stands is left out.

    Args:
        logits: float32 `[B S E]`, as `PathGate` gives them.
        valid: `[B S]`, True for a real token.
        k: as many as there are paths.
        path_probs: chances of the step each path took.
        path_expert: the module it led to.
        key: only whether there is one is read: with a key, paths were drawn.
        state: `log_prior`, which is the gate's, and the baseline of `reinforce`.
        gradient: one of `GRADIENTS`.
        eval_mode: without a key, `mean` runs all modules, weighted by their chances.

    Returns:
        The decision; `probs` are the chances, mean over paths. Paths that meet in a module share
        one choice, whose gate is the sum.
    """
    E, M = logits.shape[-1], k
    probs = path_probs.mean(axis=2)
    if key is None and eval_mode == "mean":
        expert = jnp.broadcast_to(jnp.arange(E), probs.shape)
        return Routing(logits, probs, variable_choices(expert, probs, expert >= 0, valid))
    chance = gather(path_probs.reshape(-1, M, E), path_expert.reshape(-1, M)[..., None])
    chance = chance.reshape(path_expert.shape)
    fixed = jnp.maximum(jax.lax.stop_gradient(chance), jnp.finfo(jnp.float32).tiny)
    gate = {
        "gate": straight_through(jnp.ones_like(chance), chance / fixed),
        "straight_through": straight_through(jnp.ones_like(chance), chance),
        "reinforce": jnp.ones_like(chance),
    }[gradient]
    plan = variable_choices(path_expert, *merged(path_expert, gate / M), valid)
    if gradient != "reinforce":
        return Routing(logits, probs, plan)
    log_probs = jnp.log(jnp.maximum(path_probs, jnp.finfo(jnp.float32).tiny))
    terms = reinforce.policy_terms(
        jnp.log(jnp.maximum(chance, jnp.finfo(jnp.float32).tiny)).sum(axis=-1),
        -(path_probs * log_probs).sum(axis=-1).mean(axis=-1),
        reinforce.baseline_of(state, jnp.zeros(valid.shape), "ema"),
    )
    return Routing(logits, probs, plan, terms)


def merged(
    expert: Int[Array, "B S K"], gate: Float[Array, "B S K"]
) -> tuple[Float[Array, "B S K"], Bool[Array, "B S K"]]:
    """Adds the gates of choices that name the same expert.

    Returns:
        The sums, and which entries are the first of their expert and so keep it.
    """
    same = expert[..., :, None] == expert[..., None, :]  # [B S K K]
    earlier = jnp.tril(jnp.ones(same.shape[-2:], bool), -1)[None, None]
    first = ~(same & earlier).any(axis=-1)
    return jnp.sum(jnp.where(same, gate[..., None, :], 0.0), axis=-1), first


def average_predictions(
    logits: Float[Array, "M B S V"], over: str = "probs"
) -> Float[Array, "B S V"]:
    """Joins the predictions of `M` whole passes, each with its own paths, as log-probabilities.

    Args:
        logits: of the passes, any float type.
        over: `probs` takes the mean of probabilities, an ensemble; `logits` that of logits.

    Raises:
        ValueError: another `over`.
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    if over == "probs":
        return jax.nn.logsumexp(log_probs, axis=0) - jnp.log(logits.shape[0])
    if over == "logits":
        return jax.nn.log_softmax(log_probs.mean(axis=0))
    raise ValueError(f"over={over!r} is neither 'probs' nor 'logits'")


def init_state(
    num_experts: int,
    vocab_size: int,
    k: int,
    key: PRNGKeyArray,
    token_counts: Shaped[np.ndarray, " V"] | None = None,
) -> State:
    """Returns a uniform `log_prior [E]` and the baseline of `reinforce`."""
    arguments = (num_experts, vocab_size, k, key, token_counts)
    return prior.init_state(*arguments) | reinforce.init_state(*arguments)


def update_state(state: State, *, cost: Shaped[Array, ""], baseline_decay: Scalar = 0.99) -> State:
    """Moves the baseline; `moe.routing.prior.set_prior` moves the prior, on held-out text.

    Args:
        state: as `init_state` makes it, with leading layer axes or none.
        cost: mean cross-entropy of the step, nats a token.
        baseline_decay: weight of the past in the running mean of the cost, below 1; may be traced.
    """
    average = {name: state[name] for name in ("cost", "weight")}
    return state | reinforce.update_state(average, cost=cost, baseline_decay=baseline_decay)


def check(
    num_experts: int,
    *,
    k: int,
    paths: int = 2,
    temperature: float = 1.0,
    scope: str = "token",
    gradient: str = "gate",
    eval_mode: str = "map",
) -> None:
    """Refuses unknown names, and paths that are not `k`.

    Raises:
        ConfigError: see the messages.
    """
    del num_experts
    if paths != k:
        raise ConfigError(
            f"router.paths={paths} and router.k={k} differ: a token visits one expert for each of "
            f"its paths. Set router.paths={k}."
        )
    if temperature <= 0:
        raise ConfigError(
            f"router.temperature={temperature} must be above 0; 0.01 is all but deterministic."
        )
    for option, value, known in (
        ("scope", scope, SCOPES),
        ("gradient", gradient, GRADIENTS),
        ("eval_mode", eval_mode, EVAL_MODES),
    ):
        if value not in known:
            raise ConfigError(
                f"router.{option}={value!r} is not one of {', '.join(known)}; choose one."
            )


ROUTER = Router(
    route,
    paper="Fernando et al. 2017, arXiv:1701.08734; Rosenbaum et al. 2018, arXiv:1711.01239",
    equation="m' ~ P(j | m, x) = softmax_j((w_mj + g(x)_j + log pi_j) / tau); y = mean over M paths",
    cost="D E + E^2 for the gate, at most M experts",
    use="When a choice should depend on the choices before it: a random walk through modules.",
    check=check,
    gate=PathGate,
    fixed_k=False,
    stateful=True,
    traced=("baseline_decay",),
    init_state=init_state,
    update_state=update_state,
)

# The same, walking at random in evaluation too: Monte Carlo over keys, as in MC dropout.
SAMPLED = ROUTER._replace(
    route=drawing(route),
    use="To see how predictions spread over paths: evaluation draws them too.",
    needs_key_in_eval=True,
)
