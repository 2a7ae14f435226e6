"""Beam search over any model of the next token."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Step = Callable[[Array, Array, Any, Array, Array], tuple[Array, Any]]
"""`step(tokens [B W], origin [B W], cache, index, live [B]) -> (logits [B W V], cache)`.

Hypothesis `w` of row `b` has grown out of `origin[b, w]`: the cache is to follow. `tokens` are number
`index` of the new ones, and the logits are of those that come next.
"""


class Beam(NamedTuple):
    """Hypotheses of `B` rows: `W` that go on, and the best `W` that have ended."""

    index: Int[Array, ""]  # tokens of those that go on
    tokens: Int[Array, "B W N"]
    score: Float[Array, "B W"]  # log-probability; -inf where there is none
    origin: Int[Array, "B W"]  # which one each has grown out of
    ended: Int[Array, "B W N"]
    ended_score: Float[Array, "B W"]  # log-probability over the length penalty
    live: Bool[Array, " B"]
    cache: Any


def length_penalty(
    length: Int[Array, ""] | int, alpha: Float[Array, ""] | float
) -> Float[Array, ""] | float:
    """What log-probabilities are divided by: Wu et al. 2016, arXiv:1609.08144, equation 14."""
    return ((5.0 + length) / 6.0) ** alpha


def beam_search(
    step: Step,
    first: Float[Array, "B V"],
    cache: Any,
    live: Bool[Array, " B"],
    width: int,
    length: int,
    alpha: Float[Array, ""],
    boundary: Int[Array, ""],
) -> Int[Array, "B N"]:
    """The best hypothesis of every row; one of width 1 is the greedy one.

    Of the 2 W best continuations those among the first W that are the boundary end a hypothesis, and
    the best W others go on. A row is done when W have ended, or when none that goes on can still beat
    the best of those. What the last position cuts off competes with its score as it is.

    Args:
        step: the model.
        first: logits of the first new token.
        cache: of `step`, for `W` hypotheses a row.
        live: rows that are to be decoded.
        width: `W`.
        length: `N`, tokens at most; the boundary counts as one.
        alpha: of the length penalty, not negative; 0 compares log-probabilities.
        boundary: the token that ends a hypothesis.

    Returns:
        The boundary stands from a hypothesis's end on, and all over a row that is not live.
    """
    B, W = live.shape[0], width
    blank = jnp.full((B, W, length), boundary)
    nothing = jnp.full((B, W), -jnp.inf)
    start = nothing.at[:, 0].set(0.0)  # one empty hypothesis
    beam = Beam(
        jnp.int32(0),
        blank,
        start,
        jnp.zeros((B, W), jnp.int32),
        blank,
        nothing,
        live,
        cache,
    )
    beam = _grow(beam, jnp.broadcast_to(first[:, None], (B, W, first.shape[1])), alpha, boundary)

    def goes_on(beam: Beam) -> Bool[Array, ""]:
        return (beam.index < length) & beam.live.any()

    def turn(beam: Beam) -> Beam:
        index = beam.index - 1
        last = jax.lax.dynamic_index_in_dim(beam.tokens, index, axis=2, keepdims=False)
        logits, cache = step(last, beam.origin, beam.cache, index, beam.live)
        return _grow(beam._replace(cache=cache), logits, alpha, boundary)

    beam = jax.lax.while_loop(goes_on, turn, beam)
    cut_off = jnp.where(beam.live[:, None], beam.score, -jnp.inf) / length_penalty(length, alpha)
    scores = jnp.concatenate([beam.ended_score, cut_off], axis=1)
    tokens = jnp.concatenate([beam.ended, beam.tokens], axis=1)
    return jnp.where(live[:, None], _pick(tokens, scores.argmax(axis=1)[:, None])[:, 0], boundary)


def _grow(
    beam: Beam, logits: Float[Array, "B W V"], alpha: Float[Array, ""], boundary: Int[Array, ""]
) -> Beam:
    """One token more; rows that are done stay as they are."""
    B, W, V = logits.shape
    N = beam.tokens.shape[2]
    scores = beam.score[:, :, None] + jax.nn.log_softmax(logits.astype(jnp.float32))
    best, where = jax.lax.top_k(scores.reshape(B, W * V), min(2 * W, W * V))
    origin, token = where // V, (where % V).astype(jnp.int32)
    grown = _pick(beam.tokens, origin)
    grown = jax.lax.dynamic_update_slice_in_dim(grown, token[:, :, None], beam.index, axis=2)
    is_end = token == boundary

    # [B 2W]: those that end now, beside those that have
    ends = is_end & (jnp.arange(best.shape[1]) < W)[None]
    ending = jnp.where(ends, best, -jnp.inf) / length_penalty(beam.index + 1, alpha)
    ended_score, order = jax.lax.top_k(jnp.concatenate([beam.ended_score, ending], axis=1), W)
    ended = _pick(jnp.concatenate([beam.ended, grown], axis=1), order)

    score, order = jax.lax.top_k(jnp.where(is_end, -jnp.inf, best), W)
    reach = score[:, 0] / length_penalty(N, alpha)  # log-probabilities only fall
    full = jnp.isfinite(ended_score).all(axis=1)
    done = full | (ended_score[:, 0] >= reach)
    new = Beam(
        beam.index + 1,
        _pick(grown, order),
        score,
        _pick(origin, order).astype(jnp.int32),
        ended,
        ended_score,
        beam.live & ~done,
        beam.cache,
    )
    keep = ("tokens", "score", "origin", "ended", "ended_score")
    held = {name: _where(beam.live, getattr(new, name), getattr(beam, name)) for name in keep}
    return new._replace(**held)


def _where(rows: Bool[Array, " B"], a: Array, b: Array) -> Array:
    return jnp.where(rows.reshape(-1, *[1] * (a.ndim - 1)), a, b)


def _pick(a: Array, which: Int[Array, "B W"]) -> Array:
    """Hypotheses `which` of each row of `[B X ...]`."""
    return jnp.take_along_axis(a, which.reshape(*which.shape, *[1] * (a.ndim - 2)), axis=1)
