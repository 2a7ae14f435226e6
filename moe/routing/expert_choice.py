"""Expert choice: each expert takes its best tokens of a row (Zhou et al. 2022, arXiv:2202.09368).

Every expert is full and none overflows, but a token may get any number of experts, none included,
and whether an expert takes it hangs on the rest of the row, later tokens included: C3. Evaluation
needs no row: a token takes the experts whose score for it exceeds a threshold, which follows the best
score that the expert turned down in training.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped
import numpy as np

from moe.errors import ConfigError
from moe.routing.router import Router
from moe.routing.selection import choices, gather, select
from moe.routing.types import Choices, Routing, Scalar, Slots, State

NORMALIZE = ("experts", "tokens")
_NEVER = -1e9  # logarithm of a share that is 0; finite, because differences of it are taken


def route(
    logits: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    *,
    k: int,
    training: bool = True,
    state: State | None = None,
    normalize: str = "experts",
    cap: int = 0,
    entropy: float = 1e-2,
    iterations: int = 100,
    k_max: int = 0,
) -> Routing:
    """Lets each expert take the `ceil(n k / E)` best of the `n` valid tokens of a row.

    `S[t, e]` is `softmax_e(logits)`, and the gate of a taken token; gates are not renormalised. With
    `normalize="tokens"` (the variant of Mesh TensorFlow) it is the softmax over the valid tokens of
    the row, and a token's gates are divided by the number of experts that took it.

    In evaluation an expert takes a token if `S > threshold`, which is its choice in training if the
    threshold is the first score that it turned down. The softmax over tokens takes its normaliser
    from the state too.

    Args:
        logits: float32 `[B S E]`.
        valid: `[B S]`, True for a real token; a padded row is chosen from like the same row cut.
        k: average experts a token.
        training: choose over the row; otherwise token by token.
        state: `{"threshold": float32 [E]}`, with `"lse" [E]` for `normalize="tokens"`; read in
            evaluation only. Gets no gradient.
        normalize: what scores are a distribution over, one of `NORMALIZE`.
        cap: most experts a token may get; 0 stands for no bound (the additional constraint of
            the paper).
        entropy: weight of the entropy in the capped problem. The paper's 1e-3 is further from its
            solution after 100 iterations.
        iterations: of the capped problem.
        k_max: width of the plan in evaluation, the most experts a token may get there; 0 stands for
            E, or for `cap`.

    Returns:
        The decision: `Slots` in training, `Choices` in evaluation. `probs` is the softmax over
        experts. In training `terms["threshold"]`, and `terms["lse"]` for `normalize="tokens"`, give
        every token what its row says of each expert, for `update_state`.

    Raises:
        ValueError: evaluation without state.
    """
    probs = jax.nn.softmax(logits)
    by_tokens = normalize == "tokens"
    if training:
        masked = jnp.where(valid[..., None], logits, _NEVER)
        lse = jax.nn.logsumexp(masked, axis=1, keepdims=True)  # [B 1 E]
        score = jnp.exp(masked - lse) if by_tokens else probs
        plan, border = take_best(score, valid, k, cap, entropy, iterations)
        if by_tokens:
            plan = plan._replace(gate=plan.gate / _takers_of_slots(plan, logits.shape[1]))
        terms = {"threshold": border} | ({"lse": lse[:, 0]} if by_tokens else {})
        return Routing(logits, probs, plan, {n: _spread(v, valid) for n, v in terms.items()})
    if state is None:
        raise ValueError("expert choice in evaluation needs its thresholds (state)")
    score = probs
    if by_tokens:  # at most 1 like any softmax, though the normaliser is that of other rows
        lse = jax.lax.stop_gradient(state["lse"])[None, None]
        score = jnp.exp(jnp.minimum(logits - lse, 0.0))
    bounds = [bound for bound in (k_max, cap, logits.shape[-1]) if bound]
    plan = take_above(score, valid, state["threshold"], min(bounds))
    if by_tokens:
        takers = plan.valid.sum(axis=-1, keepdims=True, dtype=jnp.float32)
        plan = plan._replace(gate=plan.gate / jnp.maximum(takers, 1.0))
    return Routing(logits, probs, plan)


def take_best(
    score: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    k: int,
    cap: int = 0,
    entropy: float = 1e-2,
    iterations: int = 100,
) -> tuple[Slots, Float[Array, "B E"]]:
    """Fills every expert with its best tokens, and says which score each expert first turned down.

    Args:
        score: `[B S E]`, at least 0; the gates.
        valid: `[B S]`.
        k: average experts a token: an expert has `ceil(n k / E)` slots for `n` valid tokens.
        cap: most experts a token may get, or 0. Tokens that are still over it after the iterations
            lose their weakest experts, whose slots stay empty.
        entropy: as in `capped_shares`.
        iterations: as in `capped_shares`.

    Returns:
        The slots, `C = ceil(S k / E)`, and the score of rank `ceil(n k / E) + 1` for each expert; 0
        where no token is left over.
    """
    S, E = score.shape[1:]
    by_expert = jnp.where(valid[:, None], score.swapaxes(1, 2), -1.0)  # [B E S]
    C = -(-S * k // E)
    room = -(-valid.sum(axis=1, dtype=jnp.int32) * k // E)  # [B]
    fixed = jax.lax.stop_gradient(by_expert)
    best = jax.lax.top_k(fixed, min(C + 1, S))[0]
    rank = jax.lax.broadcasted_iota(jnp.int32, best.shape, 2)
    border = jnp.where((rank == room[:, None, None]) & (best > 0), best, 0.0).sum(axis=-1)
    if cap:
        fixed = capped_shares(fixed, valid, room, cap, entropy, iterations)
    token = select(fixed, C)
    filled = jax.lax.broadcasted_iota(jnp.int32, token.shape, 2) < room[:, None, None]
    # Indexed: comparing with every position, as `gather` does, grows with the square of S.
    gate = jnp.where(filled, jnp.take_along_axis(by_expert, token, axis=-1), 0.0)
    slots = Slots(token, gate, filled)
    return (_drop_excess(slots, S, cap) if cap else slots), border


def take_above(
    score: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    threshold: Float[Array, " E"],
    k_max: int,
) -> Choices:
    """Gives each token the experts with `score > threshold`, the `k_max` largest scores if more."""
    above = jax.lax.stop_gradient(score) > threshold[None, None]
    expert = select(jnp.where(above, score, -1.0), k_max)
    plan = choices(expert, gather(score, expert), valid)
    taken = plan.valid & (gather(above.astype(jnp.float32), expert) > 0)
    return Choices(plan.expert, jnp.where(taken, plan.gate, 0.0), taken)


def capped_shares(
    score: Float[Array, "B E S"],
    valid: Bool[Array, "B S"],
    room: Int[Array, " B"],
    cap: int,
    entropy: float,
    iterations: int,
) -> Float[Array, "B E S"]:
    """Logarithms of the shares `A` that solve the capped problem of the paper.

    `max sum(score A) + entropy H(A)` where the shares of an expert sum to its room, those of a token
    to at most `cap`, and each is between 0 and 1: Dykstra's alternating projections of
    `exp(score / entropy)` in the Kullback-Leibler divergence. The two inequalities carry a
    correction, the equality needs none.
    """
    log_room = jnp.log(jnp.maximum(room, 1).astype(jnp.float32))[:, None, None]
    start = jnp.where(valid[:, None], score / entropy, _NEVER)

    def fill(share: Array) -> Array:
        return share - jax.nn.logsumexp(share, axis=-1, keepdims=True) + log_room

    def step(_: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        share, of_token, of_share = carry
        moved = share + of_token
        excess = jax.nn.logsumexp(moved, axis=1, keepdims=True) - np.log(cap)
        share = moved - jnp.maximum(excess, 0.0)
        of_token = moved - share
        moved = share + of_share
        share = jnp.minimum(moved, 0.0)
        return fill(share), of_token, moved - share

    nothing = jnp.zeros_like(start)
    return jax.lax.fori_loop(0, iterations, step, (fill(start), nothing, nothing))[0]


def taken_by(slots: Slots, length: int) -> Bool[Array, "B S E"]:
    """Which experts took each token."""

    def one(token: Array, filled: Array) -> Array:  # [C] -> [S]
        return jnp.zeros(length, bool).at[token].max(filled)

    return jax.vmap(jax.vmap(one))(slots.token, slots.valid).swapaxes(1, 2)


def _takers_of_slots(slots: Slots, length: int) -> Float[Array, "B E C"]:
    """How many experts took the token of each slot."""
    takers = taken_by(slots, length).sum(axis=-1, dtype=jnp.float32)[:, None]  # [B 1 S]
    return jnp.maximum(jnp.take_along_axis(takers, slots.token, axis=-1), 1.0)


def _drop_excess(slots: Slots, length: int, cap: int) -> Slots:
    """Empties the slots of the weakest experts of every token that more than `cap` took."""

    def one(token: Array, gate: Array) -> Array:
        return jnp.full(length, -1.0).at[token].max(gate)

    gate = jax.lax.stop_gradient(jnp.where(slots.valid, slots.gate, -1.0))
    strength = jax.vmap(jax.vmap(one))(slots.token, gate).swapaxes(1, 2)  # [B S E]
    strongest = jax.nn.one_hot(select(strength, cap), slots.token.shape[1], dtype=bool)
    kept = strongest.any(axis=-2).swapaxes(1, 2)  # [B E S]
    filled = slots.valid & jnp.take_along_axis(kept, slots.token, axis=-1)
    return Slots(slots.token, jnp.where(filled, slots.gate, 0.0), filled)


def _spread(value: Float[Array, "B E"], valid: Bool[Array, "B S"]) -> Float[Array, "B S E"]:
    """Gives a row's number to each of its tokens, so that a sum over tokens weighs rows by length."""
    value = jax.lax.stop_gradient(value)[:, None]
    return jnp.broadcast_to(value, (*valid.shape, value.shape[-1]))


