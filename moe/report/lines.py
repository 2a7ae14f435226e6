"""What a run says of a step and of an evaluation: the line of metrics.jsonl, and the one for people."""

from typing import Any

import jax

from moe.evaluation.evaluate import quality
from moe.routing.metrics import summarize
from moe.training.step import StepMetrics


def train_values(told: StepMetrics) -> dict[str, Any]:
    """The line of metrics.jsonl of one step: quality before the update, losses, routing."""
    told = jax.device_get(told)
    values = {f"loss/{name}": float(value) for name, value in told.losses.items()}
    values |= {k: v for k, v in quality(told.rows).items() if k not in ("perplexity", "tokens")}
    values |= {"learning_rate": float(told.learning_rate), "grad_norm": float(told.grad_norm)}
    values |= {"guards/skipped": int(told.guard.skipped)}
    return values if told.totals is None else values | summarize(told.totals)


def describe(record: dict[str, Any]) -> str:
    """One line of an evaluation."""
    m = record["metrics"]
    text = f"{record['split']} at step {record['step']}: "
    if "bits_per_byte" in m:
        text += f"{m['bits_per_byte']:.4f} bits per byte, "
    text += f"cross-entropy {m['loss/cross_entropy']:.4f}, accuracy {m['accuracy']:.4f}"
    if "routing/max_violation" in m:
        text += f", max violation {m['routing/max_violation']:.2f}"
    if "routing/causal_gap" in m:
        text += f", causal gap {m['routing/causal_gap']:+.4f}"
    if record["causality"]["causal_form"] is False:
        text += ", no causal form: not the loss of a model that can generate"
    return text
