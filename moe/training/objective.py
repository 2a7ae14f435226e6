"""One forward pass over a batch, reduced to sums over each row; training and evaluation share it."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import optax

from moe.data.types import Batch
from moe.model.layer import Call
from moe.routing.types import LayerReport
from moe.training.state import Skeleton, bind


class RowSums(NamedTuple):
    """Sums over the valid tokens of each row; over all rows or a domain's in what is made of them."""

    nll: Float[Any, "*B"]  # negative log-likelihood, nats; differentiable
    correct: Float[Any, "*B"]  # tokens whose most likely prediction is the target
    tokens: Float[Any, "*B"]
    bytes: Float[Any, "*B"]  # UTF-8 bytes that the targets stand for


def forward_rows(
    skeleton: Skeleton,
    params: Any,
    router: Any,
    batch: Batch,
    call: Call,
    token_bytes: Int[Array, " V"],
) -> tuple[RowSums, LayerReport | None]:
    """Predicts every valid token of the batch.

    Args:
        skeleton: the model without its numbers.
        params: pure dict of parameters.
        router: pure dict of router state.
        batch: packed rows.
        call: dispatch and noise; its tokens and mask are those of the batch.
        token_bytes: bytes that each id stands for.

    Returns:
        Row sums, and the reports of the sparse layers (None for a dense model).
    """
    model = bind(skeleton, params, router)
    out = model(batch.positions, batch.segments, call)
    nll = optax.softmax_cross_entropy_with_integer_labels(out.logits, batch.targets)
    hit = out.logits.argmax(axis=-1) == batch.targets
    sizes = token_bytes[batch.targets]
    valid = batch.valid
    rows = RowSums(
        jnp.where(valid, nll, 0.0).sum(axis=1),
        jnp.where(valid, hit, 0).sum(axis=1).astype(jnp.float32),
        valid.sum(axis=1).astype(jnp.float32),
        jnp.where(valid, sizes, 0).sum(axis=1).astype(jnp.float32),
    )
    return rows, out.reports
