"""Sentences about a dry run: why it does not fit, what wastes most, and what to change."""

from typing import Any

from moe import setup
from moe.dryrun.waste import resolved_exchange
from moe.training.memory import activation_fixes, state_fix
from moe.units import memory_size

WASTE = 1.03  # compiled FLOPs over the least, beyond which it is said
EXTRA = 1.1  # exchanged bytes over the least


def advice(run: setup.Run, record: dict[str, Any]) -> list[str]:
    """What a reader should do next, the weightiest first; empty where nothing stands out."""
    found = [] if record["memory"]["fits"] else misfit(run, record)
    return found + wasted(run, record) + uncounted(record)


def misfit(run: setup.Run, record: dict[str, Any]) -> list[str]:
    """Why the step does not fit, and changes that would help, by what takes most memory."""
    memory = record["memory"]
    state, limit = sum(memory["state"].values()), memory["limit"]
    total = memory.get("total")
    taken = f"parameters, moments and router state take {memory_size(state)}"
    if total is None or limit is None:
        said = [f"The compiler refuses it (its words are in memory.compiler); {taken}."]
    else:
        said = [f"It does not fit: {memory_size(total)} of {memory_size(limit)}, of which {taken}."]
    if limit is not None and state > 0.6 * limit:
        said.append(state_fix(run))
    if limit is None or state < 0.9 * limit:
        said += activation_fixes(run)
    return said


def wasted(run: setup.Run, record: dict[str, Any]) -> list[str]:
    """FLOPs, bytes and rows beyond the least."""
    said = []
    work, sent, waste = record.get("flops"), record.get("collectives"), record.get("waste")
    if work and work["ratio"] > WASTE:
        place, cost = next(iter(work["places"].items()))
        said.append(
            f"The step computes {work['ratio']:.2f} times the least. Its largest product, {place}, takes "
            f"{cost / work['compiled']:.0%} of it; compare flops.places with flops.parts_ideal."
        )
    if sent and (sent["exchange_ratio"] or 0) > EXTRA:
        said.append(
            f"The exchange sends {sent['exchange_ratio']:.2f} times the least: {exchange_fix(run)}"
        )
    if sent and sent["largest_weight_gather"] >= 1:
        said.append(
            "Some all-gather brings as much to one device as all experts of a layer have: spread E over more "
            "axes (mesh.rules=folded) instead of cutting D of the experts."
        )
    if waste and waste["drops"] > 0.01:
        said.append(
            f"At even random choices {waste['drops']:.1%} of them are dropped ({waste['what']})."
        )
    return said


def exchange_fix(run: setup.Run) -> str:
    """How to send fewer empty rows."""
    d, how = run.config.dispatch, resolved_exchange(run)
    if how == "all_gather":
        return "each device receives every token. Use dispatch.exchange=ragged or all_to_all."
    if d.name != "grouped":
        return (
            "empty slots travel too. Use dispatch.name=grouped with dispatch.exchange=ragged, or a smaller "
            "dispatch.capacity_factor."
        )
    if how == "all_to_all" and d.buffer_factor is None:
        return (
            "each part has room for all rows of its sender. Set dispatch.buffer_factor=1.25, which drops (and "
            "counts) what goes beyond, or dispatch.exchange=ragged where the devices have it."
        )
    return "dispatch.buffer_factor gives it room for more rows than there are; lower it if few are dropped."


def uncounted(record: dict[str, Any]) -> list[str]:
    """What the analysis of a text cannot know."""
    loops = record.get("unknown_loops")
    if not loops:
        return []
    return [
        f"Loops whose length depends on data count as one turn here ({', '.join(loops[:3])}): FLOPs, bytes and "
        "seconds do not hold. The grouped product has none on TPU and GPU, nor dispatch.backend=ragged_dot."
    ]
