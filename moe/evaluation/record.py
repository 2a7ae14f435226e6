"""Evaluations on disk: `eval/<split>-<step>.json`, a fixed interface."""

import json
from pathlib import Path
from typing import Any

from moe.data.tokenizers import Tokenizer
from moe.evaluation.evaluate import Evaluation, Sample
from moe.training.workdir import write_atomically


def evaluation_record(
    evaluation: Evaluation,
    *,
    step: int,
    split: str,
    domains: tuple[str, ...],
    tokenizer: Tokenizer,
    model: dict[str, Any],
    causality: dict[str, Any],
    speed: dict[str, float],
) -> dict[str, Any]:
    """The JSON object of one evaluation.

    Args:
        evaluation: what was measured.
        step: optimiser steps of the checkpoint.
        split: "valid" or "test".
        domains: names by index.
        tokenizer: for the text of the sample.
        model: its size and cost, `cost_record`.
        causality: of the router, `causality_record`.
        speed: `speed/*` and `memory/*` of this evaluation.
    """
    return {
        "step": step,
        "split": split,
        "metrics": evaluation.metrics | speed,
        "domains": evaluation.domains,
        "domain_load": evaluation.domain_load,
        "tables": evaluation.tables,
        "model": model,
        "causality": causality,
        "sample": None
        if evaluation.sample is None
        else _sample_record(evaluation.sample, domains, tokenizer),
    }


def _sample_record(
    sample: Sample, domains: tuple[str, ...], tokenizer: Tokenizer
) -> dict[str, Any]:
    return {
        "domain": domains[sample.domain],
        "tokens": [tokenizer.token_text(int(token)) for token in sample.tokens],
        "experts": sample.experts.tolist(),
    }


def write_json(path: Path, record: Any) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record, indent=1, allow_nan=False) + "\n")
