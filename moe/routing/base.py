"""BASE layers: tokens of a row assigned to experts so that all get equally many.

Lewis et al. 2021 (arXiv:2103.16716). The paper's expert is a residual stack, `f(h) = h + F(h)`, and
its layer returns `g f(h) + (1 - g) h` with `g = sigmoid(h . w_e)`: that is `h + g F(h)`. The block adds
`h` itself and its experts compute `F`, so the gate of the plan is `g` and nothing else is needed.
"""

from typing import NamedTuple

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.errors import ConfigError
from moe.routing.gates import Gated, project
from moe.routing.router import Router
from moe.routing.selection import ROUTING_NAME, choices, gather, select
from moe.routing.types import Routing, Scalar


class CentroidGate(nnx.Module):
    """`logits = tokens . centroids`, the centroids orthogonal at the start.

    Args:
        width: model width `D`.
        num_experts: `E`; with E > D only D of them can be orthogonal.
        rngs: its `params` stream draws the centroids.
        gain: their length at the start (the paper's 0.1).

    Attributes:
        kernel: float32 `[D E]`.
    """

    def __init__(self, width: int, num_experts: int, *, rngs: nnx.Rngs, gain: float = 0.1):
        init = nnx.initializers.orthogonal(gain)
        kernel = init(rngs.params(), (width, num_experts), jnp.float32)
        self.kernel = nnx.Param(kernel, axes=("D", "E"))

    def __call__(self, tokens: Float[Array, "B S D"]) -> Gated:
        """Scores every expert for every token in float32."""
        return Gated(project(tokens, self.kernel[...]))


def route(
    logits: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    *,
    k: int,
    training: bool = True,
    epsilon: Scalar = 0.01,
    rounds: int = 300,
) -> Routing:
    """Assigns each token of a row to one expert, all experts alike, for the largest sum of logits.

    An expert gets at most `ceil(n / E)` of the `n` valid tokens: exactly n/E where E divides n, and
    otherwise what is missing may fall on any expert. No gradient passes the assignment; the gate is
    `sigmoid(logit)` of the assigned expert.

    Args:
        logits: float32 `[B S E]`. What is not finite counts as the smallest that is, in
            the assignment.
        valid: `[B S]`, True for a real token; padding is assigned to nobody.
        k: experts a token, 1.
        training: assign over the row. Evaluation takes the largest logit, token by token: nothing
            balances it, and the choice may differ from that in training.
        epsilon: step of the auction, as a share of the range of a row's logits: the sum is at most
            n times this below the optimum. May be traced.
        rounds: of the auction at most; what is then not assigned takes the room that is left.

    Returns:
        The decision, with K = 1; `probs` is `sigmoid(logits)` over its sum.
    """
    del k
    fixed = jax.lax.stop_gradient(logits)
    if training:
        assigned = jax.vmap(lambda s, v: assign(s, v, epsilon, rounds))(fixed, valid)
        expert = checkpoint_name(assigned[..., None], ROUTING_NAME)
    else:
        expert = select(fixed, 1)
    gate = jax.nn.sigmoid(gather(logits, expert))
    probs = jax.nn.softmax(jax.nn.log_sigmoid(logits))  # finite where every sigmoid underflows
    return Routing(logits, probs, choices(expert, gate, valid))


class Auction(NamedTuple):
    """Who holds a place at which expert, and what was bid for it."""

    owner: Int[Array, " S"]  # expert of each token, E for none
    bid: Float[Array, " S"]  # what the token bid for its place
    price: Float[Array, " E"]  # the lowest bid that a full expert holds, 0 for others
    round: Int[Array, ""]


