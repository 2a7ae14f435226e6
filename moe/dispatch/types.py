"""What dispatch takes and returns: an expert function and a `Dispatched`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Bool, Float

Matmul = Callable[[Array, Array], Array]
"""`matmul(rows, weights [E X Y])`: each row times the matrix of its expert.

Rows come batched `[E n X]` or sorted by expert `[N X]`; the dispatch path supplies the function that
fits, so an expert is written once.
"""

ExpertFn = Callable[[Any, Array, Matmul], Array]
"""`expert_fn(params, rows [... D], matmul) -> [... D]`; every leaf of `params` leads with `E`.

Whatever is not a `matmul` must act on each row alone, because the order of rows and the number of
empty ones differ between the paths.
"""


class Dispatched(NamedTuple):
    """Tokens after the experts. Drops are the choices that are valid and not kept."""

    output: Float[Array, "B S D"]  # sum of gate * expert(token) over the kept choices
    kept: Bool[Array, "B X Y"]  # like the plan: [B S K], [B E C], [B S P] or [B M E]


def num_experts(params: Any) -> int:
    """The leading axis `E` shared by all leaves of `params`."""
    return jax.tree.leaves(params)[0].shape[0]


Dispatch = Callable[[Array, Any, Any, ExpertFn], Dispatched]
"""`dispatch(x [B S D], plan, params, expert_fn)`: moves tokens to experts and back.

A path takes one kind of plan, usually `Choices`; what `make_dispatch` returns takes every kind.
"""
