"""Paths through the depth (M18): which experts a token met in all layers, and what that costs."""

from typing import NamedTuple

from jaxtyping import Bool, Float, Int, Shaped
import numpy as np

from moe.evaluation.routing_analysis import entropy


class Paths(NamedTuple):
    """Different paths, as 64-bit fingerprints in ascending order, and how many tokens took each."""

    path: Shaped[np.ndarray, " N"]  # uint64
    tokens: Int[np.ndarray, " N"]


def add(a: Paths, b: Paths) -> Paths:
    """The paths of two batches."""
    path, where = np.unique(np.concatenate([a.path, b.path]), return_inverse=True)
    tokens = np.zeros(len(path), np.int64)
    np.add.at(tokens, where, np.concatenate([a.tokens, b.tokens]))
    return Paths(path, tokens)


def fingerprint_table(layers: int, num_experts: int) -> Shaped[np.ndarray, "L E W"]:
    """Fixed random numbers, uint32, `W` = 2 halves: a path's fingerprint is the sum of its experts'.

    A sum does not depend on the order of a token's choices. Two paths of N collide with
    probability N^2 / 2^65: 3e-8 for a million.
    """
    return np.random.default_rng(0).integers(0, 2**32, (layers, num_experts, 2), np.uint32)


def path_counts(
    choices: Int[np.ndarray, "L B S K"], valid: Bool[np.ndarray, "B S"], num_experts: int
) -> Paths:
    """Counts the paths of the valid tokens; layers that a token skips are part of its path."""
    table = fingerprint_table(len(choices), num_experts)
    halves = np.zeros((*valid.shape, 2), np.uint32)
    for layer, expert in zip(table, choices, strict=True):
        found = np.where((expert >= 0)[..., None], layer[np.maximum(expert, 0)], np.uint32(0))
        halves += found.sum(axis=2, dtype=np.uint32)
    return count_fingerprints(halves[valid])


def count_fingerprints(halves: Shaped[np.ndarray, "N W"]) -> Paths:
    """Counts fingerprints that stand as two uint32 each."""
    whole = halves[:, 0].astype(np.uint64) << np.uint64(32) | halves[:, 1].astype(np.uint64)
    path, tokens = np.unique(whole, return_counts=True)
    return Paths(path, tokens.astype(np.int64))


def path_metrics(paths: Paths) -> dict[str, float]:
    """`path_entropy` in nats and `unique_paths`, different paths per 1,000 tokens.

    Both grow with the number of tokens until all paths are seen: compare equal amounts of text.
    """
    total = max(int(paths.tokens.sum()), 1)
    return {
        "path_entropy": float(entropy(paths.tokens / total)),
        "unique_paths": 1000.0 * len(paths.path) / total,
    }


def mean_k(
    requested: Shaped[np.ndarray, "L E"], tokens: Shaped[np.ndarray, " L"]
) -> Float[np.ndarray, " L"]:
    """Choices a token, layer by layer; 0 without tokens."""
    return requested.sum(axis=-1) / np.maximum(tokens, 1)


def skip_rate(
    ran: Shaped[np.ndarray, " L"], tokens: Shaped[np.ndarray, " L"] | float
) -> Float[np.ndarray, " L"]:
    """Share of tokens that pass a layer by: `ran` tokens went through it."""
    tokens = np.broadcast_to(np.asarray(tokens, np.float64), ran.shape)
    return np.where(tokens > 0, 1.0 - ran / np.maximum(tokens, 1.0), 0.0)


def executed_flops(
    kept: Shaped[np.ndarray, "L E"],
    tokens: float,
    *,
    expert_flops: Shaped[np.ndarray, " E"] | float,
    other_flops: float,
) -> float:
    """Forward FLOPs a token that were spent, drops and skipped experts not among them.

    Args:
        kept: choices that reached their expert.
        tokens: over which to divide.
        expert_flops: of one token in one expert; an array where experts differ (0 for a copy).
        other_flops: of one token in all the rest of the model.
    """
    return other_flops + float((kept * np.asarray(expert_flops)).sum()) / max(tokens, 1.0)


def prior_entropy(prior: Float[np.ndarray, "*L E"]) -> Float[np.ndarray, "*L"]:
    """Entropy in nats of a prior over modules; ln E before it has learned anything."""
    return entropy(np.asarray(prior, np.float64))
