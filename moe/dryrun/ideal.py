"""What a training step must compute and send at least, from the shape of the model alone."""

import math
from typing import NamedTuple

from flax import nnx
import jax
from jax.sharding import NamedSharding

from moe import setup
from moe.model.build import attention_layers, matrices
from moe.model.spec import ModelSpec
from moe.parallel.rules import is_stacked, mesh_axes
from moe.training.state import TrainState


class Part(NamedTuple):
    """Matrix products of one kind, of a whole step and all devices, in FLOPs (2 a multiply-add)."""

    name: str
    forward: float
    recompute: float  # a second forward, in the backward pass, as `model.remat` says

    @property
    def total(self) -> float:
        """Forward, recomputation, and twice the forward for the two gradients."""
        return 3 * self.forward + self.recompute


def ideal_parts(spec: ModelSpec, tokens: int, sequence_length: int) -> list[Part]:
    """The least FLOPs of a step.

    Every matrix meets every token that its layer sends to it, once forwards and twice backwards, and
    once more where the backward pass recomputes. Attention counts all pairs of a row, masked or not,
    which is what a product of whole matrices computes; the causal half is in `causal_saving`.

    Args:
        spec: of the model.
        tokens: of the global batch, padding included.
        sequence_length: of a row.
    """
    forward: dict[str, float] = {}
    again: dict[str, float] = {}
    for path, size in matrices(spec, sequence_length).items():
        name = _component(path)
        flops = 2.0 * size * tokens
        forward[name] = forward.get(name, 0.0) + flops
        again[name] = again.get(name, 0.0) + (flops if _recomputed(spec, path) else 0.0)
    scores = 2 * pair_flops(spec, tokens, sequence_length)
    forward["attention scores"] = scores
    again["attention scores"] = 0.0 if spec.remat == "none" else scores
    return [Part(name, forward[name], again[name]) for name in forward]


def pair_flops(spec: ModelSpec, tokens: int, sequence_length: int) -> float:
    """FLOPs of one of the two products of all queries with all keys, all layers."""
    return 2.0 * tokens * sequence_length * attention_layers(spec) * spec.heads * spec.head_dim


def causal_saving(spec: ModelSpec, tokens: int, sequence_length: int) -> float:
    """FLOPs of a step that a kernel which skips masked pairs would save."""
    if not spec.causal:
        return 0.0
    scores = 2 * pair_flops(spec, tokens, sequence_length)
    passes = 3 if spec.remat == "none" else 4
    return passes * scores * (1 - (sequence_length + 1) / (2 * sequence_length))


def _component(path: tuple) -> str:
    names = [str(name) for name in path]
    for name in ("experts", "shared", "gate", "attention", "mixed"):
        if name in names:
            return name
    parts = {"head": "logits", "embedding": "logits", "pair": "logits", "stem": "stem"}
    return parts.get(names[0], "dense")


def _recomputed(spec: ModelSpec, path: tuple) -> bool:
    """Whether the backward pass multiplies by this matrix again.

    Saving only the decision runs the whole block again, but for products that are added to the
    residual and read by nobody else in the block. The policy `dots` saves plain products; those of
    experts and of attention scores have a batch axis, or are kernels, and are not saved.
    """
    names = [str(name) for name in path]
    if names[0] in ("head", "embedding", "stem", "pool", "pair") or spec.remat == "none":
        return False
    if spec.remat == "dots":
        return "experts" in names
    last = names[-1] == "wo" and "attention" not in names and "experts" not in names
    return not last


class Traffic(NamedTuple):
    """The least bytes that one device sends in a step, for one purpose."""

    purpose: str
    bytes: float
    formula: str


def ideal_traffic(run: setup.Run, tokens: int) -> list[Traffic]:
    """What must cross the network, whatever the program.

    Args:
        run: the planned run.
        tokens: of the global batch.
    """
    return [exchange_traffic(run, tokens), *parameter_traffic(run)]


def exchange_traffic(run: setup.Run, tokens: int) -> Traffic:
    """Rows to experts and back, forwards and backwards, at even load; none stays for free but 1/n.

    Each choice is one row of width `D` in the compute dtype. The recomputation of a rematerialised
    block sends them once more.
    """
    spec, mesh = run.spec, run.mesh
    n = run.rules.expert_shards(mesh)
    local = tokens / (mesh.size / mesh.shape["tensor"])
    row = spec.width * _itemsize(spec)
    passes = 4 if spec.remat == "none" else 6
    one = local * spec.router.k * (n - 1) / n * row
    return Traffic(
        "exchange",
        spec.sparse_layers * passes * one,
        f"{spec.sparse_layers} layers x {passes} passes x {local:.0f} tokens x {spec.router.k} choices x "
        f"{n - 1}/{n} x {row} bytes",
    )


def parameter_traffic(run: setup.Run) -> list[Traffic]:
    """Parameters gathered before use (forwards and backwards) and gradients summed after it.

    In the compute dtype, and once however many parts the batch is accumulated in. A parameter that lies
    whole on every device is not gathered; its gradient is summed over all axes that cut the batch and not
    the parameter.
    """
    spec, mesh = run.spec, run.mesh
    batch = [a for a in ("data", "fsdp", "expert", "sequence") if mesh.shape[a] > 1]
    gathered = summed = 0.0
    for size, sharding, is_expert in _parameters(run):
        axes = {axis for names in sharding.spec for axis in mesh_axes(names)}
        stay = set(run.rules.expert_axes) if is_expert else set()  # experts stay where they are
        stay.add("tensor")
        cut = math.prod(mesh.shape[a] for a in axes & stay)
        over = math.prod(mesh.shape[a] for a in axes - stay)
        rest = math.prod(mesh.shape[a] for a in batch if a not in axes)
        used = size / cut * _itemsize(spec)  # bytes of what a device multiplies with
        gathered += 2 * used * (over - 1) / over
        summed += used * (over - 1) / over + 2 * used / over * (rest - 1) / rest
    return [
        Traffic("parameters", gathered, "2 gathers of what each device uses, less its own part"),
        Traffic(
            "gradients", summed, "reduce-scatter over the axes that cut it, all-reduce over others"
        ),
    ]


def _parameters(run: setup.Run) -> list[tuple[int, NamedSharding, bool]]:
    shardings = nnx.to_flat_state(nnx.State(run.shardings.params))
    where = {tuple(path): leaf for path, leaf in shardings}
    found = []
    for path, variable in nnx.to_flat_state(run.skeleton.params):
        sharding = where[tuple(path)]
        stacked = is_stacked(variable.get_metadata().get("axes", ()))
        found.append((math.prod(variable.get_value().shape), sharding, stacked))
    return found


def _itemsize(spec: ModelSpec) -> int:
    return 2 if spec.dtype == "bfloat16" else 4


def state_bytes(shardings: TrainState, shapes: TrainState) -> dict[str, int]:
    """Bytes a device of every part of the state: parameters, router, optimizer."""
    totals = {}
    for part in ("params", "router", "optimizer"):
        leaves = zip(
            jax.tree.leaves(getattr(shapes, part)),
            jax.tree.leaves(getattr(shardings, part)),
            strict=True,
        )
        totals[part] = sum(
            math.prod(sharding.shard_shape(shape.shape)) * shape.dtype.itemsize
            for shape, sharding in leaves
        )
    return totals
