"""What a run needs of memory, estimated before or after it ran out, and what would need less."""

from collections.abc import Iterable
import math
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree
import optax

from moe.axes import EXPERT, SEQUENCE, TENSOR
from moe.config import ConfigDict
from moe.model.spec import KINDS, ModelSpec
from moe.parallel.mesh import batch_shards
from moe.training.state import TrainState, abstract_state
from moe.units import memory_size


@runtime_checkable
class Planned(Protocol):
    """What `moe.setup.Run` has of a run before any number of the model exists."""

    @property
    def config(self) -> ConfigDict:
        """Complete and checked."""
        ...

    @property
    def mesh(self) -> Mesh:
        """Of the devices."""
        ...

    @property
    def spec(self) -> ModelSpec:
        """Shape of the model."""
        ...

    @property
    def transformation(self) -> optax.GradientTransformation:
        """Of the optimiser, which decides the moments."""
        ...

    @property
    def shardings(self) -> TrainState:
        """Where the leaves of the state lie."""
        ...


class Estimate(NamedTuple):
    """Bytes on one device, and how to need fewer.

    Parameters, moments and router state follow from shapes and shardings. Gradients are taken to lie as
    parameters do. Activations are an estimate from the widths of the layers: what the compiler
    keeps, fuses and computes again is known to it alone.
    """

    parameters: int
    moments: int
    router: int
    gradients: int
    activations: int
    devices: int
    rows: str  # what one device holds at once, in words
    advice: tuple[str, ...]

    @property
    def state(self) -> int:
        """Bytes of what a checkpoint holds of one device."""
        return self.parameters + self.moments + self.router

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return self.state + self.gradients + self.activations

    def __str__(self) -> str:
        return (
            f"each of {self.devices} devices holds {memory_size(self.parameters)} of parameters, "
            f"{memory_size(self.moments)} of moments, {memory_size(self.router)} of router state, "
            f"{memory_size(self.gradients)} of gradients and, by estimate, about "
            f"{memory_size(self.activations)} of activations ({self.rows})"
        )


def state_bytes(abstract_state: PyTree) -> int:
    """Bytes of all leaves of a state, counted once however many devices hold a copy.

    Args:
        abstract_state: tree of `jax.ShapeDtypeStruct` or `jax.Array`, typed keys included.
    """
    return sum(_leaf_bytes(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(abstract_state))


def estimate(run: Planned) -> Estimate:
    """What one training step of a run needs; nothing is allocated and nothing compiles."""
    state = abstract_state(run.spec, run.transformation, run.shardings)
    parameters = _on_one_device(state.params)
    config = run.config
    rows = config.data.batch_size // config.optimizer.accumulation
    return Estimate(
        parameters=parameters,
        moments=_on_one_device(state.optimizer),
        router=_on_one_device(state.router),
        # Microbatches add up in a second tree.
        gradients=parameters * (2 if config.optimizer.accumulation > 1 else 1),
        activations=activation_bytes(run),
        devices=run.mesh.size,
        rows=f"{rows / batch_shards(run.mesh):g} rows of {config.data.sequence_length} positions "
        f"at once, model.remat={run.spec.remat}",
        advice=(*activation_fixes(run), state_fix(run)),
    )


def activation_bytes(run: Planned) -> int:
    """About what one device keeps of one microbatch from the forward to the backward pass.

    Widths of what the layers keep of a position, times positions; with two layers more for what is
    computed again and its gradients, and three arrays of `V` for logits and their gradient.
    """
    spec, config, mesh = run.spec, run.config, run.mesh
    rows = config.data.batch_size / config.optimizer.accumulation / batch_shards(mesh)
    positions = rows * config.data.sequence_length / mesh.shape[SEQUENCE]
    size = 2 if spec.dtype == "bfloat16" else 4
    layers = ["dense"] * spec.first_dense + list(spec.pattern) * spec.repeats
    kept = [_kept_numbers(run, kind) for kind in layers]
    whole, inputs = max(kept), spec.width * len(layers)
    held = {"none": sum(kept), "dots": sum(kept) / 4, "full": inputs}[spec.remat]
    logits = 3 * spec.vocab_size * 4 if spec.output == "tokens" else 0
    return int(positions * ((held + 2 * whole) * size + logits))


def _kept_numbers(run: Planned, kind: str) -> float:
    """Numbers that one layer keeps of a position."""
    spec, config, mesh = run.spec, run.config, run.mesh
    heads, head = spec.heads, spec.head_dim
    scores = config.attention.get("query_block", None) or config.data.sequence_length
    attention = 4 * spec.width + (2 * heads + 2 * spec.kv_heads) * head + 2 * heads * scores
    choices = spec.router.k
    # With room for every row of every shard, an exchange of `P` shards has `P` times the rows.
    room = mesh.shape[EXPERT] if config.dispatch.name == "grouped" else 1
    factor = config.dispatch.buffer_factor or room
    routed = choices * min(factor, room) * (2 * spec.width + 3 * spec.expert_width)
    sparse = routed + spec.shared_experts * 3 * spec.expert_width + 4 * spec.all_experts
    parts = KINDS[kind] * sparse or 3 * spec.mlp_width
    return attention + 3 * spec.width + parts / mesh.shape[TENSOR]


def state_fix(run: Planned) -> str:
    """How to spread the state over more devices."""
    config = run.config
    rules = config.mesh.rules
    cut = {"separate": "folded or hybrid", "zero1": "separate, folded or hybrid"}.get(rules)
    fix = "Use more devices along mesh.fsdp or mesh.expert"
    if cut:
        fix += f", mesh.rules={cut} (now {rules}), which cuts what this one keeps whole"
    if config.optimizer.moment_dtype == "float32":
        fix += ", or optimizer.moment_dtype=bfloat16, which halves the moments"
    return fix + "."


def activation_fixes(run: Planned) -> list[str]:
    """How to hold fewer activations."""
    config, said = run.config, []
    rows = config.data.batch_size // config.optimizer.accumulation
    per_device = rows * run.mesh.shape["tensor"] * run.mesh.shape["sequence"] / run.mesh.size
    if run.spec.remat != "full":
        said.append(
            f"Set model.remat=full (now {run.spec.remat}): keep only the routing decisions."
        )
    if per_device > 1:
        said.append(
            f"Each device holds {per_device:.0f} rows at once: raise optimizer.accumulation (now "
            f"{config.optimizer.accumulation}), or lower data.batch_size."
        )
    if config.attention.get("query_block", 0) is None and config.data.sequence_length > 512:
        said.append(
            f"Attention keeps {run.spec.heads} x {config.data.sequence_length}^2 scores a row: set "
            "attention.query_block=512."
        )
    if config.dispatch.name == "grouped" and config.dispatch.buffer_factor is None:
        said.append(
            "The exchange has room for every row to reach one shard: set dispatch.buffer_factor=1.25, which "
            "drops (and counts) what a shard cannot take, or dispatch.chunks."
        )
    return said or ["Use more devices, or a mesh.sequence or mesh.tensor above 1."]


def _on_one_device(tree: PyTree) -> int:
    """Bytes of the shards of one device."""
    leaves: Iterable[Any] = jax.tree.leaves(tree)
    return sum(_leaf_bytes(leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in leaves)


def _leaf_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    return math.prod(shape) * dtype.itemsize
