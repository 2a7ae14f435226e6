"""Ends a run that is alive and does nothing: stacks of all threads, one line of cause, exit 70.

The watch is a Python thread. A C call that never returns and never gives up the interpreter's lock
stops that thread too; then faulthandler's own thread writes the stacks, and a small process beside
this one kills it (`moe.training.watcher`). (faulthandler could end it, but also would when a process
that was stopped for long goes on.)
"""

from collections.abc import Callable, Generator
import contextlib
import faulthandler
import os
import subprocess
import sys
import threading
import time
from types import FrameType, TracebackType

from absl import flags, logging

from moe.errors import EXIT_STUCK, ConfigError
from moe.training import watcher

FLAG = "stuck_after"
_DEFAULT = 1800
_STDERR = 2
_TELLING = 10.0  # seconds at most: the reader of stderr may be what hangs


def define_flag(values: flags.FlagValues) -> None:
    """`--stuck_after`."""
    flags.DEFINE_float(
        FLAG,
        _DEFAULT,
        "Seconds without a step or a batch of an evaluation after which the run ends itself with "
        f"exit code {EXIT_STUCK}; 0 is never.",
        flag_values=values,
    )


class Watchdog:
    """Watches that `beat` is called, inside a `with` block.

    Silence is counted in naps of the watching thread, each as long as it was meant to be or twice
    that at most: a stopped process, a suspended machine and a clock that is set do not count.

    Where not even that thread can run, the process is killed (on Linux) after twice the silence and 20
    seconds: the stacks come first.

    Args:
        seconds: of silence before the process ends; 0 is never.
    """

    def __init__(self, seconds: int | float):
        if not 0 <= seconds < threading.TIMEOUT_MAX / 4:
            raise ConfigError(
                f"--{FLAG}={seconds:g} must be a number of seconds, or 0 for a run that may take "
                "all the time it wants."
            )
        self._seconds = seconds
        self._nap = min(seconds / 10, 5.0)
        self._heard = True
        self._phase = "the start"
        self._patience = 0  # blocks of `patient`
        self._watcher: _Watcher | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            if sys.platform == "linux":
                self._watcher = _Watcher(2 * (self._seconds + _TELLING), self._nap)
            self._put_off()
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._seconds:
            self._end.set()
            self._thread.join()
        if self._watcher is not None:
            self._watcher.close()

    def beat(self, phase: str) -> None:
        """Says that the run moves; `phase` is what begins now. Costs two writes of an attribute."""
        self._phase = phase
        self._heard = True

    @contextlib.contextmanager
    def patient(self, phase: str) -> Generator[None, None, None]:
        """A block that may take all the time it wants: compilation, preparation of data."""
        self._patience += 1
        self.beat(phase)
        self._tell_watcher()  # at once: the next call may be a long one that keeps the lock
        try:
            yield
        finally:
            self.beat(f"the end of {phase}")
            self._patience -= 1
            self._tell_watcher()

    def _tell_watcher(self) -> None:
        if self._watcher is not None:
            self._watcher.tell(lambda: self._patience > 0)

    def _put_off(self) -> None:
        """What is only ever due if the thread cannot run; later than the thread is in any case."""
        self._tell_watcher()
        faulthandler.dump_traceback_later(2 * self._seconds + _TELLING, file=_STDERR)

    def _watch(self) -> None:
        silent = 0.0
        try:
            while True:
                self._put_off()
                before = time.monotonic()
                if self._end.wait(self._nap):
                    return
                slept = time.monotonic() - before
                silent += min(slept, 2 * self._nap)
                if self._heard or self._patience:
                    self._heard, silent = False, 0.0
                elif silent > self._seconds:
                    self._give_up(silent)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _give_up(self, silent: float) -> None:
        cause = (
            f"Stuck: nothing has moved for {silent:.0f} s since {self._phase} "
            f"(--{FLAG}={self._seconds:g}). The stacks above show what each thread waits for: often "
            "a disk or a source of data that does not answer, or another process of the run that is "
            "gone. Run it again to go on from the last checkpoint; a run whose steps or saves do "
            f"take that long needs a greater --{FLAG}.\n"
        )
        text = f"\n{stacks()}\n{cause}".encode(errors="backslashreplace")
        teller = threading.Thread(target=_write, args=(text,), daemon=True)
        teller.start()
        teller.join(_TELLING)
        os._exit(EXIT_STUCK)  # no clean-up: it would wait for what hangs


class _Watcher:
    """The process beside this one, from this side.

    Args:
        limit: seconds without `tell` after which it kills this process.
        nap: seconds between two looks.
    """

    def __init__(self, limit: float, nap: float):
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        numbers = [str(number) for number in (os.getpid(), limit, nap)]
        read, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", watcher.__file__, *numbers],
                stdin=read,
                stdout=subprocess.DEVNULL,
            )
        except OSError as error:
            _warn(error)
        finally:
            os.close(read)

    def tell(self, patient: Callable[[], bool]) -> None:
        """That this process is alive, and whether it may take all the time it wants from now on."""
        with self._lock:  # what was asked last is told last
            if self._process is None:
                return
            try:
                os.write(self._pipe, watcher.PATIENCE if patient() else watcher.WATCH)
            except BlockingIOError:
                return  # it was stopped, and has enough to read
            except BrokenPipeError as error:
                _warn(error)
                self._end()

    def close(self) -> None:
        """Ends it, stopped or not."""
        with self._lock:
            self._end()
        os.close(self._pipe)

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _warn(error: OSError) -> None:
    logging.warning(
        "No process watches this one (%s): should a call keep the interpreter's lock for good, the run "
        "would have to be killed by hand.",
        error.strerror,
    )


def stacks() -> str:
    """The stack of every other thread of Python, innermost call last; opens no file."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames()
    frames.pop(threading.get_ident())
    return "\n".join(
        f"Thread {names.get(ident, ident)}:\n{_stack(frame)}" for ident, frame in frames.items()
    )


def _stack(frame: FrameType | None) -> str:
    lines = []
    while frame is not None:
        code = frame.f_code
        lines.append(f"  {code.co_filename}:{frame.f_lineno} in {code.co_qualname}")
        frame = frame.f_back
    return "\n".join(reversed(lines))


def _write(text: bytes) -> None:
    while text:
        text = text[os.write(_STDERR, text) :]
