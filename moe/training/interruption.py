"""SIGTERM and Ctrl-C ask a run to save and stop; a second Ctrl-C leaves at once.

One process listens by itself. When `jax.distributed` runs, its preemption service owns SIGTERM: a
signal to any process makes all of them agree on one later step, which a Python handler for SIGTERM
would switch off.
"""

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

_NOTICE = "\nStopping: saving after this step. Ctrl-C again leaves at once, without saving.\n"
_EXIT_CTRL_C = 130  # 128 + SIGINT, as shells report it


class Interruption:
    """Listens to SIGTERM and SIGINT inside a `with` block, which the main thread must open."""

    def __init__(self):
        self._stop = False
        self._interrupts = 0
        self._distributed = False
        self._handlers: dict[int, Any] = {}  # those before ours
        self._wakeup = -1
        self._pipe = (-1, -1)
        self._listener = threading.Thread(target=self._listen, name="interruption", daemon=True)

    def __enter__(self) -> "Interruption":
        self._distributed = jax.distributed.is_initialized()
        # Python runs handlers between two byte codes of the main thread, which may be minutes
        # away while XLA compiles; the number of a signal reaches this pipe at once.
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._listener.start()
        numbers = [signal.SIGINT] if self._distributed else [signal.SIGINT, signal.SIGTERM]
        for number in numbers:
            self._handlers[number] = signal.signal(number, _leave_to_listener)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._pipe[1])
        self._listener.join()
        os.close(self._pipe[0])

    def requested(self, step: int) -> bool:
        """Whether the run has to save after `step` and stop.

        Args:
            step: Optimiser steps done. Every process asks after every step, from the same first
                step on; all get True at the same one.
        """
        if self._distributed and not self._stop:
            self._stop = multihost_utils.reached_preemption_sync_point(step)
        return self._stop

    def _listen(self) -> None:
        while numbers := os.read(self._pipe[0], 64):
            for number in numbers:
                if number == signal.SIGINT:
                    self._on_interrupt()
                elif number == signal.SIGTERM:
                    self._stop = True

    def _on_interrupt(self) -> None:
        self._interrupts += 1
        if self._interrupts > 1:
            os._exit(_EXIT_CTRL_C)  # no clean-up: it is what hangs when someone presses twice
        sys.stderr.write(_NOTICE)
        sys.stderr.flush()
        if self._distributed:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self._stop = True


def _leave_to_listener(number: int, frame: FrameType | None) -> None:
    """Keeps the default action away."""
