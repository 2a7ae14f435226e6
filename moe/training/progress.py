"""How far a run is: a bar on a terminal, plain lines anywhere else.

A log on a full disk and a terminal that is gone never stop a run: what cannot be shown is left out.
"""

from collections.abc import Mapping
import contextlib
import io
import os
import sys
import time
from typing import Any

from tqdm import tqdm

_BAR_FORMAT = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"


class Progress:
    """Shows loss, speed, utilisation and the time left.

    Args:
        total: Steps of the whole run.
        start: Steps done before this process.
        visible: Whether to show anything; in a run of several processes only process 0 does.
        stream: Where to; standard error if None.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        *,
        visible: bool = True,
        stream: io.TextIOBase | None = None,
    ):
        self._total = total
        self._visible = visible
        self._stream = sys.stderr if stream is None else stream
        self._first: tuple[int, float] | None = None  # step and clock of the first update
        self._lost = False  # whether a line could not be written
        self._bar = None
        if visible and self._stream.isatty():
            self._bar = tqdm(
                total=total,
                initial=start,
                file=self._stream,
                bar_format=_BAR_FORMAT,
                dynamic_ncols=True,
            )

    def update(self, step: int, values: Mapping[str, Any] | None = None) -> None:
        """Moves the bar; with `values` of a log interval, renews its numbers or prints a line.

        Args:
            step: Optimiser steps done.
            values: As recorded: `loss/total`, `bits_per_byte`, `speed/tokens_per_second`,
                `speed/step_seconds`, `speed/mfu` (a fraction). What is absent is not shown.
        """
        if not self._visible:
            return
        seconds_left = self._seconds_left(step, values or {})
        text = "" if values is None else "  ".join(_parts(values, seconds_left))
        if self._bar is None:
            if text:
                self._write(f"step {step}/{self._total}  {text}")
            return
        with contextlib.suppress(OSError):
            if text:
                self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)

    def message(self, text: str) -> None:
        """Prints a line of its own, above the bar."""
        if not self._visible:
            return
        if self._bar is None:
            self._write(text)
        else:
            with contextlib.suppress(OSError):
                self._bar.write(text, file=self._stream)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        with contextlib.suppress(OSError):
            if self._bar is not None:
                self._bar.close()
        if self._lost:
            self._give_up()

    def _write(self, line: str) -> None:
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except OSError:
            self._lost = True

    def _give_up(self) -> None:
        """Lets go of lines that still found no room: Python would end with code 120 for them."""
        try:
            self._stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            self._stream.flush()

    def _seconds_left(self, step: int, values: Mapping[str, Any]) -> float | int | None:
        """By the clock since the first update, which leaves compilation out and evaluation in."""
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        first_step, first_time = self._first
        if step > first_step:
            return (now - first_time) / (step - first_step) * (self._total - step)
        step_seconds = values.get("speed/step_seconds")
        return None if step_seconds is None else step_seconds * (self._total - step)


def _parts(values: Mapping[str, Any], seconds_left: float | int | None) -> list[str]:
    formats = (
        ("loss/total", "loss {:.3f}"),
        ("bits_per_byte", "bpb {:.3f}"),
        ("speed/tokens_per_second", "{:,.0f} tokens/s"),
        ("speed/step_seconds", "{:.2f} s/step"),
        ("speed/mfu", "mfu {:.0%}"),
    )
    parts = [text.format(values[key]) for key, text in formats if values.get(key) is not None]
    return parts if seconds_left is None else [*parts, f"{duration(seconds_left)} left"]


def duration(seconds: float | int) -> str:
    """`45 s`, `2 min`, `3 h 20 min`, `2 d 4 h`."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"
