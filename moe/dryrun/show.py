"""A dry run as text, and the difference of two."""

from collections.abc import Iterator, Mapping
from typing import Any

from moe.units import duration, memory_size, sent_size

ROWS = 8


def show(record: Mapping[str, Any]) -> str:
    """The record as a page of text."""
    return "\n".join(_lines(record))


def _lines(r: Mapping[str, Any]) -> Iterator[str]:
    mesh = " x ".join(f"{name} {size}" for name, size in r["mesh"].items()) or "one device"
    model = r["model"]
    yield (
        f"{r['target']}: {r['devices']} devices, {mesh}, rules {r['rules']}; "
        f"{count(model['parameters_total'])} parameters, {count(model['parameters_active'])} active; "
        f"{r['tokens']:,} tokens a step; compiled in {r['seconds_to_compile']:.0f} s. A device and a step:"
    )
    yield from _memory(r["memory"], r.get("peak"))
    if "flops" in r:
        yield from _flops(r["flops"])
        yield from _network(r["collectives"])
        yield from _roofline(r)
        yield from _buffers(r["buffers"])
    waste = r["waste"]
    if waste:
        yield (
            f"waste      at even random choices {waste['drops']:.2%} dropped, {waste['padding']:.1%} of rows "
            f"empty ({waste['what']})"
        )
    for sentence in r["advice"]:
        yield f"advice     {sentence}"


def count(number: int | float) -> str:
    """A number of parameters: `46.70B`, `6.2M`."""
    if number >= 1e9:
        return f"{number / 1e9:.2f}B"
    return f"{number / 1e6:.1f}M" if number >= 1e6 else f"{number:,.0f}"


def _memory(m: Mapping[str, Any], peak: Mapping[str, Any] | None) -> Iterator[str]:
    limit = "unknown" if m["limit"] is None else memory_size(m["limit"])
    total = memory_size(m["total"]) if "total" in m else "refused by the compiler, size unstated,"
    yield f"memory     {'fits' if m['fits'] else 'DOES NOT FIT'}: {total} of {limit}"
    state = m["state"]
    parts = [f"{name} {memory_size(state[name])}" for name in ("params", "optimizer", "router")]
    if "temp" in m:
        parts.append(f"temporaries {memory_size(m['temp'])}")
    if peak:
        held = ", ".join(f"{name} {memory_size(size)}" for name, size in peak["by"].items())
        parts.append(f"at the peak (estimated {memory_size(peak['bytes'])}): {held}")
    yield "           " + "; ".join(parts)
    for line in m.get("compiler", "").strip().splitlines()[:1]:
        yield f"           {line[:300]}"


def _flops(f: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"FLOPs      {f['compiled']:.3e} compiled, {f['ideal']:.3e} least (recomputation "
        f"{f['recompute_ideal']:.2e} of it): ratio {f['ratio']:.3f}; skipping masked pairs of attention would "
        f"save {f['causal_saving']:.2e}"
    )
    if f["tile_padding"]:
        yield (
            f"           kernels counted at even load, {f['kernel_share']:.0%} of their buffers; tiles add "
            f"{f['tile_padding']:.1%} of these rows"
        )
    for place, cost in list(f["places"].items())[:ROWS]:
        yield f"           {cost / f['compiled']:>6.1%}  {place}"


def _network(n: Mapping[str, Any]) -> Iterator[str]:
    yield "network    bytes sent          axes             phase      times"
    for row in n["rows"][:ROWS]:
        yield (
            f"           {sent_size(row['bytes']):>10} {row['kind']:<20} {'x'.join(row['axes']) or '-':<16} "
            f"{row['phase']:<10} {row['count']:>5}  {row['source']}"
        )
    for purpose, sent in n["sums"].items():
        least = n["least"].get(purpose)
        against = f", {sent_size(least)} least: {sent / least:.2f} x" if least else ""
        if sent or least:
            yield f"           {purpose}: {sent_size(sent)} sent{against}"


def _roofline(r: Mapping[str, Any]) -> Iterator[str]:
    line = r.get("roofline")
    if line is None:
        return
    parts = ", ".join(
        f"{n.replace('_', ' ')} {duration(line[n])}"
        for n in ("compute", "memory", "network", "slow_network")
    )
    yield (
        f"roofline   {duration(line['step'])} if all overlaps, {duration(line['in_turn'])} if nothing does "
        f"({parts}); bound by {line['bound']}; at best {line['tokens_per_second']:,.0f} tokens/s, "
        f"{line['utilisation']:.0%} of the peak useful ({line['source']})"
    )


def _buffers(buffers: list[Mapping[str, Any]]) -> Iterator[str]:
    yield "largest at the peak"
    for each in buffers[:ROWS]:
        yield (
            f"           {memory_size(each['bytes']):>10} {each['shape']:<28} {each['phase']:<10} "
            f"{each['source'] or each['op'][-60:]}"
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Every number that two records share and that is not the same, with their ratio."""
    before, after = dict(numbers(old)), dict(numbers(new))
    lines = [f"{'':<44}{old['target']:>16}{new['target']:>16}   ratio"]
    for key in before:
        if key in after and before[key] != after[key]:
            ratio = f"{after[key] / before[key]:8.3f}" if before[key] else "        "
            lines.append(f"{key:<44}{before[key]:>16.4g}{after[key]:>16.4g}{ratio}")
    missing = sorted(set(before) ^ set(after))
    if missing:
        lines.append(f"only in one of them: {', '.join(missing)}")
    return "\n".join(lines)


SKIP = ("versions", "rows", "buffers", "places", "seconds_to_compile", "advice", "dispatch")


def numbers(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """`(dotted key, number)` of everything comparable."""
    for key, value in record.items():
        if key in SKIP:
            continue
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + key, float(value)
