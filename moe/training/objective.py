"""One forward pass over a batch, reduced to sums over each row; training and evaluation share it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import optax

from moe.data.types import Batch
from moe.model.layer import Call
from moe.model.transformer import ModelOutput
from moe.routing.types import LayerReport
from moe.training.state import Skeleton, bind


class RowSums(NamedTuple):
    """Sums over the valid tokens of each row; over all rows or a domain's in what is made of them."""

    nll: Float[Any, "*B"]  # negative log-likelihood, nats; differentiable
    correct: Float[Any, "*B"]  # tokens whose most likely prediction is the target
    tokens: Float[Any, "*B"]
    bytes: Float[Any, "*B"]  # UTF-8 bytes that the targets stand for


class Forward(NamedTuple):
    """What one forward pass tells of a batch."""

    rows: RowSums
    reports: LayerReport | None  # None for a dense model
    terms: dict[str, Float[Array, "B S"]]  # of the layers themselves, mean over layers
    nll: Float[
        Array, "B S"
    ]  # of each token, 0 at padding; of a classifier the row's, at every token
    logits: Float[Array, "B *S V"]


def forward(
    skeleton: Skeleton,
    params: Any,
    router: Any,
    batch: Batch,
    call: Call,
    token_bytes: Int[Array, " V"],
    passes: int = 1,
) -> Forward:
    """Predicts every valid token of the batch; of a classifier, the domain of every row.

    Args:
        skeleton: the model without its numbers.
        params: pure dict of parameters.
        router: pure dict of router state.
        batch: packed rows.
        call: dispatch and noise; its tokens and mask are those of the batch.
        token_bytes: bytes that each id stands for.
        passes: how many draws of the routers to average the probabilities of, as an ensemble; the
            reports are those of the first.
    """
    model = bind(skeleton, params, router)
    out = model(batch.positions, batch.segments, call)
    logits = out.logits
    if passes > 1:
        logits = _averaged(lambda call: model(batch.positions, batch.segments, call), call, passes)
    if logits.ndim == 2:
        rows, nll = _classified(logits, batch)
    else:
        rows, nll = _predicted(logits, batch, token_bytes)
    return Forward(rows, out.reports, out.terms, nll, logits)


def _averaged(
    run: Callable[[Call], ModelOutput], call: Call, passes: int
) -> Float[Array, "B *S V"]:
    """Logarithm of the mean probabilities over passes; the first has the key of `call` itself."""
    key = call.key
    assert key is not None
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(1, passes))

    def add(total: Array, key: Array) -> tuple[Array, None]:
        return jnp.logaddexp(total, jax.nn.log_softmax(run(call._replace(key=key)).logits)), None

    total = jax.lax.scan(add, jax.nn.log_softmax(run(call).logits), keys)[0]
    return total - jnp.log(float(passes))


def _predicted(
    logits: Float[Array, "B S V"], batch: Batch, token_bytes: Int[Array, " V"]
) -> tuple[RowSums, Float[Array, "B S"]]:
    valid = batch.valid
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    nll = jnp.where(valid, nll, 0.0)
    hit = logits.argmax(axis=-1) == batch.targets
    sizes = token_bytes[batch.targets]
    rows = RowSums(
        nll.sum(axis=1),
        jnp.where(valid, hit, 0).sum(axis=1).astype(jnp.float32),
        valid.sum(axis=1).astype(jnp.float32),
        jnp.where(valid, sizes, 0).sum(axis=1).astype(jnp.float32),
    )
    return rows, nll


def _classified(logits: Float[Array, "B M"], batch: Batch) -> tuple[RowSums, Float[Array, "B S"]]:
    """One prediction a row; it has no bytes."""
    seen = batch.valid.any(axis=1)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch.domain)
    nll = jnp.where(seen, nll, 0.0)
    hit = (logits.argmax(axis=-1) == batch.domain) & seen
    count = seen.astype(jnp.float32)
    rows = RowSums(nll, hit.astype(jnp.float32), count, jnp.zeros_like(count))
    return rows, jnp.where(batch.valid, nll[:, None], 0.0)


def forward_rows(
    skeleton: Skeleton,
    params: Any,
    router: Any,
    batch: Batch,
    call: Call,
    token_bytes: Int[Array, " V"],
) -> tuple[RowSums, LayerReport | None]:
    """Row sums and the reports of the sparse layers; arguments as for `forward`."""
    done = forward(skeleton, params, router, batch, call, token_bytes)
    return done.rows, done.reports
