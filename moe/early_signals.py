"""SIGTERM and Ctrl-C from the first line of a program on: its imports alone take seconds.

Until `moe.training.interruption` listens, and after it, a signal ends the process at once: there is
nothing to save.
"""

import contextlib
import os
import select
import signal
import threading

from moe.errors import EXIT_PREEMPTED

_TEXT = b"\nStopping: there is nothing to save.\n"
_STDERR = 2


def listen() -> None:
    """For the main thread of a program, before its imports.

    A thread of its own leaves, so that a C call of the main thread which takes long does not delay it.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    threading.Thread(target=_leave, args=(read,), name="early signals", daemon=True).start()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: None)


def _leave(read: int) -> None:
    os.read(read, 1)
    with contextlib.suppress(OSError):  # of a stderr that is closed, or a full disk
        if select.select([], [_STDERR], [], 1.0)[1]:  # or has a reader that does not read
            os.write(_STDERR, _TEXT)
    os._exit(EXIT_PREEMPTED)
