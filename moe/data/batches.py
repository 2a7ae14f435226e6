"""From rows to batches: mixing, shuffling, sharding by process, resuming.

A global batch is the same rows whatever the number of processes; process p of n takes the p-th of
n equal blocks of it. The place in the data is the number of global batches consumed.
"""

import abc
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import math
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np

from moe.config import nearest
from moe.data.pack import Row, padding_row
from moe.data.tokenizers import Tokenizer
from moe.data.types import Batch
from moe.errors import CheckpointError, ConfigError, DataError

_EVAL_ORDER = 0  # seed of the fixed order of evaluation rows
_ENDLESS = 1 << 53  # rows; grain computes the number of batches in floating point
_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)  # the buffer counts batches


@runtime_checkable
class Rows(Protocol):
    """Rows by random access."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def __getitem__(self, index: int) -> Row:
        """The row of that number."""
        ...


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


@dataclasses.dataclass(frozen=True)
class RowData(abc.ABC):
    """A data set, ready to be read. Make it with `moe.data.open.make_data`."""

    tokenizer: Tokenizer
    weights: dict[str, float]  # of the domains trained on
    batch_size: int  # of the global batch
    sequence_length: int
    seed: int

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
    ) -> "TrainBatches":
        """Returns an endless iterator over this process's blocks of the global batches.

        Args:
            process_index: which block.
            process_count: number of blocks; must divide the batch size.
            start_state: what `get_state` returned, on any number of processes; None is the start.
        """
        mixed = self._mixed()
        block = _blocks(mixed, _ENDLESS, self.batch_size, process_index, process_count)
        batches = TrainBatches(_read(block, self.batch_size // process_count), self._identity())
        if start_state is not None:
            batches.set_state(start_state)
        return batches

    def eval_batches(
        self, split: str, process_index: int = 0, process_count: int = 1
    ) -> Iterator[Batch]:
        """Yields this process's blocks of a split: every row once, always in the same order.

        The order mixes the domains, so that the first batches are a fair sample. The last batch is
        filled with rows of padding; every process gets as many batches as the others.
        """
        block = self._eval_block(split, process_index, process_count)
        return iter(_read(block, self.batch_size // process_count))

    def eval_batch(
        self, split: str, index: int, process_index: int = 0, process_count: int = 1
    ) -> Batch:
        """Returns the `index`-th batch of `eval_batches`; beyond the last one it starts again."""
        block = self._eval_block(split, process_index, process_count)
        own = self.batch_size // process_count
        first = index % self.num_batches(split) * own
        return stack([block[row] for row in range(first, first + own)])

    def _eval_block(self, split: str, process_index: int, process_count: int) -> "_Block":
        rows = _EvalRows(self.rows(split), self.num_batches(split) * self.batch_size)
        return _blocks(rows, len(rows), self.batch_size, process_index, process_count)

    def check_split(self, split: str) -> None:
        """Raises ConfigError for a split that the data lacks."""
        if split not in self.splits:
            raise ConfigError(f"There is no split {split!r}; {nearest(split, self.splits)}.")

    def check_size(self, name: str) -> None:
        """Raises DataError where training has not one batch of rows."""
        rows = self.num_rows("train")
        if rows < self.batch_size:
            raise DataError(
                f"Training on {name!r} needs at least data.batch_size={self.batch_size} rows of "
                f"data.sequence_length={self.sequence_length} tokens, and has {rows}: give more "
                "text, or lower data.batch_size or data.sequence_length."
            )

    def _mixed(self) -> grain.MapDataset:
        """Returns the endless stream of training rows; each domain is shuffled anew each epoch."""
        parts = []
        for rows in self.rows("train"):
            seed = np.random.SeedSequence([self.seed, len(parts)]).generate_state(1)[0]
            parts.append(grain.MapDataset.source(rows).shuffle(int(seed)).repeat())
        if len(parts) == 1:
            return parts[0]
        return grain.MapDataset.mix(parts, weights=list(self.weights.values()))

    def _identity(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "sequence_length": self.sequence_length,
            "weights": self.weights,
        }


class TrainBatches:
    """An endless iterator over training batches that can stop and resume at any batch.

    Args:
        batches: the batches of this process.
        identity: what must be equal for a state to mean the same place.
    """

    def __init__(self, batches: grain.IterDataset, identity: dict[str, Any]):
        self._iterator = iter(batches)
        self._identity = identity

    def __iter__(self) -> "TrainBatches":
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Returns the place after the batches consumed, as JSON; the same on every process."""
        return {**self._identity, "next_batch": self._iterator.get_state()["next_index"]}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a place that `get_state` returned.

        Raises:
            CheckpointError: it is a place in other data, or in data that was read otherwise.
        """
        for key, now in self._identity.items():
            if key not in state or state[key] != now:
                raise CheckpointError(
                    f"The checkpoint's place in the data belongs to {key}={state.get(key)!r}, and "
                    f"now it is {now!r}: training would not continue where it stopped. Restore the "
                    "data and the config of the run, or start a new workdir."
                )
        place = state.get("next_batch")
        if not isinstance(place, int) or place < 0:
            raise CheckpointError(f"The checkpoint's place in the data is {place!r}, not a number.")
        self._iterator.set_state({"next_index": place})


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


class _Block:
    """The rows of one process: block p of every global batch, batch after batch."""

    def __init__(self, rows, length: int, batch_size: int, block: int, blocks: int):
        self._rows = rows
        self._length = length // batch_size * (batch_size // blocks)
        self._batch = batch_size
        self._own = batch_size // blocks
        self._first = block * self._own

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Row:
        batch, row = divmod(index, self._own)
        return self._rows[batch * self._batch + self._first + row]


def _blocks(rows, length: int, batch_size: int, index: int, count: int) -> _Block:
    if batch_size % count:
        raise ConfigError(
            f"data.batch_size={batch_size} is not divisible by the {count} processes: each takes "
            "an equal part of every batch."
        )
    if not 0 <= index < count:
        raise ConfigError(f"There is no process {index} of {count}.")
    return _Block(rows, length, batch_size, index, count)


def _read(rows: _Block, batch_size: int) -> grain.IterDataset:
    """Batches rows and reads ahead in threads."""
    batched = grain.MapDataset.source(rows).batch(batch_size, batch_fn=stack)
    return batched.to_iter_dataset(_READ)


def stack(rows: Sequence[Row]) -> Batch:
    """The batch of these rows."""
    fields = zip(*rows, strict=True)
    return Batch(*(None if field[0] is None else np.stack(field) for field in fields))
