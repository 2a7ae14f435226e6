"""Dispatch in chunks of tokens, one after another, so that buffers hold the rows of one chunk."""

from typing import Any

import jax
from jaxtyping import Array, Float

from moe.dispatch.types import Dispatch, Dispatched, ExpertFn
from moe.errors import ConfigError
from moe.routing.types import Choices


def in_chunks(path: Dispatch, chunks: int, unit: int | None = 1) -> Dispatch:
    """`path` on `chunks` equal parts of the tokens that it is given, in a loop.

    The backward pass keeps the tokens of each chunk and repeats its dispatch, exchange and experts,
    because a loop that kept them would hold the buffers of all chunks at once.

    Args:
      path: takes `Choices`.
      chunks: 1 is `path` itself.
      unit: neighbouring positions that stay together; None keeps whole rows.
    """
    if chunks == 1:
        return path

    def dispatch(
        x: Float[Array, "B S D"], choices: Choices, params: Any, expert_fn: ExpertFn
    ) -> Dispatched:
        B, S, _ = x.shape
        size = S if unit is None else min(unit, S)
        if B * S % (size * chunks):
            raise ConfigError(
                f"dispatch.chunks={chunks} does not divide the {B * S // size} "
                f"{'tokens' if size == 1 else f'token groups of {size} positions'} that a device holds "
                f"({B} rows of {S} positions): chunks have the same size. Use a divisor of "
                f"{B * S // size}."
            )

        def split(a: Array) -> Array:
            return a.reshape(chunks, -1, size, *a.shape[2:])

        @jax.checkpoint
        def one(params: Any, x: Array, choices: Choices) -> Dispatched:
            return path(x, choices, params, expert_fn)

        def step(_: None, part: tuple[Array, Choices]) -> tuple[None, Dispatched]:
            return None, one(params, *part)

        _, out = jax.lax.scan(step, None, (split(x), Choices(*map(split, choices))))
        return Dispatched(out.output.reshape(x.shape), out.kept.reshape(choices.valid.shape))

    return dispatch
