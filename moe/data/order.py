"""Which row is which: the mixed stream of training rows, and the blocks that processes take of it.

Row n of the stream is the same whatever the batch size and the number of processes. A change here
changes what a place in the data means: see `moe.data.pipeline`.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import grain
import numpy as np

from moe.data.pack import Row
from moe.data.types import Batch
from moe.errors import ConfigError

ENDLESS = 1 << 53  # rows; grain computes the number of batches in floating point


@runtime_checkable
class Rows(Protocol):
    """Rows by random access."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def __getitem__(self, index: int) -> Row:
        """The row of that number."""
        ...


def mixed(parts: Sequence[Rows], weights: Iterable[float], seed: int) -> grain.MapDataset:
    """The endless stream of training rows; each domain is shuffled anew each epoch.

    Args:
        parts: rows of each domain.
        weights: of the domains, in the same order; positive.
        seed: of the run.
    """
    streams = []
    for rows in parts:
        own = np.random.SeedSequence([seed, len(streams)]).generate_state(1)[0]
        streams.append(grain.MapDataset.source(rows).shuffle(int(own)).repeat())
    if len(streams) == 1:
        return streams[0]
    return grain.MapDataset.mix(streams, weights=list(weights))


class Block:
    """The rows of one process: block p of every global batch, batch after batch.

    Args:
        rows: of all processes, by number.
        length: how many rows there are for all processes, counted from `first`.
        batch_size: rows of the global batch; `blocks` divides it.
        block: of which process.
        blocks: number of processes.
        first: row at which the first global batch begins.

    Raises:
        ConfigError: a batch that processes cannot share equally, or no such process.
    """

    def __init__(
        self, rows, length: int, batch_size: int, block: int = 0, blocks: int = 1, first: int = 0
    ):
        if batch_size % blocks:
            raise ConfigError(
                f"data.batch_size={batch_size} is not divisible by the {blocks} processes: each "
                "takes an equal part of every batch."
            )
        if not 0 <= block < blocks:
            raise ConfigError(f"There is no process {block} of {blocks}.")
        self._rows = rows
        self._batch = batch_size
        self.own = batch_size // blocks  # rows of a batch that this process takes
        self._length = length // batch_size * self.own
        self._first = first + block * self.own

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Row:
        batch, row = divmod(index, self.own)
        return self._rows[self._first + batch * self._batch + row]


def stack(rows: Sequence[Row]) -> Batch:
    """The batch of these rows."""
    fields = zip(*rows, strict=True)
    return Batch(*(None if field[0] is None else np.stack(field) for field in fields))