def assign(
    scores: Float[Array, "S E"], valid: Bool[Array, " S"], epsilon: Scalar, rounds: int
) -> Int[Array, " S"]:
    """Nearly the best assignment of one row under equal room, by auction (Bertsekas 1992).

    Every token without a place bids at the expert where its score minus the price is largest: the
    price, plus what it would lose with its second choice, plus a step. An expert keeps its highest
    bids, as many as it has places, and puts the others out. Prices only rise, and the auction ends
    when all have a place.

    Args:
        scores: float32 `[S E]`.
        valid: `[S]`; the others get some expert number in range.
        epsilon: the step, as a share of the range of the scores.
        rounds: after these the tokens without a place fill the room that is left, in their order.

    Returns:
        int32 `[S]`, the expert of each token.
    """
    S, E = scores.shape
    sound = jnp.isfinite(scores) & valid[:, None]
    least = jnp.where(sound, scores, jnp.inf).min()
    scores = jnp.where(sound, scores, jnp.where(jnp.isfinite(least), least, 0.0))
    step = epsilon * jnp.maximum(scores.max() - scores.min(), 1e-6)
    room = -(-valid.sum(dtype=jnp.int32) // E)

    def bidding(auction: Auction) -> Bool[Array, ""]:
        return ((auction.owner == E) & valid).any() & (auction.round < rounds)

    def bid(auction: Auction) -> Auction:
        value = scores - auction.price[None]
        wanted = value.argmax(axis=-1)  # [S]
        wants = jax.nn.one_hot(wanted, E, dtype=bool)
        second = jnp.where(wants, -jnp.inf, value).max(axis=-1) if E > 1 else value[:, 0]
        margin = value.max(axis=-1) - second
        free = auction.owner == E
        target = jnp.where(free, wanted, auction.owner)
        price = jnp.where(wants, auction.price[None], 0.0).sum(axis=-1)
        offer = jnp.where(free, price + margin + step, auction.bid)
        return settle(auction.round + 1, target, offer)

    def settle(turn: Array, target: Array, offer: Array) -> Auction:
        mine = (jax.nn.one_hot(target, E, dtype=bool) & valid[:, None]).T  # [E S]
        kept = best_bids(jnp.where(mine, offer[None], -jnp.inf), room, -(-S // E))
        lowest = jnp.where(kept, offer[None], jnp.inf).min(axis=-1)
        full = kept.sum(axis=-1) == room
        owner = jnp.where(kept.any(axis=0), kept.argmax(axis=0), E)
        return Auction(owner.astype(jnp.int32), offer, jnp.where(full, lowest, 0.0), turn)

    start = Auction(jnp.full(S, E, jnp.int32), jnp.zeros(S), jnp.zeros(E), jnp.zeros((), jnp.int32))
    return fill(jax.lax.while_loop(bidding, bid, start).owner, valid, room, E)


def best_bids(bids: Float[Array, "E S"], room: Int[Array, ""], most: int) -> Bool[Array, "E S"]:
    """Marks the `room` highest bids for each expert, the earlier position first among equal ones.

    Args:
        bids: -inf where there is none.
        room: places of an expert.
        most: static bound of `room`.
    """
    best = jax.lax.top_k(bids, most)[0]
    rank = jax.lax.broadcasted_iota(jnp.int32, best.shape, 1)
    last = jnp.where(rank == room - 1, best, 0.0).sum(axis=-1, keepdims=True)
    above, equal = bids > last, (bids == last) & (bids > -jnp.inf)
    spare = room - above.sum(axis=-1, keepdims=True)
    return above | (equal & (jnp.cumsum(equal, axis=-1) <= spare))


def fill(
    owner: Int[Array, " S"], valid: Bool[Array, " S"], room: Int[Array, ""], num_experts: int
) -> Int[Array, " S"]:
    """Gives tokens without an expert (number `E`) the places left, in the order of their positions."""
    held = jax.nn.one_hot(owner, num_experts, dtype=jnp.int32) * valid[:, None]
    places = jnp.cumsum(room - held.sum(axis=0))  # [E]
    waiting = (owner == num_experts) & valid
    turn = jnp.cumsum(waiting) - 1
    left = jnp.searchsorted(places, turn, side="right")
    owner = jnp.where(waiting, left, owner)
    return jnp.minimum(owner, num_experts - 1).astype(jnp.int32)


def check(num_experts: int, *, k: int, epsilon: Scalar = 0.01, rounds: int = 300) -> None:
    """Refuses more than one expert a token, and an auction that cannot run.

    Raises:
        ConfigError: k is not 1, no step, or no round.
    """
    del num_experts
    if k != 1:
        raise ConfigError(
            f"router.k={k} with router.name='base': a balanced assignment gives a token exactly one "
            "expert. Set router.k=1, or router.name='sinkhorn' or 'expert_choice' for more."
        )
    if not 0.0 < epsilon < 1.0 or rounds < 1:
        raise ConfigError(
            f"router.epsilon={epsilon} must be between 0 and 1, a share of the range of the logits, "
            f"and router.rounds={rounds} at least 1. The defaults are 0.01 and 300."
        )


ROUTER = Router(
    route,
    paper="Lewis et al. 2021, arXiv:2103.16716",
    equation="max_a sum_t x_t . w_a(t) with equal counts; gate sigmoid(x . w_a)",
    cost="D E + 1 expert; up to 300 rounds of sorting S x E bids",
    use="One expert a token and exact balance; evaluation is greedy, and may be unbalanced.",
    check=check,
    gate=CentroidGate,
    causality="C3",
    causal_in_eval=True,
    traced=("epsilon",),
)
