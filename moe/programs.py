"""The compiled programs of a run: training step, evaluation step, update of a prior."""

from collections.abc import Callable
from functools import partial

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree
import numpy as np

from moe import setup
from moe.data.router_valid import ROUTER_VALID
from moe.data.types import Batch
from moe.evaluation.causality import has_causal_gap
from moe.evaluation.evaluate import EvalStep, make_eval_step
from moe.parallel.feed import process_block, to_device
from moe.routing.loss_table import LOSSES, active_losses
from moe.routing.router import pick_options
from moe.routing.table import ROUTERS
from moe.training import optimizer as optimizer_lib
from moe.training.prior_update import PriorUpdate, make_ablation_step, update_prior
from moe.training.state import TrainState
from moe.training.step import Hyper, Plan, TrainStep, train_step

VOCABULARY_CELLS = 1 << 22  # layers x experts x token ids that an evaluation counts visits of


def compile_train_step(run: setup.Run, state: TrainState) -> TrainStep:
    """The step, compiled for this state; it takes its arguments as `jit_train_step` does."""
    key = setup.root_key(run.config.seed, 1)
    return jit_train_step(run).lower(state, setup.abstract_batch(run), key, hyper(run)).compile()


def compile_eval_step(run: setup.Run, params: PyTree, router: PyTree) -> EvalStep:
    """The evaluation step, compiled for these parameters."""
    key = setup.root_key(run.config.seed, 2)
    return jit_eval_step(run).lower(params, router, setup.abstract_batch(run), key).compile()


def compile_prior_update(run: setup.Run, state: TrainState) -> PriorUpdate | None:
    """The update of the router's prior, compiled; None where the config asks for none."""
    prior = run.config.prior
    if not prior.every:
        return None
    step = make_ablation_step(
        run.spec, run.skeleton, setup.dispatch_for(run, training=False), run.token_bytes
    )
    key = setup.root_key(run.config.seed, 3)
    ablate = _jit_of_model(run, step)
    put, block = to_device(run.mesh), process_block(run.mesh, run.config.data.batch_size)
    return PriorUpdate(
        ablate=ablate.lower(state.params, state.router, setup.abstract_batch(run), key).compile(),
        apply=jax.jit(partial(update_prior, run.spec), out_shardings=run.shardings.router),
        batch=lambda number: put(run.data.eval_batch(ROUTER_VALID, number, *block)),
        key=key,
        every=prior.every,
        batches=prior.batches,
        rate=prior.rate,
        floor=prior.floor,
    )


def jit_train_step(run: setup.Run):
    """The donated step with explicit shardings."""
    o = run.config.optimizer
    plan = Plan(
        run.spec,
        run.skeleton,
        setup.dispatch_for(run, training=True),
        run.transformation,
        optimizer_lib.schedule(
            kind=o.schedule,
            steps=run.config.steps,
            warmup_steps=o.warmup_steps,
            decay_fraction=o.decay_fraction,
            final_fraction=o.final_fraction,
        ),
        optimizer_lib.decay_mask(run.skeleton.params),
        run.token_bytes,
        active_losses(run.config.losses.to_dict(), learned=run.spec.learns_routing),
        o.accumulation,
        run.config.router.jitter > 0,
        run.config.guards.spike_sigmas is not None,
    )
    everywhere = NamedSharding(run.mesh, PartitionSpec())
    return jax.jit(
        partial(train_step, plan),
        donate_argnums=0,
        in_shardings=(run.shardings, _batch(run), everywhere, everywhere),
        out_shardings=(run.shardings, everywhere),
    )


def jit_eval_step(run: setup.Run):
    """The evaluation step with explicit shardings."""
    spec = run.spec
    cells = spec.sparse_layers * spec.all_experts * spec.vocab_size
    step = make_eval_step(
        run.skeleton,
        setup.dispatch_for(run, training=False),
        run.token_bytes,
        len(run.data.domains),
        passes=run.config.evaluation.passes,
        vocabulary=cells <= VOCABULARY_CELLS,
        next_token=spec.causal,
        causal_gap=has_causal_gap(spec),
    )
    return _jit_of_model(run, step)


def _jit_of_model(run: setup.Run, step: Callable):
    """`step(params, router, batch, key)` with explicit shardings; what it returns is on every device."""
    everywhere = NamedSharding(run.mesh, PartitionSpec())
    model = (run.shardings.params, run.shardings.router)
    return jax.jit(
        step,
        in_shardings=(*model, _batch(run), everywhere),
        out_shardings=everywhere,
    )


def _batch(run: setup.Run) -> Batch:
    """Where the arrays of a batch of this run's data lie."""
    return jax.tree.map(lambda shape: shape.sharding, setup.abstract_batch(run))


def hyper(run: setup.Run) -> Hyper:
    """The numbers that reach the step as traced scalars."""
    c = run.config
    update = ROUTERS[c.router.name].update_state
    values = Hyper(
        learning_rate=c.optimizer.learning_rate,
        weight_decay=c.optimizer.weight_decay,
        clip_norm=c.optimizer.clip_norm,
        losses={name: c.losses[name] for name in LOSSES},
        jitter=c.router.jitter,
        dropout=c.model.dropout,
        update_options=pick_options(update, c.router.to_dict()),
        spike_sigmas=0.0 if c.guards.spike_sigmas is None else c.guards.spike_sigmas,
        spikes=c.guards.spikes,
    )
    return jax.tree.map(lambda number: np.float32(number), values)
