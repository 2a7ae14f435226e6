"""Bits a byte of texts: the standard library's compressors, and byte n-grams."""

import bz2
from collections.abc import Callable, Sequence
import gzip
import lzma
from typing import NamedTuple

import numpy as np

END = 256  # the symbol before and after every text
SYMBOLS = 257
_BITS = 9  # of a symbol in a key

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, 9, mtime=0),
    "bz2": lambda data: bz2.compress(data, 9),
    "xz": lambda data: lzma.compress(data, preset=9),
}


def compressed_bits(data: bytes, compress: Callable[[bytes], bytes], before: bytes = b"") -> float:
    """Bits a byte that `data` adds to the compressed `before`."""
    start = len(compress(before)) if before else 0
    return 8 * (len(compress(before + data)) - start) / len(data)


class Order(NamedTuple):
    """Counts of the n-grams of one length, sorted by key."""

    keys: np.ndarray  # n-grams [J] uint64
    counts: np.ndarray  # [J]
    contexts: np.ndarray  # n-grams without their last symbol [I] uint64
    totals: np.ndarray  # sum of `counts` by context [I]
    kinds: np.ndarray  # different last symbols by context [I]
    discount: float


def symbols(texts: Sequence[bytes], history: int) -> tuple[np.ndarray, np.ndarray]:
    """All texts as one row of symbols, each behind `history` times END and before one.

    Returns:
        Symbols [T] uint64, and the positions [P] of those to predict: all bytes and the last ENDs.
    """
    before, after = np.full(history, END, np.uint64), np.full(1, END, np.uint64)
    parts = [(before, np.frombuffer(text, np.uint8).astype(np.uint64), after) for text in texts]
    row = np.concatenate([part for text in parts for part in text])
    predicted = np.concatenate([_told(len(text), history) for text in texts])
    return row, np.flatnonzero(predicted)


def _told(length: int, history: int) -> np.ndarray:
    told = np.ones(history + length + 1, bool)
    told[:history] = False
    return told


def ngram_keys(row: np.ndarray, positions: np.ndarray, length: int) -> np.ndarray:
    """The `length` symbols that end at each position as one number [P] uint64."""
    keys = np.zeros(len(positions), np.uint64)
    for back in range(length - 1, -1, -1):
        keys = (keys << np.uint64(_BITS)) | row[positions - back]
    return keys


def kneser_ney(texts: Sequence[bytes], length: int) -> list[Order]:
    """Interpolated Kneser-Ney counts of n-grams of 1 to `length` bytes.

    The longest are counted as they occur; a shorter one counts once for each different symbol
    before it (Kneser and Ney 1995; Chen and Goodman 1999, section 2.7). The discount of a length
    is n1 / (n1 + 2 n2), with n1 and n2 the numbers of n-grams counted once and twice.

    Args:
        texts: at least one, of bytes.
        length: of the longest n-gram, at most 7 (a key has 64 bits).

    Returns:
        One Order for each length, the shortest first.
    """
    if not 1 <= length <= 7:
        raise ValueError(f"n-grams of {length} symbols: 1 to 7 have keys of 64 bits.")
    row, positions = symbols(texts, length)
    keys, counts = np.unique(ngram_keys(row, positions, length), return_counts=True)
    orders = [_order(keys, counts)]
    for shorter in range(length - 1, 0, -1):
        mask = np.uint64((1 << (_BITS * shorter)) - 1)
        keys, counts = np.unique(keys & mask, return_counts=True)
        orders.append(_order(keys, counts))
    return orders[::-1]


def _order(keys: np.ndarray, counts: np.ndarray) -> Order:
    contexts, starts, kinds = np.unique(
        keys >> np.uint64(_BITS), return_index=True, return_counts=True
    )
    once, twice = np.sum(counts == 1), np.sum(counts == 2)
    discount = once / (once + 2 * twice) if once else 0.5
    return Order(keys, counts, contexts, np.add.reduceat(counts, starts), kinds, float(discount))


def ngram_bits(orders: Sequence[Order], texts: Sequence[bytes]) -> np.ndarray:
    """Bits of each text, its end included [n].

    p(s | c) = (max(0, count(c s) - d) + d kinds(c) p(s | c without its first symbol)) / total(c)
    and, where c was never seen, the probability after the shorter context. Below one symbol all
    257 are alike.
    """
    row, positions = symbols(texts, len(orders))
    chance = np.full(len(positions), 1 / SYMBOLS)
    for length, order in enumerate(orders, 1):
        keys = ngram_keys(row, positions, length)
        at, seen = _find(order.contexts, keys >> np.uint64(_BITS))
        where, known = _find(order.keys, keys)
        count = np.where(known, order.counts[where], 0)
        left = order.discount * order.kinds[at]
        mixed = (np.maximum(count - order.discount, 0) + left * chance) / order.totals[at]
        chance = np.where(seen, mixed, chance)
    lengths = [len(text) + 1 for text in texts]
    return np.add.reduceat(-np.log2(chance), np.cumsum([0, *lengths[:-1]]))


def _find(keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each wanted key is in the sorted keys, and whether it is there."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return at, keys[at] == wanted
