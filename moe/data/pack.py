"""Packing: documents laid end to end and cut into rows of a fixed length (concatenate and split).

Each row is computed from the documents' lengths alone when it is asked for, so that a position in
the data is one integer, and every target of a split is predicted exactly once.
"""

from typing import Any, NamedTuple

from jaxtyping import Bool, Float, Int
import numpy as np

from moe.data.store import TokenSplit


class Row(NamedTuple):
    """One row of a `Batch`, same fields without `B`."""

    tokens: Int[np.ndarray, " S"]
    targets: Int[np.ndarray, " S"]
    segments: Int[np.ndarray, " S"]
    positions: Int[np.ndarray, " S"]
    valid: Bool[np.ndarray, " S"]
    domain: np.int32
    scored: Bool[np.ndarray, " S"] | None = None
    prefix: Bool[np.ndarray, " S"] | None = None
    modality: Int[np.ndarray, " S"] | None = None
    frames: Float[np.ndarray, "N F"] | None = None
    label: np.int32 | None = None
    index: np.int32 | None = None


class PackedRows:
    """The rows of one domain of one split, by random access.

    The documents, in an order drawn from `seed`, form one stream of tokens; row i covers stream
    positions `i*S` to `(i+1)*S`. A document `boundary t1 ... tn` has the targets
    `t1 ... tn boundary`. Only the last row is padded.

    Args:
        tokens: the split.
        domain: index of the domain.
        length: `S`.
        seed: order of the documents; None keeps the order of the split.
    """

    def __init__(self, tokens: TokenSplit, domain: int, length: int, seed: int | None = None):
        documents = np.flatnonzero(tokens.domain == domain)
        if seed is not None:
            # RandomState, not Generator: its stream is the same in every NumPy, so runs can resume.
            order = np.random.RandomState([seed, domain]).permutation(len(documents))
            documents = documents[order]
        lengths = np.diff(tokens.starts)[documents]
        self._ids = tokens.ids
        self._domain = np.int32(domain)
        self.length = length
        self._source = np.asarray(tokens.starts)[documents]  # [n] where a document lies in ids
        self._stream = np.concatenate([[0], np.cumsum(lengths)])  # [n+1] and where in the stream

    def __len__(self) -> int:
        return -(-int(self._stream[-1]) // self.length)

    def __getitem__(self, index: int) -> Row:
        first = index * self.length
        if not 0 <= first < self._stream[-1]:
            raise IndexError(f"row {index} of {len(self)}")
        stream = np.arange(first, min(first + self.length, self._stream[-1]))  # [n <= S]
        document = np.searchsorted(self._stream, stream, side="right") - 1  # [n]
        offset = stream - self._stream[document]  # in the document; 0 is its boundary
        source = self._source[document] + offset
        # A document that began in an earlier row restarts its positions at the row's start.
        begun = np.where(document == document[0], offset[0], 0)
        return Row(
            tokens=self._padded(self._ids[source]),
            targets=self._padded(self._ids[source + 1]),
            segments=self._padded(document - document[0] + 1),
            positions=self._padded(offset - begun),
            valid=np.arange(self.length) < len(stream),
            domain=self._domain,
        )

    def _padded(self, values: np.ndarray) -> Int[np.ndarray, " S"]:
        out = np.zeros(self.length, np.int32)
        out[: len(values)] = values
        return out


def padding_row(like: Row) -> Row:
    """Returns a row of padding only, of domain 0: it fills the last batch of an evaluation.

    Args:
        like: any row of the data.
    """
    blank: dict[str, Any] = {
        name: None if value is None else np.zeros_like(value)
        for name, value in like._asdict().items()
    }
    if like.index is not None:
        blank["index"] = np.int32(-1)
    return Row(**blank)
