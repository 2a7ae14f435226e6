"""A data set as batches: what all kinds of data have in common.

A global batch is the same rows whatever the number of processes; process p of n takes the p-th of
n equal blocks of it.
"""

import abc
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import grain
import numpy as np

from moe.config import nearest
from moe.data.order import ENDLESS, Block, Rows, mixed, stack
from moe.data.pack import Row, padding_row
from moe.data.pipeline import code_of
from moe.data.place import TrainBatches
from moe.data.readers import Job, Readers
from moe.data.tokenizers import Tokenizer
from moe.data.types import Batch
from moe.errors import ConfigError, DataError

_EVAL_ORDER = 0  # seed of the fixed order of evaluation rows
_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)  # the buffer counts batches


def mixing_weights(
    weights: Mapping[str, int | float] | None, sizes: Mapping[str, int]
) -> dict[str, float]:
    """Returns the weights of the domains to train on: positive, summing to 1.

    Args:
        weights: `data.weights`; None is by size.
        sizes: of each domain in train, tokens or examples.

    Raises:
        ConfigError: an unknown domain, or weights that are none.
        DataError: a weight for a domain without training data.
    """
    if weights is None:
        weights = {name: float(n) for name, n in sizes.items()}
    for name, weight in weights.items():
        if name not in sizes:
            raise ConfigError(
                f"data.weights names the domain {name!r}, which the data lacks; "
                f"{nearest(name, sizes)}."
            )
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f"data.weights.{name}={weight} must be a number of at least 0.")
        if weight > 0 and sizes[name] == 0:
            raise DataError(f"data.weights.{name}={weight}, but train has no text of {name!r}.")
    total = sum(weights.values())
    if not total > 0:
        raise ConfigError(f"data.weights={weights} must have a sum greater than 0.")
    return {name: weights[name] / total for name in sizes if weights.get(name, 0) > 0}


class Source(NamedTuple):
    """Where a data set came from, so that other processes can open it too."""

    section: dict[str, Any]  # `config.data`, JSON
    options: dict[str, Any]  # of `moe.data.open.make_data`, JSON, without a tokenizer

    @property
    def workers(self) -> int:
        """Processes that read training batches; 0 reads in threads."""
        return self.section["workers"]


