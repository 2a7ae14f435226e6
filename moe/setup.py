"""What `train.py` and `eval.py` both build from a config, in the order in which mistakes are cheap."""

from collections.abc import Callable, Iterator, Sequence
import hashlib
import time
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, ArrayLike, Int
import numpy as np
import optax

from moe.axes import BATCH_AXES, SEQUENCE
from moe.config import ConfigDict, require
from moe.config_rules import CAUSAL_TASKS
from moe.data.batches import RowData
from moe.data.example_data import ExampleData
from moe.data.open import make_data
from moe.data.tokenizers import Tokenizer
from moe.data.types import Batch
from moe.dispatch.table import check as check_experts
from moe.dispatch.types import Dispatch
from moe.errors import DataError
from moe.evaluation.causality import causality_record
from moe.evaluation.cost import cost_record
from moe.evaluation.evaluate import EvalStep, Evaluation, evaluate
from moe.evaluation.record import evaluation_record
from moe.model.build import ModelSize, model_spec
from moe.model.build_dispatch import build_dispatch
from moe.model.spec import KINDS, ModelSpec, Stem
from moe.parallel.feed import batch_shapes, process_block, to_device
from moe.parallel.meeting import meet
from moe.parallel.mesh import batch_shards, make_mesh
from moe.parallel.rules import Rules, find_rules
from moe.routing.router import parameters_of
from moe.routing.table import ROUTERS, check_causal
from moe.training import optimizer as optimizer_lib
from moe.training import throughput
from moe.training.prior_update import (
    routers_with_prior,
)
from moe.training.state import Skeleton, TrainState, make_skeleton, state_shardings

BALANCES = (
    *("balance", "sequence_balance", "importance", "load", "device_balance"),
    *("mutual_information", "simbal", "group_balance", "relu_balance"),
)  # losses that spread choices over experts


class Run(NamedTuple):
    """Everything that a config decides, before any number of the model exists."""

    config: ConfigDict
    mesh: Mesh
    data: RowData | Any  # None where a run is only planned
    spec: ModelSpec
    skeleton: Skeleton
    transformation: optax.GradientTransformation
    shardings: TrainState
    token_bytes: Int[Array, " V"]

    @property
    def rules(self) -> Rules:
        """Which parameter axes lie on which mesh axes."""
        return find_rules(self.config.mesh.rules)


def set_up(
    config: ConfigDict,
    tokenizer: Tokenizer | None = None,
    *,
    training: bool = True,
    data: RowData | None = None,
) -> Run:
    """Checks the config against the devices and the data; nothing compiles, nothing is written.

    Args:
        config: complete config.
        tokenizer: the one of a trained run; None makes the one that the config describes.
        training: whether to refuse what only training cannot do.
        data: already open; None opens what the config describes.

    Raises:
        ConfigError: a combination that cannot work.
        DataError: data that cannot be read.
    """
    mesh = mesh_of(config)
    check_layout(config, mesh, training=training)
    if data is None:
        carved = config.prior.every > 0
        data = open_data(config, tokenizer, router_valid=carved)
        _check_same_data(data.fingerprint)
    return assemble(
        config,
        mesh,
        vocab_size=data.tokenizer.vocab_size,
        token_bytes=data.tokenizer.token_bytes,
        token_counts=_token_counts(config, data),
        classes=len(data.classes) if config.task.name == "classify" else 0,
        stem=_stem(data),
        blank=data.tokenizer.boundary if config.task.name == "ctc" else None,
        data=data,
        training=training,
    )


def open_data(
    config: ConfigDict, tokenizer: Tokenizer | None = None, *, router_valid: bool = False
) -> RowData:
    """The data that a config describes, for its task; arguments as for `make_data`."""
    return make_data(
        config.data,
        seed=config.seed,
        task=config.task.name,
        prefix=config.task.prefix == "bidirectional",
        tokenizer=tokenizer,
        router_valid=router_valid,
    )


def _stem(data: RowData) -> Stem | None:
    """What reads the frames of the data; None for text."""
    if not isinstance(data, ExampleData) or data.frame_shape is None:
        return None
    return Stem("conv" if data.store.fields.kind == "audio" else "patches", *data.frame_shape)


