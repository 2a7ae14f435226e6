"""Exchange of exactly the rows that are needed, into a buffer of a size that is chosen beforehand.

At balance a shard sends `N * (n - 1) / n` of its `N` rows, and gets back as many.
"""

import math
from typing import Any

from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe.dispatch.edges import combine, spread
from moe.dispatch.exchange import (
    Axes,
    arrived_edges,
    cut_counts,
    kept_rows,
    run_arrived,
    to_experts,
)
from moe.dispatch.grouped import sorted_edges
from moe.dispatch.transfer import Transfer, back, move
from moe.dispatch.types import Dispatched, ExpertFn, num_experts
from moe.routing.types import Choices


def ragged_exchange(
    x: Float[Array, "B S D"],
    choices: Choices,
    params: Any,
    expert_fn: ExpertFn,
    *,
    axes: Axes,
    backend: str,
    buffer_factor: float | None,
    is_native: bool,
) -> Dispatched:
    """`grouped` with the experts of one shard in `params`; drops what does not fit the buffer.

    A shard whose experts are asked for more rows than its buffer has takes the same share of the rows
    of every sender, from the front of the sender's rows for it, sorted by expert and then by token.

    Args:
      x: tokens of this shard.
      choices: who goes where, by numbers of all experts.
      params: the experts of this shard.
      expert_fn: what one expert does to its rows.
      axes: that the experts lie on.
      backend: of the grouped product.
      buffer_factor: rows that a shard can receive, relative to the `N = B * S * K` that it receives
        at balance; None: all that can come, `n * N`.
      is_native: whether the platform has a ragged all-to-all.
    """
    B, S, D = x.shape
    n = lax.axis_size(axes)
    edges, sizes = sorted_edges(choices, num_experts(params) * n)
    N = edges.source.shape[0]
    R = n * N if buffer_factor is None else min(math.ceil(buffer_factor * N), n * N)
    counts = sizes.reshape(n, -1)
    asked = lax.all_gather(counts.sum(1), axes)  # [n n], rows of sender i for shard j
    given = share(asked, R)
    me = lax.axis_index(axes)
    transfer = plan_transfer(asked, given, me)

    kept = kept_rows(edges, asked[me], given[me])
    edges = edges._replace(kept=kept)
    rows = move(spread(x.reshape(B * S, D), edges), R, transfer, axes, is_native=is_native)
    counts = to_experts(cut_counts(counts, given[me]), axes)
    flat = counts.reshape(-1)
    starts = (jnp.cumsum(flat) - flat).reshape(counts.shape)
    arrived = arrived_edges(counts, starts, R)
    outputs = run_arrived(rows, arrived, params, expert_fn, backend)
    outputs = move(outputs, N, back(transfer), axes, is_native=is_native)
    y = combine(outputs, choices.gate.reshape(B * S, -1), edges)
    return Dispatched(y.reshape(B, S, D), kept.reshape(choices.valid.shape))


def share(asked: Int[Array, "n n"], R: int) -> Int[Array, "n n"]:
    """Rows of sender `i` that shard `j` takes: all, or of every sender's the share that fits `R`."""
    total = asked.sum(0)
    ratio = R / jnp.maximum(total, 1).astype(jnp.float32)
    part = jnp.floor(asked * ratio[None]).astype(asked.dtype)
    return jnp.where((total <= R)[None], asked, part)


def plan_transfer(
    asked: Int[Array, "n n"], given: Int[Array, "n n"], me: Int[Array, ""]
) -> Transfer:
    """What shard `me` must know: senders keep room for what they asked, receivers for what they take."""
    begins = jnp.cumsum(asked, axis=1) - asked
    lands = jnp.cumsum(given, axis=0) - given
    return Transfer(
        input_offsets=begins[me],
        send_sizes=given[me],
        output_offsets=lands[me],
        recv_sizes=given[:, me],
        arrival_offsets=lands[:, me],
        origin_offsets=begins[:, me],
    )
