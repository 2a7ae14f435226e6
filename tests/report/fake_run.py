"""Writes a workdir as a training run leaves it, with plausible numbers and no training."""

import json
import math
from pathlib import Path

import numpy as np

CODE = '''def mean(values):
    """The mean of a list; <b>raises</b> on an empty one & on text."""
    if not values:
        raise ValueError("mean of nothing")
    return sum(values) / len(values)


class Stack:
    def push(self, item):
        self.items.append(item)
'''

SCALARS = (
    "max_violation",
    "min_violation",
    "load_cv",
    "load_entropy",
    "effective_experts",
    "effective_experts_inverse_square",
    "gini",
    "dead_experts",
    "drop_rate",
    "entropy",
    "confidence",
    "margin",
    "logit_max",
    "lse_squared",
)


def load_at(rng: np.random.Generator, progress: float, layers: int, experts: int) -> np.ndarray:
    """Loads `[L E]` that start uneven and settle."""
    taste = rng.normal(size=(layers, experts))
    logits = taste * (1.2 * math.exp(-4 * progress) + 0.12) + 0.05 * rng.normal(
        size=(layers, experts)
    )
    weights = np.exp(logits)
    return weights / weights.sum(axis=1, keepdims=True)


def routing_metrics(load: np.ndarray, progress: float) -> dict:
    layers, experts = load.shape
    violation = load.max(axis=1) * experts - 1
    per_layer = {name: [0.0] * layers for name in SCALARS}
    per_layer["max_violation"] = violation.tolist()
    per_layer["entropy"] = [
        math.log(experts) * (1 - (0.3 + 0.06 * i) * (1 - math.exp(-3 * progress)))
        for i in range(layers)
    ]
    per_layer["drop_rate"] = (0.06 * violation).clip(0, 1).tolist()
    per_layer["dead_experts"] = (load * experts < 0.2).sum(axis=1).astype(float).tolist()
    means = {f"routing/{name}": float(np.mean(v)) for name, v in per_layer.items()}
    return {
        **means,
        **{f"routing/per_layer/{name}": v for name, v in per_layer.items()},
        "routing/load": load.tolist(),
    }


def train_record(
    rng: np.random.Generator, step: int, steps: int, layers: int, experts: int
) -> dict:
    progress = step / steps
    loss = 1.35 + 4.1 * math.exp(-7 * progress) + 0.03 * float(rng.normal())
    record = {
        "step": step,
        "split": "train",
        "loss/total": loss + 0.02,
        "loss/cross_entropy": loss,
        "loss/balance": 0.01 * (1 + math.exp(-5 * progress)),
        "loss/z": 0.004 * (1 - math.exp(-5 * progress)),
        "bits_per_byte": loss / math.log(2),
        "accuracy": 0.62 - 0.5 * math.exp(-6 * progress),
        "learning_rate": 3e-3
        * (min(1.0, step / (0.1 * steps)) * (0.55 + 0.45 * math.cos(math.pi * progress))),
        "grad_norm": 0.4 + 2 * math.exp(-8 * progress) + 0.1 * float(rng.exponential()),
        "speed/tokens_per_second": 8200 + 300 * float(rng.normal()),
        "speed/step_seconds": 0.5 + 0.02 * float(rng.normal()),
        "speed/mfu": 0.31 + 0.01 * float(rng.normal()),
        "speed/data_wait_seconds": 0.002 * float(rng.exponential()),
    }
    if experts:
        rng_load = np.random.default_rng(7)
        load = load_at(rng_load, progress, layers, experts)
        record.update(routing_metrics(load, progress))
    return record


SPECIALISATION = (
    *("coactivation", "domain_information", "domain_divergence", "position_information"),
    *("vocabulary_inputs", "vocabulary_predictions", "router_similarity", "weight_similarity"),
    *("skip_rate", "choices", "saturation", "churn"),
    *(
        f"{kind}_information{name}"
        for kind in ("domain", "modality")
        for name in ("_shuffled", "_excess", "_share")
    ),
    "modality_information",
)


def specialisation(rng: np.random.Generator, layers: int) -> dict:
    per_layer = {name: rng.random(layers) for name in SPECIALISATION}
    means = {f"routing/{name}": float(v.mean()) for name, v in per_layer.items()}
    lists = {f"routing/per_layer/{name}": v.tolist() for name, v in per_layer.items()}
    return means | lists | {"routing/path_entropy": 5.0, "routing/unique_paths": 640.0}


def coactivation(rng: np.random.Generator, layers: int, experts: int) -> list:
    together = 0.3 * rng.random((layers, experts, experts)).round(4)
    together[:, np.arange(experts), np.arange(experts)] = 1.0
    return together.tolist()


