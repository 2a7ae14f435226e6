"""The end of a process in bounded time, whatever its threads wait for.

Python waits at exit for threads that are no daemons, such as those that read data ahead: one that
reads from a disk which does not answer would keep a process that has nothing left to do. So would
`jax.distributed`, which waits at exit for the other processes, of a run that has failed.
"""

import os
import sys
import threading
import time

import jax

from moe.errors import EXIT_PREEMPTED

SECONDS = 10.0


def leave_in_time(code: int, seconds: float = SECONDS) -> None:
    """Ends the process with `code` if it is still there in `seconds`; call it with all work done.

    A run of several processes that ends well is not bounded: one of them may write a report while
    the others wait for it.
    """
    if jax.distributed.is_initialized() and code in (0, EXIT_PREEMPTED):
        return
    threading.Thread(target=_end, args=(code, seconds), name="leaving", daemon=True).start()


def _end(code: int, seconds: float) -> None:
    time.sleep(seconds)
    # What is printed may wait for a reader that does not read.
    teller = threading.Thread(target=_tell, args=(seconds,), daemon=True)
    teller.start()
    teller.join(2.0)
    os._exit(code)


def _tell(seconds: float) -> None:
    busy = [
        thread.name
        for thread in threading.enumerate()
        if not thread.daemon and thread is not threading.main_thread()
    ]
    sys.stdout.flush()
    sys.stderr.write(
        f"Left {seconds:.0f} s after the end of the run, not waiting for {', '.join(busy) or 'exit'}.\n"
    )
    sys.stderr.flush()
