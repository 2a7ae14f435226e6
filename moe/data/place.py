"""The place of a run in its data: how many rows of the mixed stream it has consumed.

The place does not depend on the batch size or the number of processes, so that a run goes on with
others and still sees every row exactly once.
"""

from collections.abc import Callable, Collection, Iterator
from typing import Any

from moe.config import nearest
from moe.data.order import ENDLESS
from moe.data.types import Batch
from moe.errors import CheckpointError, ConfigError

# What must be equal for a row number to mean the same row. A state of an older format lacks LATER.
IDENTITY = ("fingerprint", "seed", "sequence_length", "weights", "code", "too_long")
LATER = ("code", "too_long")
FREE = "batch_size"  # may differ without being asked


class TrainBatches:
    """An endless iterator over training batches that can stop and resume at any row.

    Not for several threads at once; the place is that after the batches handed out, not read ahead.

    Args:
        read: from a row of the stream to this process's batches from there on.
        identity: what must be equal for a place to mean the same rows: keys of `IDENTITY`, JSON.
        batch_size: rows of the global batch, all processes together.
    """

    def __init__(
        self, read: Callable[[int], Iterator[Batch]], identity: dict[str, Any], batch_size: int
    ):
        self._read = read
        self._identity = identity
        self._batch_size = batch_size
        self._next_row = 0
        self._batches: Iterator[Batch] | None = None

    def __iter__(self) -> "TrainBatches":
        return self

    def __next__(self) -> Batch:
        batch = next(self.start())
        self._next_row += self._batch_size
        return batch

    def start(self) -> Iterator[Batch]:
        """Begins to read ahead, if it has not: processes that read need seconds until their first."""
        if self._batches is None:
            self._batches = self._read(self._next_row)
        return self._batches

    @property
    def next_row(self) -> int:
        """Rows of the stream consumed, by all processes together."""
        return self._next_row

    def go_to(self, row: int) -> None:
        """The next batch begins at this row of the stream."""
        self.close()
        self._next_row = row

    def close(self) -> None:
        """Ends threads and processes that read ahead; the next batch starts them again."""
        batches, self._batches = self._batches, None
        close = getattr(batches, "close", None)
        if close is not None:
            close()

    def get_state(self) -> dict[str, Any]:
        """Returns the place after the batches handed out, as JSON; the same on every process."""
        return {**self._identity, FREE: self._batch_size, "next_row": self._next_row}

    def set_state(self, state: dict[str, Any], allow: Collection[str] = ()) -> dict[str, list[Any]]:
        """Goes to a place that `get_state` returned.

        With another seed, other data, weights, length of rows or code, the run goes on at the same
        row number of another stream: that number means other rows there, so that rows may come again
        and others never. With another batch size every row still comes exactly once.

        Args:
            state: the place; one of an older format counts batches and knows no code.
            allow: of `IDENTITY`: what may differ.

        Returns:
            What differs and is allowed, or is the batch size: `{key: [then, now]}`.

        Raises:
            ConfigError: `allow` has a name that is none.
            CheckpointError: anything else differs, or the state is none.
        """
        for key in allow:
            if key not in (*IDENTITY, FREE):
                raise ConfigError(
                    f"--allow_change={key}: there is no such part of a place in the data; "
                    f"{nearest(key, (*IDENTITY, FREE))}."
                )
        row = _row(state)
        changes = {key: [state.get(key), now] for key, now in self._identity.items()}
        changes = {
            key: [then, now]
            for key, (then, now) in changes.items()
            if then != now and (key in state or key not in LATER)
        }
        refused = {key: change for key, change in changes.items() if key not in allow}
        if refused:
            raise CheckpointError(_refusal(refused))
        if state.get(FREE) != self._batch_size:
            changes[FREE] = [state.get(FREE), self._batch_size]
        self.go_to(row)
        return changes


def _row(state: dict[str, Any]) -> int:
    """The number of rows consumed, from a state of any format."""
    if "next_row" in state:
        return _number(state, "next_row", ENDLESS)
    batch_size = _number(state, FREE, ENDLESS)
    return _number(state, "next_batch", ENDLESS // max(1, batch_size)) * batch_size


def _number(state: dict[str, Any], key: str, end: int) -> int:
    value = state.get(key)
    if type(value) is not int or not 0 <= value < end:
        raise CheckpointError(
            f"The checkpoint's place in the data has {key}={value!r}, which is no number of rows: the "
            "checkpoint is damaged. Restore an earlier one, or start a new workdir."
        )
    return value


def _refusal(refused: dict[str, list[Any]]) -> str:
    told = "; ".join(
        f"{key} was {then!r} and is now {now!r}" for key, (then, now) in refused.items()
    )
    return (
        f"The checkpoint's place in the data belongs to other rows: {told}. Training would not "
        "continue where it stopped. Restore the data, the config and the code of the run, start a new "
        f"workdir, or go on at the same row number of the other stream with "
        f"--allow_change={','.join(refused)}."
    )
