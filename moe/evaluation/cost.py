"""What a forward pass has really computed (M18), from how many choices reached an expert."""

from typing import Any

from flax import nnx
from jaxtyping import Float
import numpy as np

from moe.evaluation.routing_paths import executed_flops
from moe.model.build import ModelSize
from moe.model.spec import DEPTH, ModelSpec
from moe.training.state import Skeleton


def expert_flops(spec: ModelSpec, skeleton: Skeleton) -> float:
    """FLOPs of one token in one of the stacked experts: 2 a weight of its matrices."""
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
    visits: Float[np.ndarray, "L E"] | None,
    sequence_length: int,
) -> dict[str, Any]:
    """The entry `model` of an evaluation's record: its size, and `flops_executed`.

    `flops_per_token` is what `router.k` promises if experts are chosen evenly, `flops_executed` what
    the tokens of this evaluation took in experts: drops, tokens that pass a layer by, experts without
    a network and experts beyond k make the difference.

    Args:
        spec: of the model.
        skeleton: its shapes.
        size: counts and FLOPs by the config.
        visits: kept choices for each token; None for a dense model.
        sequence_length: of the rows.
    """
    one = expert_flops(spec, skeleton)
    others = size.flops_per_token - one * _promised_visits(spec)
    ran = _ran(spec, visits, sequence_length)
    executed = executed_flops(ran, 1.0, expert_flops=one, other_flops=others)
    return size._asdict() | {"flops_executed": executed}


def _promised_visits(spec: ModelSpec) -> float:
    """Visits of one token to stacked experts in all layers, as `model_size` counts them."""
    share = spec.router.k * spec.num_experts / max(spec.all_experts, 1)
    kinds = [spec.pattern[int(block.removeprefix("layer"))] for block, _ in spec.sparse_names]
    shares = [share * (spec.depth_capacity if kind in DEPTH else 1.0) for kind in kinds]
    return float(spec.repeats * sum(shares))


def _ran(
    spec: ModelSpec, visits: Float[np.ndarray, "L E"] | None, sequence_length: int
) -> Float[np.ndarray, "L N"]:
    """How often stacked experts ran for each token; those of other kinds run for all or have no cost."""
    layers, row = spec.sparse_layers, spec.router.row
    if visits is None:
        return np.zeros((0, 0))
    if row.plan == "mixing":  # each slot of a row is one visit
        slots = spec.num_experts * dict(spec.router.options)["slots"]
        return np.full((layers, 1), slots / sequence_length)
    if row.plan == "merging":  # one merged expert; the merging itself is no work on tokens
        return np.ones((layers, 1))
    return visits[:, : spec.num_experts]
