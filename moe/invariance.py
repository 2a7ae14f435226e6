"""One training step of a tiny model, taken in different ways, that must be the same step.

What is compared: every loss, the gradient before clipping, which token was kept by which expert, and
the router's state after the update. The oracle is dispatch `reference` on one device, or `capacity`
on one device where choices are dropped. `moe.invariance_cells` has the ways.
"""

from collections.abc import Callable, Mapping
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, PyTree
import numpy as np

from moe import programs, setup
from moe.cli import complete_config
from moe.config import ConfigDict, default_config, replace_section
from moe.data.types import Batch
from moe.model.layer import Call
from moe.model.spec import ModelSpec
from moe.parallel.feed import batch_shardings, process_block, to_device
from moe.training import optimizer
from moe.training.objective import forward_rows
from moe.training.state import TrainState, initialize
from moe.training.step import Hyper, StepMetrics

VOCAB, B, S = 64, 16, 16
CLASSES = 3  # of a classifier
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
FLOOR = 1e-2  # of the largest gradient: what smaller arrays are measured by
MODEL = {
    "num_layers": 2,
    "pattern": ("dense", "sparse"),
    "width": 16,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "mlp_width": 64,
    "expert_width": 16,
    "num_experts": 16,  # a square, with groups of several sizes, on up to 8 devices
}


class Outcome(NamedTuple):
    """What a step tells, on the host."""

    told: StepMetrics
    gradient: PyTree  # before clipping
    router: PyTree  # state after the update
    choices: Int[Any, "L B S K"] | None  # expert of every choice, -1 if dropped; None: dense


class Difference(NamedTuple):
    """How far an outcome is from the oracle's. All zero for the same numbers."""

    loss: float  # of any loss, relative
    gradient: float  # of any array, relative to its largest entry
    state: float  # of any part of the router's state, relative to its largest entry or 1
    choices: int  # places of a token and a choice whose expert differs

    @property
    def worst(self) -> float:
        """The largest of the relative ones."""
        return max(self.loss, self.gradient, self.state)

    def is_within(self, dtype: str) -> bool:
        """Whether a step in this dtype may differ so much; float32 keeps every choice."""
        exact = dtype != "float32" or self.choices == 0
        return exact and self.worst <= TOLERANCE[dtype]


def make_batch() -> Batch:
    """Rows of two documents, a padded tail, and one row of padding only."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, VOCAB, (B, S)).astype(np.int32)
    valid = np.ones((B, S), bool)
    valid[1, 10:] = False
    valid[2] = False
    segments = np.where(np.arange(S) < 7, 1, 2) * valid
    positions = np.where(np.arange(S) < 7, np.arange(S), np.arange(S) - 7)
    return Batch(
        tokens * valid,
        np.roll(tokens, -1, axis=1) * valid,
        segments.astype(np.int32),
        np.broadcast_to(positions, (B, S)).astype(np.int32),
        valid,
        np.arange(B, dtype=np.int32) % CLASSES,
    )


def base_config() -> ConfigDict:
    """The tiny model, not complete yet. No gradient is clipped."""
    base = default_config()
    base.model.update(MODEL)
    base.data.update({"batch_size": B, "sequence_length": S})
    base.optimizer.clip_norm = 1e9
    base.allow_noncausal = True
    return base


def make_config(
    router: Mapping[str, Any],
    *,
    losses: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    dispatch: Mapping[str, Any] | None = None,
    mesh: Mapping[str, Any] | None = None,
    dtype: str = "float32",
) -> ConfigDict:
    """The tiny model's config with other sections.

    Args:
        router: the whole section.
        losses: weights that are not the default.
        model: sizes that are not those of `MODEL`.
        dispatch: options that are not the default.
        mesh: sizes that are not 1, and `rules`.
        dtype: of computation.
    """
    base = base_config()
    short = {key: 4 for key in ("segment", "segment_size") if key in router}  # rows are short
    replace_section(base, "router", {**router, **short})
    base.losses.update(losses or {})
    base.model.update(model or {})
    base.dispatch.update(dispatch or {})
    base.mesh.update({"data": 1, **(mesh or {})})
    base.model.dtype = dtype
    return complete_config(base)


def of_preset(apply: Callable[[ConfigDict, str], None], name: str) -> dict[str, Any]:
    """Arguments of `make_config` for a preset; `apply` is that of `configs/routers.py`."""
    base = base_config()
    apply(base, name)
    width = base.model.expert_width  # of equal active compute
    return {
        "router": base.router.to_dict(),
        "losses": base.losses.to_dict(),
        "model": {"expert_width": width},
    }


def mesh_size(config: ConfigDict) -> int:
    """Devices of the config's mesh."""
    return math.prod(size for name, size in config.mesh.items() if name not in ("rules", "slices"))


def take_step(config: ConfigDict, *, hot: bool = False) -> Outcome:
    """The first step of training, on the first devices of the config's mesh, or on all processes'.

    Args:
        config: complete, with a mesh without -1.
        hot: every token asks for the first experts, and the others get none.
    """
    count = mesh_size(config)
    # One device of several processes is one of this process: each takes the step by itself.
    devices = jax.local_devices()[:1] if count == 1 else jax.devices()[:count]
    return step_on(setup.mesh_of(config, devices), config, hot=hot)


