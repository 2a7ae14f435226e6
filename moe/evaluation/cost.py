"""What a forward pass has really computed (M18), from how many choices reached an expert."""

from collections.abc import Mapping
from typing import Any

from flax import nnx
from jaxtyping import Float
import numpy as np

from moe.evaluation.routing_paths import executed_flops
from moe.model.build import ModelSize
from moe.model.spec import ModelSpec
from moe.training.state import Skeleton


def expert_flops(spec: ModelSpec, skeleton: Skeleton) -> float:
    """FLOPs of one token in one expert: 2 a weight of its matrices; the mean where experts differ."""
    weights = 0.0
    for path, variable in nnx.to_flat_state(skeleton.params):
        matrix = len(variable.get_metadata().get("axes", ())) >= 2
        if "experts" in path and matrix:
            weights += float(np.prod(variable.get_value().shape))
    return 2.0 * weights / max(spec.sparse_layers * spec.num_experts, 1)


def cost_record(
    spec: ModelSpec,
    skeleton: Skeleton,
    size: ModelSize,
    metrics: Mapping[str, Any],
    sequence_length: int,
) -> dict[str, Any]:
    """The entry `model` of an evaluation's record: its size, and `flops_executed`.

    `flops_per_token` is what `router.k` promises, `flops_executed` what the tokens of this evaluation
    took: drops, skipped layers and experts beyond k make the difference.

    Args:
        spec: of the model.
        skeleton: its shapes.
        size: counts and FLOPs by the config.
        metrics: of the evaluation.
        sequence_length: of the rows.
    """
    one = expert_flops(spec, skeleton)
    others = size.flops_per_token - spec.sparse_layers * spec.router.k * one
    visits = _visits(spec, metrics, sequence_length)
    executed = executed_flops(visits[:, None], 1.0, expert_flops=one, other_flops=others)
    return size._asdict() | {"flops_executed": executed}


def _visits(
    spec: ModelSpec, metrics: Mapping[str, Any], sequence_length: int
) -> Float[np.ndarray, " L"]:
    """How often an expert ran for each token, layer by layer."""
    layers, row = spec.sparse_layers, spec.router.row
    if not layers:
        return np.zeros(0)
    if row.plan == "mixing":  # each slot of a row is one visit
        slots = spec.num_experts * dict(spec.router.options)["slots"]
        return np.full(layers, slots / sequence_length)
    if row.plan == "merging":  # one merged expert; the merging itself is no work on tokens
        return np.ones(layers)
    asked = np.asarray(metrics["routing/per_layer/choices"])
    return asked * (1.0 - np.asarray(metrics["routing/per_layer/drop_rate"]))