def init_state(
    num_experts: int,
    vocab_size: int,
    k: int,
    key: PRNGKeyArray,
    token_counts: Shaped[np.ndarray, " V"] | None = None,
    *,
    normalize: str = "experts",
) -> State:
    """Returns thresholds at 1/E, the score of a router that knows nothing; `lse` starts at 0."""
    del vocab_size, k, key, token_counts
    state = {"threshold": jnp.full(num_experts, 1.0 / num_experts, jnp.float32)}
    return state | ({"lse": jnp.zeros(num_experts, jnp.float32)} if normalize == "tokens" else {})


def update_state(
    state: State,
    *,
    tokens: Shaped[Array, "*L"],
    stats: dict[str, Shaped[Array, "*L E"]],
    decay: Scalar = 0.99,
) -> State:
    """Moves each number towards the mean over the tokens of the global batch.

    Args:
        state: as in `route`.
        tokens: valid tokens of the batch; without any, nothing moves.
        stats: sums over these tokens of the terms that bear the names of the state.
        decay: of the moving average; may be traced.
    """
    tokens = tokens.astype(jnp.float32)[..., None]
    rate = jnp.where(tokens > 0, 1.0 - decay, 0.0)
    means = {name: stats[name] / jnp.maximum(tokens, 1.0) for name in state}
    return {name: value + rate * (means[name] - value) for name, value in state.items()}


