"""SIGTERM and Ctrl-C ask a run to save and stop; a second Ctrl-C leaves at once.

One process listens by itself. When `jax.distributed` runs, its preemption service owns SIGTERM: a
signal to any process makes all of them agree on one later tick, which a Python handler for SIGTERM
would switch off.

Before a run listens, while its program imports for seconds, `moe.early_signals` does: the process ends
at once, and nothing of the run has been touched.
"""

from collections.abc import Generator
import contextlib
import os
import select
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

from moe.errors import EXIT_PREEMPTED

GRACE = 4.0  # seconds that the main thread has to leave a phase of nothing to lose by itself

_SAVING = "\nStopping: saving after this step. Ctrl-C again leaves at once, without saving.\n"
_LEAVING = "\nStopping: nothing has been trained since the start, so there is nothing to save.\n"
_FORCED = f"Still in a long call {GRACE:.0f} s after the signal: leaving without clean-up.\n"
_EXIT_CTRL_C = 130  # 128 + SIGINT, as shells report it


class Interruption:
    """Listens to SIGTERM and SIGINT inside a `with` block, which the main thread must open."""

    def __init__(self):
        self._stop = False
        self._ticks = 0
        self._interrupts = 0
        self._distributed = False
        self._depth = 0  # of blocks of `nothing_to_lose`
        self._raised = False
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
            self._handlers[number] = signal.signal(number, self._handle)
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

    @property
    def asked(self) -> bool:
        """Whether this process has to stop as soon as it can, known at once.

        Always False in a run of several: one that stops alone leaves the others waiting for it.
        """
        return self._stop and not self._distributed

    def requested(self) -> bool:
        """Whether the run has to save now and stop.

        Every call is a tick. Every process ticks equally often: after each step and between the
        batches of an evaluation; all get True at the same tick, and from then on.
        """
        self._ticks += 1
        if self._distributed and not self._stop:
            self._stop = multihost_utils.reached_preemption_sync_point(self._ticks)
        return self._stop

    @contextlib.contextmanager
    def nothing_to_lose(self) -> Generator[None, None, None]:
        """A block before the first step: set-up, restore, compilation.

        A signal leaves it by `SystemExit(EXIT_PREEMPTED)`, so that what is open is closed. A main
        thread that is still in one C call after `GRACE` seconds is not waited for. In a run of
        several processes the signal is honoured at the first tick instead.
        """
        self._depth += 1
        try:
            self._leave_if_asked()
            yield
            self._leave_if_asked()  # where the exception was lost in a callback from C
        finally:
            self._depth -= 1

    def _leave_if_asked(self) -> None:
        if self.asked:
            self._raised = True
            raise SystemExit(EXIT_PREEMPTED)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Runs in the main thread, so that no block can end between the question and the answer."""
        if self._distributed:
            return  # the listener passes it on
        self._stop = True
        if self._depth and not self._raised:  # once: the next one must not break the clean-up
            self._leave_if_asked()

    def _listen(self) -> None:
        deadline = None
        while True:
            wait = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            if not select.select([self._pipe[0]], [], [], wait)[0]:
                # Where the handler is still to run no step can have begun; a block that ended
                # between the signal and its handler is a run that steps, which stops by itself.
                if self._depth or self._raised:
                    _tell(_FORCED)
                    os._exit(EXIT_PREEMPTED)
                deadline = None
                continue
            numbers = os.read(self._pipe[0], 64)
            if not numbers:
                return
            leaving = (self._depth > 0 or self._raised) and not self._distributed
            asks = [number for number in numbers if number in self._handlers]
            if asks and leaving and deadline is None:
                deadline = time.monotonic() + GRACE
                _tell(_LEAVING)
            for _ in range(asks.count(signal.SIGINT)):
                self._on_interrupt(leaving)

    def _on_interrupt(self, leaving: bool) -> None:
        self._interrupts += 1
        if self._interrupts > 1:
            os._exit(_EXIT_CTRL_C)  # no clean-up: it is what hangs when someone presses twice
        if not leaving:
            _tell(_SAVING)
        if self._distributed:
            os.kill(os.getpid(), signal.SIGTERM)


def _tell(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
