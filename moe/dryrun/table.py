"""Dry runs side by side, as rows of a Markdown table."""

from collections.abc import Iterable, Mapping
from typing import Any

from moe.dryrun.show import count
from moe.units import duration, memory_size, sent_size

COLUMNS = (
    *("config", "model", "topology", "mesh, rules", "memory", "FLOPs compiled / least"),
    *("exchange sent / least", "largest weight gather", "roofline step", "tokens/s at best"),
    "compiled in",
)


def table(records: Iterable[Mapping[str, Any]]) -> str:
    """One row a record; a step that did not compile has no figures but its memory's."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *(_row(record) for record in records)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(r: Mapping[str, Any]) -> tuple[str, ...]:
    size = r["model"]
    mesh = " x ".join(f"{name} {n}" for name, n in r["mesh"].items()) or "one device"
    return (
        _config(r),
        f"{count(size['parameters_total'])}, {count(size['parameters_active'])} active",
        f"{r['target']}: {r['devices']} devices",
        f"{mesh}, {r['rules']}",
        _memory(r["memory"]),
        *_work(r),
        *_roofline(r.get("roofline")),
        f"{r['seconds_to_compile']:.0f} s",
    )


def _config(r: Mapping[str, Any]) -> str:
    changes = [f"{key}={value}" for key, value in r.get("overrides", {}).items()]
    return ", ".join([f"`{r.get('config', '')}`", *changes])


def _memory(m: Mapping[str, Any]) -> str:
    total = memory_size(m["total"]) if "total" in m else "more"
    limit = "" if m["limit"] is None else f" of {memory_size(m['limit'])}"
    return f"{'fits' if m['fits'] else 'does not fit'}: {total}{limit}"


def _work(r: Mapping[str, Any]) -> tuple[str, str, str]:
    if "flops" not in r:
        return ("-", "-", "-")
    sent, ratio = r["collectives"], r["collectives"]["exchange_ratio"]
    exchange = "-"
    if ratio is not None:
        exchange = f"{sent_size(sent['sums']['exchange'])}, {ratio:.2f}"
    gather = f"{sent['largest_weight_gather']:.3f} of a layer's experts"
    return (f"{r['flops']['compiled']:.3e}, {r['flops']['ratio']:.3f}", exchange, gather)


def _roofline(line: Mapping[str, Any] | None) -> tuple[str, str]:
    if line is None:
        return ("-", "-")
    return (f"{duration(line['step'])}, {line['bound']}", f"{line['tokens_per_second']:,.0f}")