def check(
    num_experts: int,
    *,
    k: int,
    normalize: str = "experts",
    cap: int = 0,
    entropy: float = 1e-2,
    iterations: int = 100,
    k_max: int = 0,
) -> None:
    """Refuses options that cannot work together.

    Raises:
        ConfigError: `normalize` is unknown, or a bound leaves fewer than k experts a token.
    """
    if normalize not in NORMALIZE:
        raise ConfigError(
            f"router.normalize={normalize!r} is not one of {', '.join(NORMALIZE)}; choose one."
        )
    for name, value in (("cap", cap), ("k_max", k_max)):
        if value and not k <= value <= num_experts:
            raise ConfigError(
                f"router.{name}={value} must be 0 (no bound) or between router.k={k} and "
                f"model.num_experts={num_experts}: tokens get router.k experts on average."
            )
    if entropy <= 0.0 or iterations < 1:
        raise ConfigError(
            f"router.entropy={entropy} must be above 0 and router.iterations={iterations} at least "
            "1: capped expert choice solves an entropy-regularised problem step by step. The "
            "defaults are 0.01 and 100."
        )


ROUTER = Router(
    route,
    paper="Zhou et al. 2022, arXiv:2202.09368",
    equation="S = softmax(x W); expert e takes the ceil(S k / E) tokens of largest S[:, e], gate S",
    cost="D E + k experts on average; capped: 100 passes over S x E more",
    use="Encoders and other tasks that may see the whole row: perfect balance without a loss.",
    check=check,
    plan="slots",
    causality="C3",
    causal_in_eval=True,
    fixed_k=False,
    stateful=True,
    traced=("decay",),
    init_state=init_state,
    update_state=update_state,
)
