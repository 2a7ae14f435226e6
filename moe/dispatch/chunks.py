"""Dispatch in chunks of tokens, one after another, so that buffers hold the rows of one chunk."""

import math
from typing import Any

import jax
from jaxtyping import Array, Float

from moe.dispatch.types import Dispatch, Dispatched, ExpertFn
from moe.routing.types import Choices


def in_chunks(path: Dispatch, chunks: int, unit: int | None = 1) -> Dispatch:
    """`path` on equal parts of the tokens that it is given, in a loop.

    The backward pass keeps the tokens of each chunk and repeats its dispatch, exchange and experts,
    because a loop that kept them would hold the buffers of all chunks at once.

    Args:
      path: takes `Choices`.
      chunks: how many; where that does not divide the tokens (in generation there are few), the
        largest number that divides both. 1 is `path` itself.
      unit: neighbouring positions that stay together; None keeps whole rows.
    """
    if chunks == 1:
        return path

    def dispatch(
        x: Float[Array, "B S D"], choices: Choices, params: Any, expert_fn: ExpertFn
    ) -> Dispatched:
        B, S, _ = x.shape
        size = S if unit is None else min(unit, S)
        parts = math.gcd(chunks, B * S // size)

        def split(a: Array) -> Array:
            return a.reshape(parts, -1, size, *a.shape[2:])

        @jax.checkpoint
        def one(params: Any, x: Array, choices: Choices) -> Dispatched:
            return path(x, choices, params, expert_fn)

        def step(_: None, part: tuple[Array, Choices]) -> tuple[None, Dispatched]:
            return None, one(params, *part)

        _, out = jax.lax.scan(step, None, (split(x), Choices(*map(split, choices))))
        return Dispatched(out.output.reshape(x.shape), out.kept.reshape(choices.valid.shape))

    return dispatch
