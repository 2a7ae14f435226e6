"""Waiting for data without being deaf: a reader that hangs does not keep a run from stopping."""

from collections.abc import Callable
import queue
import threading
from types import TracebackType
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

_LOOK = 0.1  # seconds between two looks at `stop`

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@runtime_checkable
class Batches(Protocol[T_co]):
    """An iterator with a place, such as `TrainBatches`."""

    def __next__(self) -> T_co:
        """The next batch."""
        ...

    def get_state(self) -> dict[str, Any]:
        """The place after the batches handed out."""
        ...

    def set_state(self, state: dict[str, Any], *args: Any, **options: Any) -> Any:
        """Goes to a place."""
        ...

    def close(self) -> None:
        """Ends what reads ahead."""
        ...


class Interrupted(Exception):
    """The run was asked to stop while it waited for a batch; no batch was handed out."""


class _Failed(NamedTuple):
    error: BaseException


class Patient(Generic[T]):
    """Reads batches in a thread of its own; the caller waits for them and looks at `stop`.

    Nothing is read ahead: the thread reads when a batch is asked for, so that the place in the data
    is that of the batches handed out. It is a daemon: a read that never ends does not block exit.

    Args:
        batches: what to read. Nobody else reads it.
        stop: asked every tenth of a second while a read takes long.
    """

    def __init__(self, batches: Batches[T], stop: Callable[[], bool]):
        self._batches = batches
        self._stop = stop
        self._reading = False
        self._place: dict[str, Any] = {}  # before the read that goes on
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._read: queue.SimpleQueue[T | _Failed] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._serve, name="batches", daemon=True)
        self._reader.start()

    def __enter__(self) -> "Patient[T]":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __iter__(self) -> "Patient[T]":
        return self

    def __next__(self) -> T:
        """The next batch; after `Interrupted` the one that was waited for.

        Raises:
            Interrupted: `stop` said so, and there was no batch yet.
        """
        if not self._reading:
            self._place = self._batches.get_state()
            self._reading = True
            self._asked.put(True)
        while True:
            try:
                found = self._read.get(timeout=_LOOK)
                break
            except queue.Empty:
                if self._stop():
                    raise Interrupted from None
        self._reading = False
        if isinstance(found, _Failed):
            raise found.error
        return found

    def get_state(self) -> dict[str, Any]:
        """The place after the batches handed out, as JSON."""
        # While it reads, the iterator is somewhere between two places, and may hold its lock.
        return self._place if self._reading else self._batches.get_state()

    def set_state(self, state: dict[str, Any], *args: Any, **options: Any) -> Any:
        """`set_state` of the batches, with its arguments, result and errors."""
        if self._reading:
            raise RuntimeError("The place in the data cannot change while a batch is being read.")
        return self._batches.set_state(state, *args, **options)

    def close(self) -> None:
        """Ends the thread and the reader, unless they hang: then they are left alone."""
        self._asked.put(False)
        if not self._reading:
            self._reader.join()
            self._batches.close()

    def _serve(self) -> None:
        while self._asked.get():
            try:
                self._read.put(next(self._batches))
            except BaseException as error:  # of any kind: it belongs to who asked
                self._read.put(_Failed(error))
