"""Exchange by gathering tokens: every shard gets all of them and runs its own experts on those that name them.

The outputs are summed and scattered back. Tokens travel once whatever `K` is, and in fewer steps than
an all-to-all: for few tokens, or where there are no more shards than choices a token.
"""

from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Float

from moe.dispatch.capacity import Seated, Seating, run_seated, take_seats
from moe.dispatch.exchange import Axes
from moe.dispatch.grouped import grouped
from moe.dispatch.types import Dispatched, ExpertFn, num_experts
from moe.routing.types import Choices


def grouped_gather(
    x: Float[Array, "B S D"],
    choices: Choices,
    params: Any,
    expert_fn: ExpertFn,
    *,
    axes: Axes,
    backend: str,
) -> Dispatched:
    """`grouped` with the experts of one shard in `params`; arguments as for `grouped_exchange`."""
    everyone = own_choices(gather(choices, axes), num_experts(params), axes)
    out = grouped(gather(x, axes), everyone, params, expert_fn, backend=backend)
    return Dispatched(scatter(out.output, axes), choices.valid)


def capacity_gather(
    x: Float[Array, "B S D"],
    choices: Choices,
    params: Any,
    expert_fn: ExpertFn,
    *,
    axes: Axes,
    **seating: Any,
) -> Dispatched:
    """`capacity` with the experts of one shard in `params`; arguments as for `capacity_exchange`.

    Slots are handed out before tokens travel, so that no shard repeats the work of another.
    """
    e = num_experts(params)
    seated, C = take_seats(choices, e * lax.axis_size(axes), Seating(**seating))
    everyone = own_choices(gather(seated.choices, axes), e, axes)
    everyone = Seated(everyone, gather(seated.position, axes))
    output = run_seated(gather(x, axes), everyone, C, params, expert_fn)
    return Dispatched(scatter(output, axes), seated.choices.valid.reshape(choices.valid.shape))


def gather(tree: Any, axes: Axes) -> Any:
    """The parts of all shards, joined along the leading axis."""
    return jax.tree.map(lambda a: lax.all_gather(a, axes, tiled=True), tree)


def scatter(output: Float[Array, "nB S D"], axes: Axes) -> Float[Array, "B S D"]:
    """This shard's part of the sum over all shards."""
    return lax.psum_scatter(output, axes, tiled=True)


def own_choices(choices: Choices, e: int, axes: Axes) -> Choices:
    """The choices that name one of the `e` experts of this shard, by their numbers here."""
    expert = choices.expert - e * lax.axis_index(axes)
    return choices._replace(
        expert=expert.clip(0, e - 1), valid=choices.valid & (expert >= 0) & (expert < e)
    )