def mesh_of(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of the config over these devices; None takes all of this process's run."""
    sizes = config.mesh.to_dict()
    sizes.pop("rules")
    return make_mesh(**sizes, devices=devices)


def check_layout(config: ConfigDict, mesh: Mesh, *, training: bool = True) -> None:
    """Refuses what the config alone shows to be impossible on this mesh, before any data is touched.

    Raises:
        ConfigError: a combination that cannot work.
    """
    _check_batch(config, mesh)
    # The real vocabulary is not needed for the checks.
    model_spec(config, vocab_size=1, training=training)
    if any(KINDS[kind] for kind in config.model.pattern):
        check_experts(config.model.num_experts, mesh, find_rules(config.mesh.rules).expert_axes)
        if not config.allow_noncausal and config.task.name in CAUSAL_TASKS:
            check_causal(config.router.name)
    if training:
        _check_prior(config)


def assemble(
    config: ConfigDict,
    mesh: Mesh,
    *,
    vocab_size: int,
    token_bytes: ArrayLike | None = None,
    token_counts: np.ndarray | None = None,
    classes: int = 0,
    stem: Stem | None = None,
    blank: int | None = None,
    data: RowData | None = None,
    training: bool = True,
) -> Run:
    """The run of a checked config; nothing of the model is allocated.

    Args:
        config: complete config.
        mesh: the devices, which need not be there.
        vocab_size: rows of the embedding.
        token_bytes: `[V]` bytes that each id stands for; None: one.
        token_counts: `[V]` how often each id occurs, for balanced hash tables.
        classes: of a classifier of rows.
        stem: what reads frames; None where rows are text.
        blank: the id that CTC reads as nothing; None for other tasks.
        data: where batches come from; None where none are read.
        training: whether to refuse what only training cannot do.
    """
    spec = model_spec(
        config, vocab_size, token_counts, classes=classes, stem=stem, training=training
    )._replace(blank=blank)
    skeleton = make_skeleton(spec)
    o = config.optimizer
    transformation = optimizer_lib.adam(b1=o.b1, b2=o.b2, eps=o.eps, moment_dtype=o.moment_dtype)
    shardings = state_shardings(skeleton, transformation, mesh, find_rules(config.mesh.rules))
    sizes = np.ones(vocab_size) if token_bytes is None else token_bytes
    sizes = jnp.asarray(sizes, jnp.int32)
    run = Run(config, mesh, data, spec, skeleton, transformation, shardings, sizes)
    dispatch_for(run, training=training)  # an unknown name shows here
    return run


def _check_prior(config: ConfigDict) -> None:
    name = config.router.name
    sparse = any(KINDS[kind] for kind in config.model.pattern)
    require(
        not config.prior.every or (sparse and name in routers_with_prior()),
        f"prior.every={config.prior.every} with "
        + (f"router.name={name!r}: this router has no prior" if sparse else "a dense model")
        + " to update. Set prior.every=0, or router.name to one of "
        f"{', '.join(routers_with_prior())}.",
    )


def notes(config: ConfigDict) -> list[str]:
    """Settings that work and are seldom meant, a sentence each."""
    found, losses = [], config.losses
    update = ROUTERS[config.router.name].update_state
    balanced = any(losses[name] > 0 for name in BALANCES) or "counts" in parameters_of(update)
    if losses.entropy > 0 and not balanced:
        found.append(
            f"losses.entropy={losses.entropy} sharpens every token's choice and nothing spreads choices "
            f"over experts: routing may collapse. Give a weight to one of {', '.join(BALANCES)}."
        )
    if not config.prior.every and config.router.name in routers_with_prior():
        found.append(
            f"prior.every=0: the prior of router.name={config.router.name!r} stays uniform. Set "
            "prior.every to update it from the router-validation split."
        )
    return found


def data_notes(data: RowData) -> list[str]:
    """What a data set does not give whole, a sentence a split."""
    found = []
    for split in data.splits:
        counts = {reason: n for reason, n in data.left_out(split).items() if n}
        if counts:
            said = ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in counts.items())
            found.append(f"{split} has examples that are left out or cut for a row: {said}.")
    return found


def _check_same_data(fingerprint: str) -> None:
    """Each host prepares its own copy of the data: all must have the same tokens."""
    meet("data")
    mine = np.frombuffer(hashlib.sha256(fingerprint.encode()).digest(), np.uint8)
    everyone = multihost_utils.process_allgather(mine).reshape(-1, mine.size)
    if (everyone != mine).any():
        odd = np.flatnonzero((everyone != everyone[:1]).any(axis=1)).tolist()
        raise DataError(
            f"processes {odd} read other text than process 0: a run reads one text. Give every host the "
            "same data (and the same Python, for the standard library), or a shared data.directory."
        )


