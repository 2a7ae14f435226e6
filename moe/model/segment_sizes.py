"""How long a segment is: a share of the text between a quarter and a half, learned, or cut by content.

A text of `n` tokens in segments of ceil(n/4) to floor(n/2) has 2 to 4 of them, so that four slots
do for every choice. In a causal model `n` must be the context length, which is known beforehand: the
length of the text itself tells where it ends.
"""

from fractions import Fraction

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from moe.errors import ConfigError

RATIOS = (1 / 4, 1 / 3, 1 / 2)  # what a learned size chooses from
MAX_SEGMENTS = 4
SIZES = ("fixed", "ratio", "learned", "content")


def size_bounds(length):
    """ceil(n/4) and floor(n/2) of an int or an int array, at least 1."""
    return _at_least(-(-length // 4), 1), _at_least(length // 2, 1)


def _at_least(value, low):
    return max(value, low) if isinstance(value, int) else jnp.maximum(value, low)


def ratio_size(length, ratio: float):
    """Tokens a segment: ceil(ratio * length), at least `ceil(length/4)` and at most `length // 2`.

    Args:
        length: `n`, an int or an int array, which may be traced.
        ratio: share of the text, from 1/4 to 1/2; taken as the fraction it stands for, so that
            a third of 99 is 33.
    """
    exact = Fraction(ratio).limit_denominator(1000)
    size = -(-length * exact.numerator // exact.denominator)
    low, high = size_bounds(length)
    capped = min(size, high) if isinstance(size, int) else jnp.minimum(size, high)
    return _at_least(capped, low)


def size_weights(
    logits: Float[Array, " R"], mixture: str, key: Key[Array, ""] | None = None
) -> Float[Array, " R"]:
    """Weights of the sizes to choose from; they sum to 1.

    Args:
        logits: learned, one for each size.
        mixture: "dense" is their softmax; "straight_through" is one size, the largest of logits and
            noise, with the gradient of the softmax (Jang et al. 2017, arXiv:1611.01144).
        key: draws Gumbel noise; None takes the logits as they are.
    """
    if key is not None and mixture == "straight_through":
        logits = logits + jax.random.gumbel(key, logits.shape)
    soft = jax.nn.softmax(logits)
    if mixture == "dense":
        return soft
    hard = jax.nn.one_hot(jnp.argmax(logits), logits.shape[0])
    return hard + soft - jax.lax.stop_gradient(soft)


def content_segments(x: Float[Array, "B S D"], valid: Bool[Array, "B S"]) -> Int[Array, "B S"]:
    """Cuts each text where neighbouring tokens differ most; needs the whole text (causality C3).

    Segments have ceil(n/4) to floor(n/2) tokens, the last one 1 to floor(n/2). Of all such cuts the one
    with the largest sum of (cosine distance across the cut - mean distance of the text) is found
    exactly: a further cut must be above the mean to be worth it. Time and memory `B S^2`.

    Args:
        x: tokens by their representation; no gradient reaches it.
        valid: the text, which starts at position 0; False after its end.

    Returns:
        The segment of each token, from 0; padding counts as the last.
    """
    length = valid.sum(axis=-1)  # [B]
    low, high = (bound[:, None] for bound in size_bounds(length))
    gain = _cut_gain(jax.lax.stop_gradient(x), valid)
    at = jnp.arange(x.shape[1])
    step = at[None, :, None] - at[None, None, :]  # [1 t u]: from a cut at u to the next at t
    near = (step >= low[..., None]) & (step <= high[..., None])
    score = jnp.broadcast_to(jnp.where(at == 0, 0.0, -jnp.inf), gain.shape)
    scores, previous = [], []
    for _ in range(MAX_SEGMENTS - 1):
        reach = jnp.where(near, score[:, None, :], -jnp.inf)
        previous.append(jnp.argmax(reach, axis=-1))
        score = gain + jnp.max(reach, axis=-1)
        scores.append(score)
    rest = length[:, None] - at[None, :]
    ends = (rest >= 1) & (rest <= high)
    final = jnp.stack([jnp.where(ends, score, -jnp.inf) for score in scores], axis=1)  # [B 3 S]
    cuts = _trace_back(final, previous)
    return jnp.sum(at[None, :, None] >= cuts[:, None, :], axis=-1)


def _cut_gain(x: Float[Array, "B S D"], valid: Bool[Array, "B S"]) -> Float[Array, "B S"]:
    """Cosine distance between each token and the one before it, less its mean; -inf at position 0."""
    x = x.astype(jnp.float32)
    unit = x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)
    distance = 1.0 - jnp.sum(unit[:, 1:] * unit[:, :-1], axis=-1)
    inside = valid[:, 1:]
    mean = jnp.sum(distance * inside, axis=-1) / jnp.maximum(inside.sum(axis=-1), 1)
    return jnp.pad(distance - mean[:, None], ((0, 0), (1, 0)), constant_values=-jnp.inf)


def _trace_back(final: Float[Array, "B C S"], previous: list[Array]) -> Int[Array, "B C"]:
    """Positions of the cuts of the best way; cuts that it does not make stand behind the end."""
    size = final.shape[2]
    flat = final.reshape(final.shape[0], -1)
    best = jnp.argmax(flat, axis=-1)
    possible = jnp.isfinite(jnp.max(flat, axis=-1))
    count, last = jnp.where(possible, best // size + 1, 0), best % size
    cuts = [jnp.full_like(last, size)] * len(previous)
    at = last
    for j in reversed(range(len(previous))):
        made = j < count
        cuts[j] = jnp.where(made, at, size)
        earlier = jnp.take_along_axis(previous[j], at[:, None], axis=-1)[:, 0]
        at = jnp.where(made, earlier, at)
    return jnp.stack(cuts, axis=-1)


def check_sizes(*, size: str, segment: int, ratio: float, mixture: str) -> None:
    """Raises ConfigError for an unknown way or an impossible length."""
    if size not in SIZES:
        raise ConfigError(f"size={size!r} is not a segment size; there are {', '.join(SIZES)}.")
    if size == "fixed" and segment < 1:
        raise ConfigError(f"segment={segment} must be at least 1: it is the tokens a segment.")
    if not 0.25 <= ratio <= 0.5:
        raise ConfigError(
            f"ratio={ratio} must be from 1/4 to 1/2: a segment is a quarter to a half of the text. "
            "For other lengths set size='fixed' and segment to the number of tokens."
        )
    if mixture not in ("dense", "straight_through"):
        raise ConfigError(
            f"mixture={mixture!r} must be 'dense', the weighted mean over all sizes, or "
            "'straight_through', one size."
        )
