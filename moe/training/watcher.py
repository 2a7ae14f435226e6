"""Ends a process whose interpreter does not run any more, from a process beside it.

A call that never returns and never gives up the interpreter's lock leaves nothing in a process that
could end it, and nothing that could choose its exit code: it is killed.

`moe.training.watchdog` starts this file by its path, as a child of the run. It imports nothing of the
program and needs Linux, where the kernel tells of a process that was stopped.
"""

import contextlib
import os
import select
import signal
import sys
import time

# One of them comes on standard input at every sign of life.
WATCH = b"w"
PATIENCE = b"p"
_STDIN, _STDERR = 0, 2
_TELLING = 2.0  # seconds at most: the reader of stderr may be what hangs
_OTHERS = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM)


def silence(parent: int, limit: float, nap: float) -> float | None:
    """Waits for a sign of life every so often; returns once too long there was none.

    Silence is counted in naps, each as long as it was meant to be or twice that at most, and only while
    the parent was not stopped: neither a clock nor a machine that was suspended makes it longer.

    Args:
        parent: process id of the parent.
        limit: seconds.
        nap: seconds between two looks.

    Returns:
        The seconds of silence, more than `limit`; None where the parent has ended.
    """
    silent, patient = 0.0, False
    while silent <= limit:
        stopped, before = is_stopped(parent), time.monotonic()
        if select.select([_STDIN], [], [], nap)[0]:
            silent, patient = 0.0, os.read(_STDIN, 4096).endswith(PATIENCE)
        elif not (patient or stopped or is_stopped(parent)):
            silent += min(time.monotonic() - before, 2 * nap)
        if os.getppid() != parent:
            return None
    return silent


def is_stopped(process: int) -> bool:
    """Whether it is stopped, by a signal or a debugger, or not there."""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            status = file.read()
    except OSError:
        return True
    return status.rpartition(b") ")[2][:1] in (b"T", b"t")


def main(parent: int, limit: float, nap: float) -> None:
    """Watches the parent to its end, or ends it."""
    for number in _OTHERS:  # to the whole group: what asks a run to stop is not for who watches it
        signal.signal(number, signal.SIG_IGN)
    silent = silence(parent, limit, nap)
    if silent is None:
        return
    cause = (
        f"Stuck: for {silent:.0f} s no thread could run Python. One is in a call that neither returns "
        "nor gives up the interpreter's lock: see the stacks above. Killed, for it cannot end by "
        "itself. Run it again to go on from the last checkpoint; if such a call does take that long, "
        "with a greater --stuck_after.\n"
    )
    with contextlib.suppress(OSError):  # of a stderr that is closed, or a full disk
        if select.select([], [_STDERR], [], _TELLING)[1]:
            os.write(_STDERR, cause.encode())
    if os.getppid() == parent:
        os.kill(parent, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