def _check_batch(config: ConfigDict, mesh: Mesh) -> None:
    shards, accumulation = batch_shards(mesh), config.optimizer.accumulation
    size, unit = config.data.batch_size, shards * accumulation
    require(
        size % unit == 0,
        f"data.batch_size={size} is not divisible by {shards} (devices along {' x '.join(BATCH_AXES)}) "
        f"x {accumulation} (optimizer.accumulation): each device takes the same number of sequences "
        f"of every microbatch. The next batch size that fits is {-(-size // unit) * unit}.",
    )
    length, parts = config.data.sequence_length, mesh.shape[SEQUENCE]
    require(
        length % parts == 0,
        f"data.sequence_length={length} is not divisible by mesh.sequence={parts}: each device of that axis "
        f"takes as many positions. The next length that fits is {-(-length // parts) * parts}.",
    )


def _token_counts(config: ConfigDict, data: RowData) -> np.ndarray | None:
    """How often each id occurs in the training text, where a hash table wants to know."""
    if config.router.get("kind") != "balanced":
        return None
    return data.token_counts()


def dispatch_for(run: Run, *, training: bool) -> Dispatch:
    """How tokens reach experts; evaluation has a capacity of its own and drops nothing by default."""
    return build_dispatch(run.config, run.mesh, training=training)


def abstract_batch(run: Run) -> Batch:
    """Shapes, dtypes and shardings of the batch that the config describes."""
    data = run.config.data
    like = None if run.data is None else run.data.like()
    return batch_shapes(run.mesh, data.batch_size, data.sequence_length, like)


def root_key(seed: int, purpose: int) -> Any:
    """Key of one purpose: 0 parameters, 1 training noise, 2 evaluation, 3 updates of a prior."""
    return jax.random.fold_in(jax.random.key(seed), purpose)


def eval_batches(run: Run, split: str) -> Iterator[Batch]:
    """This process's part of every batch of a split."""
    return run.data.eval_batches(split, *process_block(run.mesh, run.config.data.batch_size))


def timed_evaluation(
    run: Run,
    eval_step: EvalStep,
    params: Any,
    router: Any,
    split: str,
    *,
    limit: int | None = None,
    stop: Callable[[], bool] | None = None,
) -> tuple[Evaluation, dict[str, float]]:
    """Evaluates a split, at most `limit` batches; with `speed/*` and `memory/*`.

    Raises:
        EvaluationStopped: `stop`, asked between two batches, said so.
    """
    started = time.perf_counter()
    evaluation = evaluate(
        eval_step,
        params,
        router,
        eval_batches(run, split),
        root_key(run.config.seed, 2),
        domains=run.data.domains,
        to_device=to_device(run.mesh),
        limit=limit,
        stop=stop,
    )
    seconds = time.perf_counter() - started
    speed = {"speed/tokens_per_second": evaluation.metrics["tokens"] / seconds}
    return evaluation, speed | throughput.memory()


def evaluate_split(
    run: Run,
    eval_step: EvalStep,
    params: Any,
    router: Any,
    *,
    split: str,
    step: int,
    size: ModelSize,
    stop: Callable[[], bool] | None = None,
) -> tuple[dict[str, Any], Evaluation]:
    """The record of an evaluation, as it goes to `eval/`, and what it was made of.

    Args:
        run: from `set_up`.
        eval_step: `compile_eval_step(...)`.
        params: pure dict of parameters.
        router: pure dict of router state.
        split: "valid" or "test"; at most `evaluation.batches` batches of it.
        step: optimiser steps of these numbers.
        size: of the model.
        stop: asked between two batches.

    Raises:
        EvaluationStopped: `stop` said so.
    """
    limit = run.config.evaluation.batches
    evaluation, speed = timed_evaluation(
        run, eval_step, params, router, split, limit=limit, stop=stop
    )
    length = run.config.data.sequence_length
    record = evaluation_record(
        evaluation,
        step=step,
        split=split,
        domains=run.data.domains,
        tokenizer=run.data.tokenizer,
        model=cost_record(run.spec, run.skeleton, size, evaluation.visits, length),
        causality=causality_record(run.spec),
        speed=speed,
        stem=None if run.spec.stem is None else run.spec.stem.kind,
    )
    return record, evaluation
