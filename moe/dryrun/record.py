"""The record of a dry run: one JSON-ready dict, the same keys for every target."""

from collections import defaultdict
from typing import Any

from moe import setup
from moe.dryrun import buffers, collectives, counts, flops, hlo, ideal, roofline, traffic
from moe.dryrun.advice import advice
from moe.dryrun.build import Compiled, used_and_limit
from moe.dryrun.network import network
from moe.dryrun.targets import Target
from moe.dryrun.waste import expected_waste, local_tokens, tile_padding
from moe.model.build import model_size
from moe.training.state import abstract_state
from moe.training.workdir import package_versions

XLA_PRODUCTS = ("dot", "ragged-dot", "convolution", "cublas")
TOP = 12


def make_record(target: Target, compiled: Compiled) -> dict[str, Any]:
    """Everything the dry run found, per device and step unless said otherwise; bytes, FLOPs, seconds."""
    run, config = compiled.run, compiled.run.config
    tokens = config.data.batch_size * config.data.sequence_length
    size = model_size(run.spec, config.data.sequence_length)
    record: dict[str, Any] = {
        "target": target.name,
        "devices": run.mesh.size,
        "mesh": {name: int(n) for name, n in run.mesh.shape.items() if n > 1},
        "rules": config.mesh.rules,
        "dispatch": config.dispatch.to_dict(),
        "tokens": tokens,
        "model": {
            "parameters_total": size.parameters_total,
            "parameters_active": size.parameters_active,
        },
        "seconds_to_compile": compiled.seconds,
        "versions": package_versions(),
    }
    shapes = abstract_state(run.spec, run.transformation, run.shardings)
    record["memory"] = memory(target, compiled, ideal.state_bytes(run.shardings, shapes))
    record["waste"] = _named(expected_waste(run, tokens))
    if compiled.text is not None:
        record |= measured(target, run, hlo.parse(compiled.text), tokens, record["memory"])
    record["advice"] = advice(run, record)
    return record


def memory(target: Target, compiled: Compiled, state: dict[str, int]) -> dict[str, Any]:
    """What fills the memory of a device, and whether it fits.

    It fits if the compiler did not refuse it and the total is within the published size. XLA:TPU keeps
    some of that for itself and refuses what needs it; XLA:CUDA refuses nothing.
    """
    limit = target.figures.memory if target.figures else None
    parts: dict[str, Any] = {"limit": limit, "state": state}
    if compiled.memory is None:
        parts |= {"fits": False, "compiler": (compiled.failure or "")[:4000]}
        wanted = used_and_limit(compiled.failure or "")
        return parts | ({} if wanted is None else {"total": wanted[0], "limit": wanted[1]})
    m = compiled.memory
    total = m["argument"] + m["output"] - m["alias"] + m["temp"] + m["generated_code"]
    parts |= {"fits": limit is None or total <= limit, "total": total, **m}
    return parts


def measured(
    target: Target, run: setup.Run, module: hlo.Module, tokens: int, memory: dict[str, Any]
) -> dict[str, Any]:
    """What the compiled module does."""
    found = collectives.collectives(module, dict(run.mesh.shape))
    work = products(run, module, tokens)
    moved = traffic.memory_traffic(module)
    out = {
        "flops": work,
        "memory_traffic": moved,
        "collectives": network(run, found, tokens),
        "unknown_loops": unknown_loops(module),
        **at_peak(module),
    }
    if target.figures is not None:
        line = roofline.roofline(target.figures, run.mesh, work["compiled"], float(moved), found)
        useful = work["ideal"] - work["recompute_ideal"]
        out["roofline"] = line._asdict() | {
            "step": line.seconds,
            "bound": line.bound,
            "in_turn": sum(line),
            "tokens_per_second": tokens / line.seconds,
            "utilisation": roofline.utilisation(target.figures, useful, line.seconds),
            "source": target.figures.source,
        }
    return out


def products(run: setup.Run, module: hlo.Module, tokens: int) -> dict[str, Any]:
    """FLOPs of the compiled step against the least, and where they are spent.

    A grouped kernel has a fixed number of rows and works on those that its sizes name: it counts with
    the rows of even load (`kernel_share` of its buffer), without `tile_padding`, the rows that it
    multiplies beyond them where groups meet in a tile, over the rows of even load.
    """
    S = run.config.data.sequence_length
    parts = ideal.ideal_parts(run.spec, tokens, S)
    n = run.mesh.size
    least = sum(part.total for part in parts) / n
    again = sum(part.recompute for part in parts) / n
    found = flops.products(module)
    rows = kernel_rows(found)
    even = local_tokens(run, tokens) * run.spec.router.k
    share = min(even / rows, 1.0) if rows else 1.0
    spent: dict[str, float] = defaultdict(float)
    phases: dict[str, float] = defaultdict(float)
    for each in found:
        cost = each.flops_each * each.count * (share if is_kernel(each) else 1.0)
        spent[_place(each)] += cost
        phases[each.phase] += cost
    compiled = sum(spent.values())
    return {
        "compiled": compiled,
        "ideal": least,
        "ratio": compiled / least,
        "recompute_ideal": again,
        "causal_saving": ideal.causal_saving(run.spec, tokens, S) / n,
        "kernel_share": share,
        "tile_padding": tile_padding(run, rows, even) if rows else 0.0,
        "phases": dict(phases),
        "parts_ideal": {part.name: part.total / n for part in parts},
        "places": dict(sorted(spent.items(), key=lambda kv: -kv[1])[:TOP]),
    }


def is_kernel(product: flops.Product) -> bool:
    """Whether it is a grouped product by a kernel of ours, whose work follows its sizes."""
    return product.kind not in XLA_PRODUCTS


def kernel_rows(found: list[flops.Product]) -> int:
    """Rows that the buffers of the grouped kernels have room for; 0 without such kernels."""
    return max(
        (
            shape.dims[0]
            for each in found
            if is_kernel(each)
            for shape in each.shapes[-1:]
            if len(shape.dims) == 2
        ),
        default=0,
    )


def unknown_loops(module: hlo.Module) -> list[str]:
    """Loops whose trips depend on data, by their line or name; everything in them counts once."""
    names = set(counts.count(module).unknown)
    found = {
        str(module.source(module.described(computation, each)) or each.name)
        for computation in module.computations.values()
        for each in computation
        if each.opcode == "while" and each.name in names
    }
    return sorted(found)


def at_peak(module: hlo.Module) -> dict[str, Any]:
    """The moment that needs most temporary memory, and the largest arrays of the step."""
    moment = buffers.peak(module)
    kinds: dict[str, int] = defaultdict(int)
    for each in moment.buffers:
        kinds[_kind(each)] += each.bytes
    return {
        "peak": {"bytes": moment.bytes, "at": moment.at, "by": dict(kinds)},
        "buffers": [_buffer(each) for each in moment.buffers[:TOP]],
    }


def _kind(each: buffers.Buffer) -> str:
    """Activations wait for the backward pass; gradients and work of the moment are temporaries."""
    return "activations" if each.phase == "forward" else "temporaries"


def _buffer(each: buffers.Buffer) -> dict[str, Any]:
    return {
        "bytes": each.bytes,
        "shape": str(each.shape).split("{")[0],
        "phase": each.phase,
        "source": str(each.source or ""),
        "op": each.op_name,
    }


def _place(each: flops.Product) -> str:
    last = "/".join(each.op_name.split("/")[-2:])
    return f"{each.source or ''} {last} ({each.phase})".strip()


def _named(value: Any) -> dict[str, Any] | None:
    return None if value is None else value._asdict()