@dataclasses.dataclass(frozen=True)
class RowData(abc.ABC):
    """A data set, ready to be read. Make it with `moe.data.open.make_data`."""

    tokenizer: Tokenizer
    weights: dict[str, float]  # of the domains trained on
    batch_size: int  # of the global batch
    sequence_length: int
    seed: int

    kind: ClassVar[str]  # of `moe.data.pipeline.IN_CODE`
    source: Source | None = dataclasses.field(default=None, kw_only=True, repr=False)

    @property
    @abc.abstractmethod
    def domains(self) -> tuple[str, ...]:
        """Names of the domains; `Batch.domain` indexes them."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; the label of packed text is its domain."""
        return self.domains

    @property
    @abc.abstractmethod
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Hash of everything that is read, and of the tokenizer."""

    @property
    def code(self) -> str:
        """Hash of the code that orders and makes rows."""
        return code_of(self.kind)

    @abc.abstractmethod
    def rows(self, split: str) -> Sequence[Rows]:
        """The rows of each domain: in training only those with a weight, in an order of the seed."""

    @abc.abstractmethod
    def token_counts(self) -> np.ndarray:
        """How often each id occurs in train, `[V]`."""

    def left_out(self, split: str) -> dict[str, int]:
        """Examples of a split that are not read whole, by reason; packed text has none."""
        del split
        return {}

    def num_rows(self, split: str) -> int:
        """Rows of one epoch of the split, over the domains that are read there."""
        return sum(map(len, self.rows(split)))

    def num_batches(self, split: str) -> int:
        """Global batches that `eval_batches` yields."""
        return -(-self.num_rows(split) // self.batch_size)

    def like(self) -> Batch | None:
        """A batch of one row, for the shapes of all others; None where they are those of packed text."""
        return None

    def train_batches(
        self,
        process_index: int = 0,
        process_count: int = 1,
        start_state: dict[str, Any] | None = None,
    ) -> TrainBatches:
        """Returns an endless iterator over this process's blocks of the global batches.

        Args:
            process_index: which block.
            process_count: number of blocks; must divide the batch size.
            start_state: what `get_state` returned, on any number of processes; None is the start.
        """
        block = (process_index, process_count)
        Block((), 0, self.batch_size, *block)  # one that cannot be is told now

        def read(row: int) -> Iterator[Batch]:
            if self.source is None or not self.source.workers:
                return self.read(row, *block)
            job = Job(
                *self.source,
                self.tokenizer.to_json(),
                {"fingerprint": self.fingerprint, "code": self.code},
                self.batch_size,
                block,
            )
            return Readers(job, row, self.source.workers)

        batches = TrainBatches(read, self._identity(), self.batch_size)
        if start_state is not None:
            batches.set_state(start_state)
        return batches

    def read(
        self, row: int, process_index: int, process_count: int, worker: int = 0, workers: int = 1
    ) -> Iterator[Batch]:
        """Yields a process's blocks of the training batches from a row of the stream on, in threads.

        Args:
            row: at which the first global batch begins.
            process_index: which block.
            process_count: number of blocks.
            worker: which batch of every `workers` is the first.
            workers: step from one batch to the next.
        """
        stream = mixed(self.rows("train"), self.weights.values(), self.seed)
        block = Block(stream, ENDLESS, self.batch_size, process_index, process_count, row)
        return iter(_batched(block).slice(slice(worker, None, workers)).to_iter_dataset(_READ))

    def eval_batches(
        self, split: str, process_index: int = 0, process_count: int = 1
    ) -> Iterator[Batch]:
        """Yields this process's blocks of a split: every row once, always in the same order.

        The order mixes the domains, so that the first batches are a fair sample. The last batch is
        filled with rows of padding; every process gets as many batches as the others.
        """
        block = self._eval_block(split, process_index, process_count)
        return iter(_batched(block).to_iter_dataset(_READ))

    def eval_batch(
        self, split: str, index: int, process_index: int = 0, process_count: int = 1
    ) -> Batch:
        """Returns the `index`-th batch of `eval_batches`; beyond the last one it starts again."""
        block = self._eval_block(split, process_index, process_count)
        first = index % self.num_batches(split) * block.own
        return stack([block[row] for row in range(first, first + block.own)])

    def _eval_block(self, split: str, process_index: int, process_count: int) -> Block:
        rows = _EvalRows(self.rows(split), self.num_batches(split) * self.batch_size)
        return Block(rows, len(rows), self.batch_size, process_index, process_count)

    def check_split(self, split: str) -> None:
        """Raises ConfigError for a split that the data lacks."""
        if split not in self.splits:
            raise ConfigError(f"There is no split {split!r}; {nearest(split, self.splits)}.")

    def check_size(self, name: str) -> None:
        """Raises DataError where training has not one batch of rows, or an evaluation has none."""
        rows = self.num_rows("train")
        if rows < self.batch_size:
            raise DataError(
                f"Training on {name!r} needs at least data.batch_size={self.batch_size} rows of "
                f"data.sequence_length={self.sequence_length} tokens, and has {rows}: give more "
                "text, or lower data.batch_size or data.sequence_length."
            )
        for split in self.splits:
            if not self.num_rows(split):
                raise DataError(
                    f"The split {split} of {name!r} needs at least 1 row, and has 0: every example is "
                    "left out. Make rows longer with data.sequence_length, or set "
                    "data.too_long=truncate."
                )

    def _identity(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "weights": self.weights,
            "code": self.code,
        }


class _EvalRows:
    """The rows of all domains in one fixed shuffled order, then padding up to `length`."""

    def __init__(self, parts: Sequence[Rows], length: int):
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])
        self._order = np.random.RandomState(_EVAL_ORDER).permutation(self._ends[-1])
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Row:
        if index >= len(self._order):
            return padding_row(next(part for part in self._parts if len(part))[0])
        row = int(self._order[index])
        part = int(np.searchsorted(self._ends, row, side="right"))
        return self._parts[part][row - int(self._ends[part]) + len(self._parts[part])]


def _batched(rows: Block) -> grain.MapDataset:
    return grain.MapDataset.source(rows).batch(rows.own, batch_fn=stack)
