"""Evaluations on disk: `eval/<split>-<step>.json`, a fixed interface."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from moe.data.tokenizers import Tokenizer
from moe.evaluation.evaluate import Evaluation, Sample
from moe.training.workdir import write_atomically

FRAMES_OF = {"patches": "image", "conv": "audio"}  # stem -> what its frames are


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
    stem: str | None = None,
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
        stem: kind of what makes positions of frames; None for text.

    Returns:
        Among the rest, both for models of experts: `modality_load`, modality -> `[L][E]` shares of
        its choices, where rows have text and frames; `favourites`, `[L][E]` lists of `[text of the
        token, choices, lift]`, where the vocabulary was counted.
    """
    tables = dict(evaluation.tables)
    favourites = tables.pop("routing/favourites", None)
    return {
        "step": step,
        "split": split,
        "metrics": evaluation.metrics | speed,
        "domains": evaluation.domains,
        "domain_load": evaluation.domain_load,
        "modality_load": _modality_load(tables, stem),
        "favourites": favourites and _in_words(favourites, tokenizer),
        "tables": tables,
        "model": model,
        "causality": causality,
        "sample": None
        if evaluation.sample is None
        else _sample_record(evaluation.sample, domains, tokenizer),
    }


def _modality_load(tables: dict[str, Any], stem: str | None) -> dict[str, Any]:
    """By the names of `TEXT` and `FRAMES`; empty where rows are of one modality."""
    if "routing/modalities" not in tables:
        return {}
    visits = np.asarray(tables["routing/modalities"], np.float64)  # [L M E]
    total = visits.sum(axis=-1, keepdims=True)
    share = np.divide(visits, total, out=np.zeros_like(visits), where=total > 0).round(4)
    names = ("text", FRAMES_OF.get(stem or "", "frames"))
    return {name: share[:, m].tolist() for m, name in enumerate(names)}


def _in_words(favourites: list, tokenizer: Tokenizer) -> list:
    return [
        [[[tokenizer.token_text(token), *rest] for token, *rest in rows] for rows in layer]
        for layer in favourites
    ]


def _sample_record(
    sample: Sample, domains: tuple[str, ...], tokenizer: Tokenizer
) -> dict[str, Any]:
    return {
        "domain": domains[sample.domain],
        "tokens": [tokenizer.token_text(int(token)) for token in sample.tokens],
        "experts": sample.experts.tolist(),
    }


def write_json(path: Path, record: Any) -> None:
    """Writes a file whole or not at all; numbers that are not finite are null, which JSON knows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(_finite(record), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def forget_records_after(workdir: Path, step: int) -> None:
    """Removes the records of evaluations in the loop that a run will do again."""
    for path in (workdir / "eval").glob("valid-*.json"):
        number = path.stem.removeprefix("valid-")
        if number.isdecimal() and int(number) > step:
            path.unlink()
