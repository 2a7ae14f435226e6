"""One optimiser step: a pure function of state, batch, key and traced numbers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree
import optax

from moe.data.types import Batch
from moe.dispatch.types import Dispatch
from moe.model.layer import Call
from moe.model.transformer import ModelSpec
from moe.parallel.rules import constrain_batch
from moe.routing import losses, metrics
from moe.routing.table import ROUTERS
from moe.routing.types import LayerReport
from moe.training import optimizer as optimizer_lib
from moe.training.objective import RowSums, forward_rows
from moe.training.state import Skeleton, TrainState


class Hyper(NamedTuple):
    """Numbers that a sweep may change without compiling again."""

    learning_rate: Float[Array, ""] | float
    weight_decay: Float[Array, ""] | float
    clip_norm: Float[Array, ""] | float
    balance: Float[Array, ""] | float
    sequence_balance: Float[Array, ""] | float
    z: Float[Array, ""] | float
    jitter: Float[Array, ""] | float
    dropout: Float[Array, ""] | float
    update_options: dict[str, Float[Array, ""] | float]  # of the router's state update


class StepMetrics(NamedTuple):
    """What one step tells; sums over the global batch before the update."""

    rows: RowSums  # summed over rows: scalars
    losses: dict[str, Float[Array, ""]]
    learning_rate: Float[Array, ""]
    grad_norm: Float[Array, ""]
    totals: metrics.Totals | None  # None for a dense model


class Scale(NamedTuple):
    """What makes the losses of microbatches add up to the loss of the batch."""

    tokens: Float[Array, ""]  # valid tokens of the global batch
    rows: Float[Array, ""]  # rows with a valid token of the global batch
    counts: Float[Array, "L E"] | None  # global choice counts; None: those of the microbatch


class Aux(NamedTuple):
    """Of one microbatch, beside its loss."""

    rows: RowSums
    losses: dict[str, Float[Array, ""]]
    totals: metrics.Totals | None


TrainStep = Callable[[TrainState, Batch, Key[Array, ""], Hyper], tuple[TrainState, StepMetrics]]


def make_train_step(
    spec: ModelSpec,
    skeleton: Skeleton,
    dispatch: Dispatch,
    transformation: optax.GradientTransformation,
    schedule: optax.Schedule,
    decay: PyTree,
    token_bytes: Int[Array, " V"],
    *,
    balance_scope: str,
    accumulation: int,
) -> TrainStep:
    """Builds the step; jit it with donated state.

    Args:
        spec: shape of the model.
        skeleton: the model without its numbers.
        dispatch: how tokens reach experts in training.
        transformation: `optimizer.adam(...)`.
        schedule: fraction of the peak learning rate by step.
        decay: which parameters decay.
        token_bytes: bytes that each token id stands for.
        balance_scope: scope of the balance loss, see `losses.balance_loss`.
        accumulation: microbatches; row `i` of the batch goes to microbatch `i % accumulation`, so that
            no row leaves its device.

    Returns:
        `(state, batch, key, hyper) -> (state, metrics)`. `key` is the run's root key: the step folds in
        its number. With scope "global" and more than one microbatch, a forward pass over all of them
        collects the counts first, so that the loss is exactly that of the undivided batch.
    """
    learned = spec.sparse_layers > 0 and ROUTERS[spec.router.name].learned
    two_passes = learned and balance_scope == "global" and accumulation > 1

    def call(batch: Batch, key: Key[Array, ""], hyper: Hyper) -> Call:
        dropout = hyper.dropout if spec.dropout > 0 else None
        return Call(batch.tokens, batch.valid, dispatch, hyper.jitter, dropout, key)

    def microbatch_loss(
        params: Any, router: Any, batch: Batch, key: Key[Array, ""], hyper: Hyper, scale: Scale
    ) -> tuple[Float[Array, ""], Aux]:
        rows, report = forward_rows(
            skeleton, params, router, batch, call(batch, key, hyper), token_bytes
        )
        terms = {"cross_entropy": rows.nll.sum() / scale.tokens}
        if report is not None and learned:
            terms |= routing_terms(report, balance_scope, scale)
        total = weigh(terms, hyper)
        totals = None if report is None else metrics.totals(report)
        return total, Aux(jax.tree.map(jnp.sum, rows), {**terms, "total": total}, totals)

    def counts_of(params: Any, router: Any, batch: Batch, key: Key[Array, ""], hyper: Hyper):
        _, report = forward_rows(
            skeleton, params, router, batch, call(batch, key, hyper), token_bytes
        )
        assert report is not None
        return report.row_requested.sum(axis=1)

    def gradients(state: TrainState, batch: Batch, key: Key[Array, ""], hyper: Hyper):
        """Gradient and sums over the batch, microbatch by microbatch."""
        tokens = batch.valid.sum().astype(jnp.float32)
        rows = batch.valid.any(axis=1).sum().astype(jnp.float32)
        scale = Scale(jnp.maximum(tokens, 1.0), rows, None)
        grad = jax.value_and_grad(microbatch_loss, has_aux=True)
        if accumulation == 1:
            (_, aux), grads = grad(state.params, state.router, batch, key, hyper, scale)
            return grads, aux
        parts = jax.tree.map(lambda a: _split(a, accumulation), batch)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(accumulation))
        if two_passes:
            each = lambda part: counts_of(state.params, state.router, part[0], part[1], hyper)  # noqa: E731
            scale = scale._replace(counts=jax.lax.map(each, (parts, keys)).sum(axis=0))

        def add(carry: tuple, part: tuple) -> tuple[tuple, None]:
            (_, aux), grads = grad(state.params, state.router, part[0], part[1], hyper, scale)
            summed = jax.tree.map(jnp.add, carry[0], grads)
            return (summed, add_aux(carry[1], aux)), None

        shapes = jax.eval_shape(
            lambda: grad(
                state.params,
                state.router,
                jax.tree.map(lambda a: a[0], parts),
                keys[0],
                hyper,
                scale,
            )
        )
        (_, aux_shape), grads_shape = shapes
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (grads_shape, aux_shape))
        (grads, aux), _ = jax.lax.scan(add, zeros, (parts, keys))
        return grads, aux

    def step(
        state: TrainState, batch: Batch, key: Key[Array, ""], hyper: Hyper
    ) -> tuple[TrainState, StepMetrics]:
        grads, aux = gradients(state, batch, jax.random.fold_in(key, state.step), hyper)
        fraction = optimizer_lib.step_fraction(schedule, state.step)
        new = optimizer_lib.update(
            transformation,
            grads,
            state.params,
            state.optimizer,
            decay=decay,
            fraction=fraction,
            learning_rate=hyper.learning_rate,
            weight_decay=hyper.weight_decay,
            clip_norm=hyper.clip_norm,
        )
        router = update_router(spec, state.router, aux.totals, hyper.update_options)
        told = StepMetrics(aux.rows, aux.losses, new.learning_rate, new.grad_norm, aux.totals)
        return TrainState(state.step + 1, new.params, router, new.optimizer), told

    return step


def routing_terms(report: LayerReport, scope: str, scale: Scale) -> dict[str, Float[Array, ""]]:
    """The unweighted routing losses of a learned router.

    Always all of them, so that what is logged does not depend on the weights.
    """
    return {
        "balance": losses.balance_loss(
            report,
            scope,
            total_tokens=scale.tokens,
            global_counts=scale.counts,
        ),
        "sequence_balance": losses.sequence_balance_loss(report, total_rows=scale.rows),
        "z": losses.z_loss(report, total_tokens=scale.tokens),
    }


def weigh(terms: dict[str, Float[Array, ""]], hyper: Hyper) -> Float[Array, ""]:
    """Total loss: cross-entropy plus every routing term times its weight."""
    weights = hyper._asdict()
    return sum(
        (value if name == "cross_entropy" else weights[name] * value)
        for name, value in terms.items()
    )


def add_aux(a: Aux, b: Aux) -> Aux:
    """Sums of two microbatches."""
    totals = None if a.totals is None or b.totals is None else metrics.add(a.totals, b.totals)
    rows, terms = jax.tree.map(jnp.add, (a.rows, a.losses), (b.rows, b.losses))
    return Aux(rows, terms, totals)


def _split(a: Array, parts: int) -> Array:
    """`[B ...] -> [parts B/parts ...]`, every parts-th row in one part."""
    rows = a.reshape(a.shape[0] // parts, parts, *a.shape[1:])
    return jax.vmap(constrain_batch)(rows.swapaxes(0, 1))


def update_router(
    spec: ModelSpec, router: Any, totals: metrics.Totals | None, options: dict[str, Any]
) -> Any:
    """State of every sparse layer after the step, from the counts of the global batch."""
    row = ROUTERS[spec.router.name]
    if totals is None or not row.stateful:
        return router
    sparse = [i for i, kind in enumerate(spec.pattern) if kind == "sparse"]
    counts = totals.requested.reshape(spec.repeats, len(sparse), -1)
    blocks = dict(router["blocks"])
    for j, i in enumerate(sparse):
        layer = blocks[f"layer{i}"]
        state = row.update_state(layer["mlp"]["state"], counts[:, j], **options)
        blocks[f"layer{i}"] = {**layer, "mlp": {**layer["mlp"], "state": state}}
    return {**router, "blocks": blocks}
