"""One forward pass over a batch, reduced to sums over each row; training and evaluation share it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import optax

from moe.data.types import Batch
from moe.model.layer import Call
from moe.model.transformer import ModelOutput
from moe.routing.types import LayerReport
from moe.training.ctc import ctc_matches, ctc_rows
from moe.training.state import Skeleton, bind


class RowSums(NamedTuple):
    """Sums over the predictions of each row; over all rows or a domain's in what is made of them."""

    nll: Float[Any, "*B"]  # negative log-likelihood, nats; differentiable
    correct: Float[Any, "*B"]  # predictions whose most likely value is the target
    tokens: Float[Any, "*B"]  # predictions
    bytes: Float[Any, "*B"]  # UTF-8 bytes that the targets stand for


class Forward(NamedTuple):
    """What one forward pass tells of a batch."""

    rows: RowSums
    reports: LayerReport | None  # None for a dense model
    terms: dict[str, Float[Array, "B S"]]  # of the layers themselves, mean over layers
    nll: Float[Array, "B S"]  # of each token, 0 at padding; of rows the row's, at every token
    logits: Float[Array, "B *S V"] | None  # None of pairs
    pair: Float[Array, "B 2 D"] | None = None
    path: Int[Array, "B S"] | None = None  # the most likely id of each position, of alignments


def forward(
    skeleton: Skeleton,
    params: Any,
    router: Any,
    batch: Batch,
    call: Call,
    token_bytes: Int[Array, " V"],
    passes: int = 1,
) -> Forward:
    """Predicts what the task scores of a batch: tokens, labels of rows, alignments, or pairs.

    Args:
        skeleton: the model without its numbers.
        params: pure dict of parameters.
        router: pure dict of router state.
        batch: packed rows.
        call: dispatch and noise; its tokens and mask are those of the batch, and the rest of the batch
            goes in here.
        token_bytes: bytes that each id stands for.
        passes: how many draws of the routers to average the probabilities of, as an ensemble; the
            reports are those of the first.
    """
    model = bind(skeleton, params, router)
    call = call._replace(modality=batch.modality, prefix=batch.prefix, frames=batch.frames)
    out = model(batch.positions, batch.segments, call)
    if out.pair is not None:
        assert out.scale is not None
        rows, nll = _paired(out.pair, out.scale, batch)
        return Forward(rows, out.reports, out.terms, nll, None, out.pair)
    logits = out.logits
    assert logits is not None
    if passes > 1:
        logits = _averaged(lambda call: model(batch.positions, batch.segments, call), call, passes)
    path = None
    if logits.ndim == 2:
        rows, nll = _classified(logits, batch)
    elif model.spec.blank is not None:
        path = logits.argmax(axis=-1).astype(jnp.int32)
        rows, nll = _aligned(logits, path, batch, model.spec.blank)
    else:
        rows, nll = _predicted(logits, batch, token_bytes)
    return Forward(rows, out.reports, out.terms, nll, logits, path=path)


def predictions(batch: Batch, output: str) -> Float[Array, ""]:
    """How many predictions the cross-entropy of a batch is a mean over.

    Args:
        batch: global.
        output: of the `ModelSpec`; rows where it speaks of whole rows, else scored targets.
    """
    counted = batch.valid.any(axis=1) if output in ("classes", "pair") else _scored(batch)
    return counted.sum().astype(jnp.float32)


def _scored(batch: Batch) -> Bool[Array, "B S"]:
    return batch.valid if batch.scored is None else batch.scored


def _averaged(
    run: Callable[[Call], ModelOutput], call: Call, passes: int
) -> Float[Array, "B *S V"]:
    """Logarithm of the mean probabilities over passes; the first has the key of `call` itself."""
    key = call.key
    assert key is not None
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(1, passes))

    def predicted(key: Array) -> Float[Array, "B *S V"]:
        logits = run(call._replace(key=key)).logits
        assert logits is not None
        return jax.nn.log_softmax(logits)

    def add(total: Array, key: Array) -> tuple[Array, None]:
        return jnp.logaddexp(total, predicted(key)), None

    total = jax.lax.scan(add, predicted(key), keys)[0]
    return total - jnp.log(float(passes))


def _predicted(
    logits: Float[Array, "B S V"], batch: Batch, token_bytes: Int[Array, " V"]
) -> tuple[RowSums, Float[Array, "B S"]]:
    scored = _scored(batch)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    nll = jnp.where(scored, nll, 0.0)
    hit = logits.argmax(axis=-1) == batch.targets
    sizes = token_bytes[batch.targets]
    rows = RowSums(
        nll.sum(axis=1),
        jnp.where(scored, hit, 0).sum(axis=1).astype(jnp.float32),
        scored.sum(axis=1).astype(jnp.float32),
        jnp.where(scored, sizes, 0).sum(axis=1).astype(jnp.float32),
    )
    return rows, nll


def _classified(logits: Float[Array, "B M"], batch: Batch) -> tuple[RowSums, Float[Array, "B S"]]:
    """One prediction a row: its label, or its domain where it has none."""
    label = batch.domain if batch.label is None else batch.label
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    return _of_rows(nll, logits.argmax(axis=-1) == label, batch)


def _paired(
    pair: Float[Array, "B 2 D"], scale: Float[Array, ""], batch: Batch
) -> tuple[RowSums, Float[Array, "B S"]]:
    """Which of the batch's rows each half belongs to, both ways (Radford et al. 2021, arXiv:2103.00020).

    A hit is a first half whose own second half is the nearest.
    """
    seen = batch.valid.any(axis=1)
    similarity = scale * pair[:, 0] @ pair[:, 1].T  # [B B]
    similarity = jnp.where(seen[:, None] & seen[None, :], similarity, -1e9)
    own = jnp.arange(similarity.shape[0])
    there = optax.softmax_cross_entropy_with_integer_labels(similarity, own)
    back = optax.softmax_cross_entropy_with_integer_labels(similarity.T, own)
    return _of_rows((there + back) / 2, similarity.argmax(axis=1) == own, batch)


def _of_rows(
    nll: Float[Array, " B"], hit: Bool[Array, " B"], batch: Batch
) -> tuple[RowSums, Float[Array, "B S"]]:
    """One prediction a row; it has no bytes."""
    seen = batch.valid.any(axis=1)
    nll = jnp.where(seen, nll, 0.0)
    count = seen.astype(jnp.float32)
    rows = RowSums(nll, (hit & seen).astype(jnp.float32), count, jnp.zeros_like(count))
    return rows, jnp.where(batch.valid, nll[:, None], 0.0)


def _aligned(
    logits: Float[Array, "B S V"], path: Int[Array, "B S"], batch: Batch, blank: int
) -> tuple[RowSums, Float[Array, "B S"]]:
    """Labels of a row, over all ways to align them with its positions; a hit is a whole row."""
    labels = _scored(batch)
    nll = ctc_rows(logits, batch, blank=blank)
    count = labels.sum(axis=1).astype(jnp.float32)
    right = ctc_matches(path, batch, blank=blank)
    rows = RowSums(nll, jnp.where(right, count, 0.0), count, jnp.zeros_like(count))
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
