"""Processes that die with the one that started them, even where that was killed and could say nothing.

On Linux the kernel does it (prctl(2), PR_SET_PDEATHSIG). Elsewhere nothing does: there a process that
outlives its parent ends by itself, and only locks keep it from being doubled.
"""

from collections.abc import Sequence
import ctypes
import os
from pathlib import Path
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """Has the kernel send a signal to this process when the thread that started it ends.

    It survives `exec` and is not inherited by children.

    Args:
        parent: process id of the parent, as the parent knows it: one that died before this call is
            seen by it.
        number: the signal.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def tied(command: Sequence[str]) -> list[str]:
    """A command line that runs `command` as a child that dies with this process.

    A small program ties itself and becomes the command: unlike `preexec_fn` it forks nothing that has
    threads. The thread that starts the child must outlive it.
    """
    return [sys.executable, "-I", "-S", str(Path(__file__)), str(os.getpid()), *command]


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
