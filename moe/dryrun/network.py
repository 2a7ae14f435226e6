"""What a compiled step sends, by line and by purpose, beside the least for each purpose."""

from collections.abc import Iterable
import math
from typing import Any

from moe import setup
from moe.axes import SEQUENCE, TENSOR
from moe.dryrun import ideal
from moe.dryrun.collectives import Collective
from moe.model.experts import ACTIVATIONS

PURPOSES = ("exchange", "parameters and gradients", "activations", "statistics")
STATISTICS = ("moe/routing/", "moe/training/")


def network(run: setup.Run, found: list[Collective], tokens: int) -> dict[str, Any]:
    """Bytes sent by a device, by kind, axes and line; and the least for each purpose beside it.

    Args:
        run: the planned run.
        found: every collective of the step.
        tokens: of the global batch.
    """
    groups: dict[tuple, dict[str, Any]] = {}
    for each in found:
        key = (each.kind, each.axes, each.phase, str(each.source or ""))
        row = groups.setdefault(
            key,
            {
                "kind": each.kind,
                "axes": list(each.axes),
                "phase": each.phase,
                "source": key[3],
                "purpose": purpose(each, run.rules.expert_axes),
                "count": 0,
                "bytes": 0,
            },
        )
        row["count"] += each.count
        row["bytes"] += each.count * each.wire_bytes
    rows = sorted(groups.values(), key=lambda row: -row["bytes"])
    sums = dict.fromkeys(PURPOSES, 0)
    for row in rows:
        sums[row["purpose"]] += row["bytes"]
    parts = {t.purpose: t._asdict() for t in ideal.ideal_traffic(run, tokens)}
    least = {
        "exchange": parts["exchange"]["bytes"],
        "parameters and gradients": parts["parameters"]["bytes"] + parts["gradients"]["bytes"],
    }
    return {
        "rows": rows,
        "sums": sums,
        "least": least,
        "least_of": parts,
        "exchange_ratio": _ratio(sums, least, "exchange"),
        "parameters_ratio": _ratio(sums, least, "parameters and gradients"),
        "largest_weight_gather": weight_gather(run, found),
    }


def _ratio(sums: dict[str, int], least: dict[str, float], name: str) -> float | None:
    return sums[name] / least[name] if least[name] else None


def purpose(each: Collective, expert_axes: tuple[str, ...]) -> str:
    """One of `PURPOSES`.

    Parameters and gradients are what is left, and cannot be told apart: XLA:TPU makes all-reduces
    and chains of permutes of some gathers.

    - exchange: every ragged all-to-all; every all-to-all along axes that experts lie on; whatever else
      `moe/dispatch` sends along them, such as the gathers of `dispatch.exchange=all_gather`.
    - activations: sums and gathers along `tensor` alone, and what attention sends along `sequence`.
    - statistics: sums that losses, reports and the gradient's norm ask for.
    """
    axes, source = set(each.axes), str(each.source or "")
    along_experts = bool(axes) and axes <= set(expert_axes)
    dispatched = each.kind == "all-to-all" or source.startswith("moe/dispatch/")
    if each.kind == "ragged-all-to-all" or (along_experts and dispatched):
        return "exchange"
    if axes == {TENSOR} or (SEQUENCE in axes and source.startswith("moe/model/attention")):
        return "activations"
    # Sums of the backward pass are gradients, whichever line of the step they are made for.
    if each.kind == "all-reduce" and source.startswith(STATISTICS) and each.phase != "backward":
        return "statistics"
    return "parameters and gradients"


def weight_gather(run: setup.Run, found: Iterable[Collective]) -> float:
    """Numbers that the largest gather of parameters brings, over those of `wi` of one layer's experts.

    1 or more: some all-gather brings as much to one device as every expert of a layer has. Only arrays
    with an axis of the experts' hidden width count: an embedding may be larger than that.
    """
    spec = run.spec
    if not spec.sparse_layers:
        return 0.0
    parts = ACTIVATIONS[spec.activation][0]
    wi = spec.num_experts * spec.width * parts * spec.expert_width
    F = spec.expert_width // run.mesh.shape[TENSOR]
    sizes = [
        math.prod(shape.dims) * each.group_size
        for each in found
        if each.kind == "all-gather"
        and purpose(each, run.rules.expert_axes) == "parameters and gradients"
        for shape in each.shapes
        if {F, parts * F} & set(shape.dims)
    ]
    return max(sizes, default=0) / wi
