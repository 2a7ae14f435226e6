"""Lines of several processes on one terminal."""

import os
import selectors
import subprocess
import sys
from typing import Any

Process = subprocess.Popen[bytes]
_LINE = 1 << 16  # bytes of a line that are held back until it ends


class Relay:
    """Passes on what piped processes print, with their number before each line: `[1] `.

    Args:
        wakeup: a descriptor that ends `wait` when it can be read; the caller empties it.
    """

    def __init__(self, wakeup: int):
        self._wakeup = wakeup
        self._selector = selectors.DefaultSelector()
        self._selector.register(wakeup, selectors.EVENT_READ)
        self._held: dict[Any, tuple[bytes, bytearray, Any]] = {}

    def add(self, number: int, process: Process) -> None:
        """Reads what a child prints from now on."""
        for pipe, out in self._pipes(process):
            os.set_blocking(pipe.fileno(), False)
            self._selector.register(pipe, selectors.EVENT_READ)
            self._held[pipe] = (f"[{number}] ".encode(), bytearray(), out)

    def wait(self, seconds: float) -> None:
        """Passes on what there is; returns after `seconds`, or a line or a signal before."""
        for key, _ in self._selector.select(seconds):
            if key.fd != self._wakeup:
                self._read(key.fileobj)

    def finish(self, process: Process) -> None:
        """Passes on the rest of what a child that has ended has printed."""
        for pipe, out in self._pipes(process):
            while pipe in self._selector.get_map() and self._read(pipe):
                pass
            prefix, held, _ = self._held.pop(pipe)
            if held:
                write(out, prefix + held + b"\n")
            if pipe in self._selector.get_map():
                self._selector.unregister(pipe)
            pipe.close()

    def close(self) -> None:
        """Closes what is open."""
        for pipe in self._held:
            pipe.close()
        self._selector.close()

    def _pipes(self, process: Process) -> list[tuple[Any, Any]]:
        pairs = ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
        return [(pipe, out) for pipe, out in pairs if pipe is not None]

    def _read(self, pipe: Any) -> bool:
        """Whether there was anything."""
        try:
            data = os.read(pipe.fileno(), _LINE)
        except BlockingIOError:
            return False
        if not data:
            self._selector.unregister(pipe)
            return False
        prefix, held, out = self._held[pipe]
        held += data
        *lines, rest = held.split(b"\n")
        if len(rest) >= _LINE:
            lines, rest = [*lines, rest], b""
        held[:] = rest
        write(out, b"".join(prefix + line + b"\n" for line in lines))
        return True


def say(line: str) -> None:
    """Tells people something of the launcher's own."""
    write(sys.stderr, f"launch: {line}\n".encode())


def write(stream: Any, data: bytes) -> None:
    """Writes bytes to a text stream, at once."""
    stream.flush()
    stream.buffer.write(data)
    stream.flush()