def step_on(mesh: Mesh, config: ConfigDict, *, hot: bool = False) -> Outcome:
    """`take_step` on a given mesh."""
    run = setup.assemble(
        config,
        mesh,
        vocab_size=VOCAB,
        token_counts=np.arange(VOCAB),
        classes=CLASSES if config.task.name == "classify" else 0,
    )
    everywhere = NamedSharding(mesh, PartitionSpec())
    compute = jax.jit(
        functools.partial(_compute, run),
        in_shardings=(run.shardings, batch_shardings(mesh), everywhere, everywhere),
        out_shardings=everywhere,
    )
    block, count = process_block(mesh, B)
    rows = slice(block * B // count, (block + 1) * B // count)
    with jax.set_mesh(mesh):
        state = jax.tree.map(_put, _numbers(run.spec, config.optimizer.b1, hot), run.shardings)
        batch = to_device(mesh)(jax.tree.map(lambda a: a[rows], make_batch()))
        found = compute(state, batch, setup.root_key(0, 1), programs.hyper(run))
        return jax.tree.map(np.asarray, jax.device_get(found))


def _compute(run: setup.Run, state: TrainState, batch: Batch, key: Array, hyper: Hyper) -> Outcome:
    """The product's own train step, and the choices of the forward pass in it."""
    call = Call(
        batch.tokens,
        batch.valid,
        setup.dispatch_for(run, training=True),
        hyper.jitter if run.config.router.jitter > 0 else None,
        hyper.dropout if run.spec.dropout > 0 else None,
        jax.random.fold_in(key, state.step),
        training=True,
    )
    _, report = forward_rows(run.skeleton, state.params, state.router, batch, call, run.token_bytes)
    new, told = programs.jit_train_step(run)(state, batch, key, hyper)
    # After one step Adam's first moment is the gradient times 1 - b1.
    scale = 1.0 - run.config.optimizer.b1
    gradient = jax.tree.map(lambda m: m.astype(jnp.float32) / scale, new.optimizer.mu)
    return Outcome(told, gradient, new.router, None if report is None else report.expert)


def _put(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


@functools.lru_cache(maxsize=128)
def _numbers(spec: ModelSpec, b1: float, hot: bool) -> TrainState:
    """A fresh state, drawn on one device."""
    adam = optimizer.adam(b1=b1, b2=0.95, eps=1e-8)
    with jax.default_device(jax.local_devices()[0]):
        state = jax.jit(lambda key: initialize(spec, adam, key))(setup.root_key(0, 0))
    state = jax.tree.map(np.asarray, jax.device_get(state))
    if not hot:
        return state
    # Equal logits: the lowest experts win every tie.
    params = jax.tree_util.tree_map_with_path(_without_gate, state.params)
    router = jax.tree_util.tree_map_with_path(_one_entry, state.router)
    return state._replace(params=params, router=router)


def _without_gate(path: tuple, value: np.ndarray) -> np.ndarray:
    return np.zeros_like(value) if "gate" in _names(path) else value


def _one_entry(path: tuple, value: np.ndarray) -> np.ndarray:
    """A table `[... V K]` that sends every id to the first K experts."""
    if "table" not in _names(path):
        return value
    return np.broadcast_to(np.arange(value.shape[-1], dtype=value.dtype), value.shape).copy()


def _names(path: tuple) -> list[str]:
    return [str(getattr(entry, "key", entry)) for entry in path]


def compare(found: Outcome, wanted: Outcome) -> Difference:
    """How far `found` is from the oracle's outcome."""
    losses = [
        _relative(found.told.losses[name], value, 1e-6)
        for name, value in wanted.told.losses.items()
    ]
    losses.append(_relative(found.told.grad_norm, wanted.told.grad_norm, 1e-6))
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(wanted.gradient))
    gradient = jax.tree.map(
        lambda a, b: _relative(a, b, FLOOR * largest), found.gradient, wanted.gradient
    )
    router = jax.tree.map(lambda a, b: _relative(a, b, 1.0), found.router, wanted.router)
    choices = 0
    if wanted.choices is not None:
        assert found.choices is not None
        choices = int((found.choices != wanted.choices).sum())
    return Difference(
        max(losses),
        max(jax.tree.leaves(gradient)),
        max(jax.tree.leaves(router), default=0.0),
        choices,
    )


def _relative(found: Any, wanted: Any, least: float) -> float:
    """Largest difference over the largest entry, or over `least`; infinite for what is not finite."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    if not wanted.size:
        return 0.0
    error = float(np.abs(found - wanted).max()) / max(float(np.abs(wanted).max()), least)
    return error if math.isfinite(error) else math.inf


def dropped(outcome: Outcome) -> int:
    """Choices that asked for an expert and did not reach one."""
    totals = outcome.told.totals
    return 0 if totals is None else int(totals.requested.sum() - totals.kept.sum())