def favourites(rng: np.random.Generator, layers: int, experts: int) -> list:
    """Lists of `[token, choices, lift]` that get shorter from expert to expert."""
    words = [
        "the",
        " of",
        "\n",
        "def",
        "\t",
        "a very long token that nobody wants to read",
        "é",
        "\x00",
    ]
    return [
        [
            [[w, int(rng.integers(10, 5000)), 4.0 - 0.3 * i] for i, w in enumerate(words[e % 9 :])]
            for e in range(experts)
        ]
        for _ in range(layers)
    ]


def triad() -> dict:
    score = {"value": 0.861, "low": 0.842, "high": 0.879, "n": 2000}
    return {
        "primary": "accuracy",
        "accuracy": {"f1": {**score, "value": 0.855}, "accuracy": score},
        "cost": {"parameters_total": 3_412_992, "examples_per_second": 812.5},
        "generalisation": {"noise:2": {"accuracy": {**score, "value": 0.8, "difference": -0.061}}},
    }


def write_evaluation(
    workdir: Path, step: int, layers: int, experts: int, domains: tuple[str, ...], k: int = 2
) -> None:
    rng = np.random.default_rng(3)
    metrics = {
        "loss/cross_entropy": 1.42,
        "perplexity": math.exp(1.42),
        "bits_per_byte": 2.05,
        "accuracy": 0.6,
    }
    domain = {**metrics, "tokens": 40_000}
    tokens = list(CODE)
    record = {
        "step": step,
        "split": "valid",
        "metrics": metrics,
        "domains": dict.fromkeys(domains, domain),
        "model": {
            "parameters_total": 3_412_992,
            "parameters_active": 1_204_224,
            "flops_per_token": 7.2e6,
        },
    }
    if experts:
        record["domain_load"] = {
            name: rng.dirichlet(np.full(experts, 1.5), size=layers).tolist() for name in domains
        }
        by_character = rng.integers(0, experts, size=(layers, 256, k))
        record["sample"] = {
            "domain": domains[0],
            "tokens": tokens,
            "experts": [
                [
                    [-1] * k if t % 41 == 40 else layer[ord(c) % 256].tolist()
                    for t, c in enumerate(tokens)
                ]
                for layer in by_character
            ],
        }
        record["metrics"] = metrics | specialisation(rng, layers)
        record["tables"] = {"routing/coactivation": coactivation(rng, layers, experts)}
        record["favourites"] = favourites(rng, layers, experts)
        record["modality_load"] = {
            name: rng.dirichlet(np.full(experts, 1.5), size=layers).tolist()
            for name in ("text", "image")
        }
        record["triad"] = triad()
        record["model"]["flops_executed"] = 6.9e6
        record["causality"] = {"router": "C0", "causal_form": True}
        steps = list(range(step // 4, step, step // 4))
        shares = np.linspace(0.4, 0.9, len(steps))[:, None] * np.ones(layers)
        record["saturation"] = {"steps": steps, "per_layer": shares.tolist()}
    (workdir / "eval").mkdir(exist_ok=True)
    (workdir / "eval" / f"valid-{step}.json").write_text(json.dumps(record))


def write_run(
    workdir: Path,
    *,
    steps: int = 400,
    every: int = 10,
    layers: int = 4,
    experts: int = 8,
    domains: tuple[str, ...] = ("code", "prose"),
    evaluated: bool = True,
) -> Path:
    """A workdir of a sparse run, or of a dense one with `experts=0`."""
    workdir.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    lines = []
    for step in range(every, steps + 1, every):
        lines.append(train_record(rng, step, steps, layers, experts))
        if evaluated and step % (10 * every) == 0:
            loss = lines[-1]["loss/cross_entropy"] + 0.06
            lines.append(
                {
                    "step": step,
                    "split": "valid",
                    "loss/cross_entropy": loss,
                    "bits_per_byte": loss / math.log(2),
                    "accuracy": lines[-1]["accuracy"] - 0.02,
                    "perplexity": math.exp(loss),
                    **(specialisation(rng, layers) if experts else {}),
                }
            )
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {
        "seed": 0,
        "steps": steps,
        "log_every": every,
        "model": {
            "num_layers": layers,
            "width": 128,
            "num_experts": experts,
            "expert_width": 192,
            "pattern": ["sparse"],
        },
        "router": {"name": "topk", "k": 2},
        "dispatch": {"name": "grouped", "capacity_factor": None},
        "data": {"name": "stdlib", "batch_size": 16, "sequence_length": 256, "tokenizer": "bytes"},
        "losses": {"balance": 0.01, "z": 0.001},
        "optimizer": {"learning_rate": 3e-3},
    }
    document = {
        "config": config,
        "versions": {"jax": "0.10.2", "flax": "0.12.8"},
        "commit": "0" * 40,
        "device": "cpu",
        "devices": 1,
    }
    (workdir / "config.json").write_text(json.dumps(document))
    if evaluated:
        write_evaluation(workdir, steps, layers, experts, domains)
    return workdir
