"""Scores of matching: how often the right partner is among the nearest, and the best of a few."""

from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

from jaxtyping import Bool, Float, Int
import numpy as np

_BLOCK = 512  # queries that are compared with all candidates at a time


class Pairs(NamedTuple):
    """`n` pairs of a query and a candidate. Equal candidates are one, and right for the same queries."""

    query: Float[np.ndarray, "n D"]  # of unit length
    query_id: Int[np.ndarray, " n"]  # equal where queries are equal
    candidate: Float[np.ndarray, "C D"]  # of unit length, each once
    partner: Int[np.ndarray, " n"]  # number of each query's own candidate


def make_pairs(
    embedding: Float[np.ndarray, "n 2 D"],
    sources: Sequence[Hashable],
    targets: Sequence[Hashable],
    *,
    backward: bool = False,
) -> Pairs:
    """Pairs from the embeddings of both segments.

    Args:
        embedding: of the source and the target of each example, of any length.
        sources: what each source is, to find equal ones.
        targets: what each target is.
        backward: looks for the source of a target instead.
    """
    size = np.linalg.norm(embedding, axis=-1, keepdims=True)
    unit = np.asarray(embedding / np.maximum(size, 1e-12), np.float32)
    ends = [(unit[:, 0], _numbered(sources)), (unit[:, 1], _numbered(targets))]
    (query, query_id), (candidate, candidate_id) = reversed(ends) if backward else ends
    _, first, partner = np.unique(candidate_id, return_index=True, return_inverse=True)
    return Pairs(query, query_id, candidate[first], partner.reshape(-1))


def _numbered(keys: Sequence[Hashable]) -> Int[np.ndarray, " n"]:
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)


def _blocks(
    pairs: Pairs,
) -> Iterator[tuple[Int[np.ndarray, " q"], Float[np.ndarray, "q C"], Bool[np.ndarray, "q C"]]]:
    """Queries, their similarities, and which candidates are right for them."""
    order = np.argsort(pairs.query_id, kind="stable")
    sorted_ids = pairs.query_id[order]
    for first in range(0, len(pairs.query), _BLOCK):
        rows = np.arange(first, min(first + _BLOCK, len(pairs.query)))
        right = np.zeros((len(rows), len(pairs.candidate)), bool)
        low = np.searchsorted(sorted_ids, pairs.query_id[rows], "left")
        high = np.searchsorted(sorted_ids, pairs.query_id[rows], "right")
        for i, (begin, end) in enumerate(zip(low, high, strict=True)):
            right[i, pairs.partner[order[begin:end]]] = True
        yield rows, pairs.query[rows] @ pairs.candidate.T, right


def ranks(pairs: Pairs) -> Int[np.ndarray, " n"]:
    """How many wrong candidates are at least as near as the nearest right one, for each query.

    A tie counts against the model: embeddings that are all alike find nothing.
    """
    found = np.zeros(len(pairs.query), np.int64)
    for rows, similar, right in _blocks(pairs):
        best = np.where(right, similar, -np.inf).max(axis=1, keepdims=True)
        found[rows] = ((similar >= best) & ~right).sum(axis=1)
    return found


def choices(pairs: Pairs, ways: int, seed: int = 0) -> Bool[np.ndarray, " n"] | None:
    """Whether each query's own candidate is nearer than `ways - 1` wrong ones, drawn by `seed`.

    Returns:
        None where some query has fewer wrong candidates than that.
    """
    rng, hit = np.random.default_rng(seed), np.zeros(len(pairs.query), bool)
    for rows, similar, right in _blocks(pairs):
        if ((~right).sum(axis=1) < ways - 1).any():
            return None
        # The wrong candidates with the smallest random numbers are a draw without replacement.
        lot = np.where(right, np.inf, rng.random(right.shape))
        drawn = np.argpartition(lot, ways - 2, axis=1)[:, : ways - 1]
        own = similar[np.arange(len(rows)), pairs.partner[rows]]
        hit[rows] = (np.take_along_axis(similar, drawn, axis=1) < own[:, None]).all(axis=1)
    return hit
