"""The words and numbers of a run's page: headline, config, evaluations and the coloured text."""

from collections.abc import Sequence
import colorsys
from typing import Any, NamedTuple

import numpy as np

from moe.report import page
from moe.report.records import Record, Run, last, series

SAMPLE_TOKENS = 2000  # shown of a sample
GOLDEN_ANGLE = 0.381966  # of a turn: neighbouring experts get far hues

# What the summary shows, where the config has it.
SUMMARY = (
    "steps",
    "seed",
    "model.num_layers",
    "model.width",
    "model.num_experts",
    "model.expert_width",
    "model.shared_experts",
    "model.pattern",
    "router.name",
    "router.k",
    "dispatch.name",
    "dispatch.capacity_factor",
    "losses.balance",
    "losses.z",
    "data.name",
    "data.tokenizer",
    "data.batch_size",
    "data.sequence_length",
    "optimizer.learning_rate",
)


class Sample(NamedTuple):
    """A piece of evaluated text and who took each token.

    Attributes:
        domain: where the text is from.
        tokens: as text, at most `SAMPLE_TOKENS`.
        experts: `[L][T][k]` expert numbers, -1 for none.
        colors: CSS colours, one an expert.
    """

    domain: str
    tokens: Sequence[str]
    experts: Sequence[Sequence[Sequence[int]]]
    colors: Sequence[str]


def headline(run: Run, evaluation: Record) -> list[tuple[str, str]]:
    """The few numbers that one looks for first: (label, value)."""
    train, valid = run.metrics.get("train", []), run.metrics.get("valid", [])
    model = evaluation.get("model", {})
    best = series(valid, "bits_per_byte")
    speed = series(train, "speed/tokens_per_second")
    every = [records[-1]["step"] for records in run.metrics.values()]
    found = (
        ("last step", max(every)),
        ("valid bits per byte", last(valid, "bits_per_byte")),
        ("best valid bits per byte", None if best is None else float(np.nanmin(best.values))),
        ("valid cross-entropy", last(valid, "loss/cross_entropy")),
        ("train cross-entropy", last(train, "loss/cross_entropy")),
        ("parameters", model.get("parameters_total")),
        ("active parameters", model.get("parameters_active")),
        ("tokens/s, median", None if speed is None else float(np.nanmedian(speed.values))),
        ("max violation", last(train, "routing/max_violation")),
        ("drop rate", last(train, "routing/drop_rate")),
        ("dead experts", last(train, "routing/dead_experts")),
    )
    return [(name, page.number(value)) for name, value in found if value is not None]


def main_keys(config: Record) -> list[tuple[str, str]]:
    """(key, value) of the config keys in `SUMMARY`, of config.json as it is."""
    resolved = config.get("config", {})
    found = ((key, _lookup(resolved, key)) for key in SUMMARY)
    return [(key, _text(value)) for key, value in found if value is not _MISSING]


_MISSING = object()


def _lookup(tree: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return _MISSING
        tree = tree[part]
    return tree


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def origin(config: Record) -> list[tuple[str, str]]:
    """What the run was made with: commit, device and versions."""
    found = [(key, str(config[key])) for key in ("commit", "device", "devices") if key in config]
    versions = config.get("versions")
    if isinstance(versions, dict):
        found.append(("versions", ", ".join(f"{k} {v}" for k, v in sorted(versions.items()))))
    return found


EVALUATION_KEYS = (
    ("loss/cross_entropy", "cross-entropy"),
    ("perplexity", "perplexity"),
    ("bits_per_byte", "bits per byte"),
    ("accuracy", "accuracy"),
    ("tokens", "tokens"),
)


def evaluation_rows(run: Run) -> list[tuple[str, list[str]]]:
    """A row a split and a row a domain of it: (name, values in the order of `EVALUATION_KEYS`)."""
    rows = []
    for split, record in sorted(run.evaluations.items()):
        step = record.get("step", "?")
        metrics = record.get("metrics", {})
        named = [(f"{split}, step {step}", metrics)]
        named += [(f"{split} · {d}", values) for d, values in record.get("domains", {}).items()]
        rows += [
            (name, [page.number(values.get(key)) for key, _ in EVALUATION_KEYS])
            for name, values in named
        ]
    return rows


def sample(evaluation: Record) -> Sample | None:
    """The evaluation's piece of text, or None where it has none."""
    sample = evaluation.get("sample") or {}
    tokens, experts = sample.get("tokens"), sample.get("experts")
    if not tokens or not experts:
        return None
    numbers = [e for layer in experts for token in layer for e in token]
    known = [len(load[0]) for load in (evaluation.get("domain_load") or {}).values()]
    count = max([*known, *(e + 1 for e in numbers)])
    return Sample(
        domain=str(sample.get("domain", "")),
        tokens=[_visible(token) for token in tokens[:SAMPLE_TOKENS]],
        experts=[layer[:SAMPLE_TOKENS] for layer in experts],
        colors=expert_colors(count),
    )


def _visible(token: str) -> str:
    """A token as it reads, with line ends, tabs and control characters made visible."""
    marked = token.replace("\n", "↵\n").replace("\t", "⇥   ")
    return "".join(c if c.isprintable() or c == "\n" else "·" for c in marked)


def expert_colors(count: int) -> list[str]:
    """Pale CSS colours, one an expert, that carry dark text; three lightnesses part near hues."""
    colors = []
    for e in range(count):
        lightness, saturation = ((0.80, 0.75), (0.70, 0.55), (0.88, 0.85))[e % 3]
        rgb = colorsys.hls_to_rgb((e * GOLDEN_ANGLE) % 1.0, lightness, saturation)
        colors.append("#" + "".join(f"{round(255 * c):02x}" for c in rgb))
    return colors
