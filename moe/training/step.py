"""One optimiser step: a pure function of state, batch, key and traced numbers."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree
import optax

from moe.data.types import Batch
from moe.dispatch.types import Dispatch
from moe.errors import ConfigError
from moe.model.layer import Call
from moe.model.spec import ModelSpec
from moe.parallel.rules import constrain_batch
from moe.routing import metrics
from moe.routing.consistency import consistency
from moe.routing.loss_table import Active, check_terms, compute
from moe.routing.losses import counted
from moe.routing.router import pick_inputs
from moe.routing.table import ROUTERS
from moe.routing.types import Scalar
from moe.training import guards
from moe.training import optimizer as optimizer_lib
from moe.training.guards import GuardState
from moe.training.objective import Forward, RowSums, forward, forward_rows, predictions
from moe.training.state import Skeleton, TrainState

TWIN = 1 << 20  # folded into the key of a second pass; no microbatch has that number


class Hyper(NamedTuple):
    """Numbers that a sweep may change without compiling again."""

    learning_rate: Scalar
    weight_decay: Scalar
    clip_norm: Scalar
    losses: dict[str, Scalar]  # weights, by name of the loss
    jitter: Scalar
    dropout: Scalar
    update_options: dict[str, Any]  # of the router's state update
    spike_sigmas: Scalar  # above the mean of recent losses; read where `Plan.spikes`
    spikes: Scalar  # in a row after which nothing is learned until the run goes back; as above


class StepMetrics(NamedTuple):
    """What one step tells; sums over the global batch before the update."""

    rows: RowSums  # summed over rows: scalars
    losses: dict[str, Float[Array, ""]]
    learning_rate: Float[Array, ""]
    grad_norm: Float[Array, ""]
    totals: metrics.Totals | None  # None for a dense model
    guard: GuardState  # after the step
    update_applied: Bool[Array, ""]  # False: nothing was learned from this batch


class Scale(NamedTuple):
    """What makes the losses of microbatches add up to the loss of the batch."""

    tokens: Float[Array, ""]  # valid tokens of the global batch
    predictions: Float[Array, ""]  # what the cross-entropy is a mean over: tokens, or rows
    rows: Float[Array, ""]  # rows with a valid token of the global batch
    counts: Float[Array, "L E"] | None  # global choice counts; None: those of the microbatch


class Aux(NamedTuple):
    """Of one microbatch, beside its loss."""

    rows: RowSums
    losses: dict[str, Float[Array, ""]]
    totals: metrics.Totals | None


class Plan(NamedTuple):
    """What a step is compiled for."""

    spec: ModelSpec
    skeleton: Skeleton
    dispatch: Dispatch  # how tokens reach experts in training
    transformation: optax.GradientTransformation  # `optimizer.adam(...)`
    schedule: optax.Schedule  # fraction of the peak learning rate by step
    decay: PyTree  # which parameters decay
    token_bytes: Int[Array, " V"]  # bytes that each token id stands for
    losses: tuple[Active, ...]  # on routing, see `loss_table.active_losses`
    accumulation: int  # microbatches
    jitter: bool  # whether the gate's input is noisy at all
    spikes: bool  # whether a loss far above the recent ones is skipped

    @property
    def counted(self) -> str | None:
        """What the balance loss counts over the whole step before the microbatches; None: nothing."""
        options = next((dict(a.options) for a in self.losses if a.name == "balance"), {})
        return options["counts"] if options.get("scope") == "global" else None


TrainStep = Callable[[TrainState, Batch, Key[Array, ""], Hyper], tuple[TrainState, StepMetrics]]


def train_step(
    plan: Plan, state: TrainState, batch: Batch, key: Key[Array, ""], hyper: Hyper
) -> tuple[TrainState, StepMetrics]:
    """One optimiser step; bind `plan`, then jit with donated state.

    Args:
        plan: static.
        state: before the step.
        batch: the global batch.
        key: the run's root key; the step folds in its number.
        hyper: traced numbers.

    Returns:
        The state after the step, and what was measured before the update.
    """
    found = gradients(plan, state, batch, jax.random.fold_in(key, state.step), hyper)
    # Gradients are finished before anything reads them: their bits do not depend on what the guards ask.
    grads, aux = jax.lax.optimization_barrier(found)
    update = partial(
        optimizer_lib.update,
        plan.transformation,
        grads,
        state.params,
        state.optimizer,
        decay=plan.decay,
        fraction=optimizer_lib.step_fraction(plan.schedule, state.step),
        learning_rate=hyper.learning_rate,
        weight_decay=hyper.weight_decay,
        clip_norm=hyper.clip_norm,
        norm=optax.tree.norm(grads),
    )
    trial, cost = update(), aux.losses["cross_entropy"]
    router = update_router(plan.spec, state.router, aux.totals, cost, hyper.update_options)
    # Moments are sums of finite numbers: squares of gradients are no larger than that of their norm.
    finite = guards.all_finite((aux.losses, trial.grad_norm, trial.params, router))
    spike = plan.spikes & guards.is_spike(
        state.guard, cost, finite, hyper.spike_sigmas, hyper.spikes
    )
    guard, applied = guards.advance(state.guard, cost, finite, spike), finite & ~spike

    def learn() -> tuple[PyTree, optax.OptState]:
        new = update()
        return new.params, new.optimizer

    # The trial is only reduced to one bool, and the update is made again, in place: to keep both the
    # old and the new numbers until the bool is there takes their memory and five times as long.
    params, optimizer = jax.lax.cond(applied, learn, lambda: (state.params, state.optimizer))
    router = guards.keep(applied, router, state.router)
    told = StepMetrics(
        aux.rows, aux.losses, trial.learning_rate, trial.grad_norm, aux.totals, guard, applied
    )
    return TrainState(state.step + 1, params, router, optimizer, guard), told


def gradients(
    plan: Plan, state: TrainState, batch: Batch, key: Key[Array, ""], hyper: Hyper
) -> tuple[PyTree, Aux]:
    """Gradient of the loss of the whole batch, microbatch by microbatch.

    Row `i` belongs to microbatch `i % accumulation`, so that no row leaves its device. With the
    balance scope "global" a forward pass over all microbatches collects the counts first: the loss
    is then exactly that of the undivided batch, for a third more compute.
    """
    tokens = batch.valid.sum().astype(jnp.float32)
    rows = batch.valid.any(axis=1).sum().astype(jnp.float32)
    count = predictions(batch, plan.spec.output)
    scale = Scale(jnp.maximum(tokens, 1.0), jnp.maximum(count, 1.0), rows, None)
    grad = jax.value_and_grad(partial(microbatch_loss, plan), has_aux=True)
    if plan.accumulation == 1:
        (_, aux), grads = grad(state.params, state.router, batch, key, hyper, scale)
        return grads, aux
    parts = jax.tree.map(lambda a: _split(a, plan.accumulation), batch)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(plan.accumulation))
    if plan.counted is not None:
        scale = scale._replace(counts=_global_counts(plan, state, parts, keys, hyper))

    def one(part: tuple[Batch, Key[Array, ""]]) -> tuple[PyTree, Aux]:
        (_, aux), grads = grad(state.params, state.router, part[0], part[1], hyper, scale)
        return grads, aux

    def add(carry: tuple[PyTree, Aux], part: tuple) -> tuple[tuple[PyTree, Aux], None]:
        grads, aux = one(part)
        return (jax.tree.map(jnp.add, carry[0], grads), add_aux(carry[1], aux)), None

    shapes = jax.eval_shape(one, jax.tree.map(lambda a: a[0], (parts, keys)))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, (parts, keys))[0]


def microbatch_loss(
    plan: Plan,
    params: PyTree,
    router: PyTree,
    batch: Batch,
    key: Key[Array, ""],
    hyper: Hyper,
    scale: Scale,
) -> tuple[Float[Array, ""], Aux]:
    """The part of one microbatch in the loss of the batch."""
    call = _call(plan, batch, key, hyper)
    done = forward(plan.skeleton, params, router, batch, call, plan.token_bytes)
    terms = {"cross_entropy": done.rows.nll.sum() / scale.predictions}
    inputs = loss_inputs(plan, done, batch, params, scale)
    if "consistency" in {active.name for active in plan.losses}:
        # A second pass, with draws of its own, to be held to the same predictions (THOR, R-Drop).
        twin = _call(plan, batch, jax.random.fold_in(key, TWIN), hyper)
        other = forward(plan.skeleton, params, router, batch, twin, plan.token_bytes)
        both = terms["cross_entropy"] + other.rows.nll.sum() / scale.predictions
        terms["cross_entropy"] = both / 2
        assert done.logits is not None
        assert other.logits is not None
        inputs["divergence"] = _divergence(done.logits, other.logits, batch)
    terms |= compute(plan.losses, inputs)
    total = weigh(terms, hyper.losses)
    totals = None if done.reports is None else metrics.totals(done.reports)
    return total, Aux(jax.tree.map(jnp.sum, done.rows), {**terms, "total": total}, totals)


def _call(plan: Plan, batch: Batch, key: Key[Array, ""], hyper: Hyper) -> Call:
    dropout = hyper.dropout if plan.spec.dropout > 0 else None
    jitter = hyper.jitter if plan.jitter else None
    return Call(batch.tokens, batch.valid, plan.dispatch, jitter, dropout, key, training=True)


def _global_counts(
    plan: Plan, state: TrainState, parts: Batch, keys: Key[Array, " A"], hyper: Hyper
) -> Float[Array, "L E"]:
    """Choices of every expert over all microbatches; the same noise as in the pass that follows."""

    def counts(part: tuple[Batch, Key[Array, ""]]) -> Float[Array, "L E"]:
        batch, key = part
        call = _call(plan, batch, key, hyper)
        _, report = forward_rows(
            plan.skeleton, state.params, state.router, batch, call, plan.token_bytes
        )
        assert report is not None
        assert plan.counted is not None
        return counted(report, plan.counted).sum(axis=1)

    return jax.lax.map(counts, (parts, keys)).sum(axis=0)


def loss_inputs(
    plan: Plan, done: Forward, batch: Batch, params: PyTree, scale: Scale
) -> dict[str, Any]:
    """What the losses of this microbatch may name; see `loss_table`.

    Raises:
        ConfigError: a loss with a weight that nothing reports the parts of.
    """
    inputs = {
        "total_tokens": scale.tokens,
        "total_rows": scale.rows,
        "global_counts": scale.counts,
        "k": plan.spec.router.k,
        "free": jnp.asarray(plan.spec.free_experts),
        "valid": batch.valid,
        "token_cost": jax.lax.stop_gradient(done.nll),
        "layer_terms": done.terms,
    }
    reported = set(done.terms)
    if done.reports is not None:
        inputs["report"] = done.reports
        reported |= {*done.reports.row_terms, *done.reports.token_terms}
    check_terms(plan.losses, reported, plan.spec.router.name)
    if {"simbal", "orthogonality"} & {active.name for active in plan.losses}:
        inputs["kernels"] = gate_kernels(plan.spec, params)
    return inputs


def gate_kernels(spec: ModelSpec, params: PyTree) -> Float[Array, "L D E"]:
    """The kernels of all gates, in the order of reports.

    Raises:
        ConfigError: gates of another form than one product.
    """
    gates = [params["blocks"][block][module]["gate"] for block, module in spec.sparse_names]
    if not all("kernel" in gate for gate in gates):
        raise ConfigError(
            f"losses.simbal and losses.orthogonality are about the columns of one gate kernel, and the "
            f"gate of router.name={spec.router.name!r} has none: set them to 0.0 or choose another router."
        )
    stacked = jnp.stack([gate["kernel"] for gate in gates], axis=1)  # [repeats, layers, D, E]
    return stacked.reshape(-1, *stacked.shape[2:])


def _divergence(a: Array, b: Array, batch: Batch) -> Float[Array, "B S"]:
    if a.ndim == 3:
        scored = batch.valid if batch.scored is None else batch.scored
        return consistency(a, b, scored)
    row = consistency(a[:, None], b[:, None], batch.valid.any(axis=1, keepdims=True))
    return jnp.where(batch.valid, row, 0.0)


def weigh(terms: dict[str, Float[Array, ""]], weights: dict[str, Scalar]) -> Float[Array, ""]:
    """Total loss: cross-entropy plus every other term times its weight."""
    total = terms["cross_entropy"]
    for name, value in terms.items():
        if name != "cross_entropy":
            total = total + weights[name] * value
    return total


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
    spec: ModelSpec,
    router: Any,
    totals: metrics.Totals | None,
    cost: Float[Array, ""],
    options: dict[str, Any],
) -> Any:
    """State of every sparse layer after the step, from the sums of the global batch.

    Args:
        spec: of the model.
        router: pure dict of router state.
        totals: sums of the global batch; None for a dense model.
        cost: mean cross-entropy of the batch, nats.
        options: of the router's `update_state`.
    """
    row = ROUTERS[spec.router.name]
    if totals is None or not row.stateful:
        return router
    names = spec.sparse_names
    inputs = {"counts": totals.requested, "tokens": totals.tokens, "stats": totals.terms}
    inputs = pick_inputs(row.update_state, inputs)
    by_turn = jax.tree.map(
        lambda a: jnp.asarray(a).reshape(spec.repeats, len(names), *a.shape[1:]), inputs
    )
    named = pick_inputs(row.update_state, {"cost": cost}) | options
    blocks = dict(router["blocks"])
    for j, (block, module) in enumerate(names):
        mine = jax.tree.map(lambda a: a[:, j], by_turn)  # noqa: B023 - used at once
        layer = blocks[block]
        state = row.update_state(layer[module]["state"], **mine, **named)
        blocks[block] = {**layer, module: {**layer[module], "state": state}}
    return {**router, "blocks": blocks}
