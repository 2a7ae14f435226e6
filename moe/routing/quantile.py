"""Quantile balancing: a bias on selection that is solved for, not stepped towards.

The `quantile_balancing` of Megatron-LM (github.com/NVIDIA/Megatron-LM, pull request 5349); no paper
is cited there. Balanced top-k assignment is a linear program; its dual has a price alpha for each
token and beta for each expert. Holding one of the two, the best other is a quantile:

    alpha_t = (k+1)-th largest of l_t - beta          over experts
    beta_e  = (m+1)-th largest of l_te - alpha_t      over tokens, m = T k / E

Everything from there up to the k-th and m-th largest is as good. Megatron takes these lower ends
(`price="edge"`), where the alternation gets stuck with loads a few choices off; the middle, our
default, ends in exact balance on a fixed batch.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, Shaped
import numpy as np

from moe.errors import ConfigError
from moe.routing.router import Router
from moe.routing.selection import choices, gather, select
from moe.routing.types import Routing, State

SCORES = ("softmax", "sigmoid")
PRICES = ("middle", "edge")


def route(
    logits: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    *,
    k: int,
    state: State | None = None,
    training: bool = False,
    score: str = "softmax",
    price: str = "middle",
) -> Routing:
    """Picks the `k` largest of `logits - beta`, with the beta that earlier batches left.

    Gates come from the logits without beta: `score_i / sum_j score_j` over the chosen, or
    `score_i` itself for k = 1, where the quotient is constant.

    Args:
        logits: float32 `[B S E]`.
        valid: `[B S]`, True for a real token.
        k: experts a token, fewer than E.
        state: `{"beta": float32 [E]}`; None stands for zeros. Gets no gradient.
        training: whether the next beta is worked out; evaluation leaves it out.
        score: one of `SCORES`.
        price: one of `PRICES`, see above.

    Returns:
        The decision; `probs` is the score divided by its sum over all experts. In training its
        term `beta`, `[B S E]`, repeats the next beta for every token, so that the mean over the
        tokens of a step is the mean of its microbatches' betas; zeros in evaluation.
    """
    beta = 0.0 if state is None else state["beta"][None, None]
    biased = jax.lax.stop_gradient(logits - beta)
    best = select(biased, k + 1)
    expert = best[..., :k]
    log_score = jax.nn.log_sigmoid(logits) if score == "sigmoid" else jax.nn.log_softmax(logits)
    gate = gather(log_score, expert)
    gate = jnp.exp(gate) if k == 1 else jax.nn.softmax(gate)
    term = jnp.zeros_like(logits)
    if training:
        border = gather(biased, best[..., k - 1 :])  # [B S 2]: last expert in, first one out
        alpha = border[..., 1:] if price == "edge" else border.mean(axis=-1, keepdims=True)
        new = next_beta(jax.lax.stop_gradient(logits) - alpha, valid, k, price)
        term = jnp.broadcast_to(new, logits.shape)
    plan = choices(expert, gate, valid)
    return Routing(logits, jax.nn.softmax(log_score), plan, {"beta": term})


def next_beta(
    margins: Float[Array, "B S E"], valid: Bool[Array, "B S"], k: int, price: str = "middle"
) -> Float[Array, " E"]:
    """A number for each expert below which all but its m largest margins lie.

    All tokens of the global batch are one set. Padding takes no part, also not in `m = tokens *
    k / E`, which is rounded down where padding leaves it no whole number; for m = 0 the edge is
    all there is. Without tokens the result is 0.

    Args:
        margins: `logits - alpha`, `[B S E]`.
        valid: `[B S]`, True for a real token.
        k: experts a token.
        price: one of `PRICES`.
    """
    E = margins.shape[-1]
    flat = jnp.where(valid[..., None], margins, -jnp.inf).reshape(-1, E)
    falling = -jnp.sort(-flat, axis=0)  # [T E]
    m = valid.sum() * k // E
    first = m if price == "edge" else jnp.maximum(m - 1, 0)
    rank = jax.lax.broadcasted_iota(jnp.int32, flat.shape, 0)
    inside = (rank >= first) & (rank <= m) & valid.any()
    return jnp.where(inside, falling, 0.0).sum(axis=0) / (m - first + 1)


def init_state(
    num_experts: int,
    vocab_size: int,
    k: int,
    key: PRNGKeyArray,
    token_counts: Shaped[np.ndarray, " V"] | None = None,
) -> State:
    """Returns `{"beta": float32 zeros [E]}`."""
    del vocab_size, k, key, token_counts
    return {"beta": jnp.zeros(num_experts, jnp.float32)}


def update_state(
    state: State, *, stats: dict[str, Float[Array, "*L E"]], tokens: Shaped[Array, "*L"]
) -> State:
    """Takes over the beta that the step's batch asks for; keeps the old one without tokens.

    Args:
        state: before the step.
        stats: `beta` is the sum over tokens of that term of `route`.
        tokens: valid tokens of the step.
    """
    tokens = tokens[..., None]
    new = stats["beta"] / jnp.maximum(tokens, 1)
    return {"beta": jnp.where(tokens > 0, new, state["beta"]).astype(jnp.float32)}


def check(
    num_experts: int,
    *,
    k: int,
    sequence_length: int | None = None,
    batch_size: int | None = None,
    score: str = "softmax",
    price: str = "middle",
) -> None:
    """Refuses numbers that admit no exact balance.

    Raises:
        ConfigError: an unknown score or price, k = E, or tokens x k that E does not divide.
    """
    for name, value, known in (("score", score, SCORES), ("price", price, PRICES)):
        if value not in known:
            raise ConfigError(
                f"router.{name}={value!r} is not one of {', '.join(known)}; choose one."
            )
    if k >= num_experts:
        raise ConfigError(
            f"router.k={k} with router.name='quantile' must be below model.num_experts="
            f"{num_experts}: the price of a token is its score of rank k + 1. Lower router.k, or use "
            "router.name='topk'."
        )
    if sequence_length is None or batch_size is None:
        return
    requests = sequence_length * batch_size * k
    if requests % num_experts:
        raise ConfigError(
            f"{batch_size} rows x {sequence_length} positions x router.k={k} are {requests} choices, "
            f"which model.num_experts={num_experts} does not divide: quantile balancing gives every "
            f"expert the same number. Choose a batch of a multiple of {num_experts} choices."
        )


ROUTER = Router(
    route,
    paper="Megatron-LM quantile_balancing, github.com/NVIDIA/Megatron-LM/pull/5349",
    equation="S = top-k of l - beta; next beta_e = 1 - k/E quantile over t of l_te - alpha_t",
    cost="D E + T E log T in training + k experts",
    use="Exact balance with no loss and no rate to tune; batches large enough to stand for the data.",
    check=check,
    stateful=True,
    init_state=init_state,
    update_state=update_state,
)
