"""Starts the processes of a run on this machine, ends them together, and starts them again.

No JAX in here: what watches a run starts at once and is small beside it.

What is started again is `moe.errors.STARTED_AGAIN`, unless it was the launcher that was asked to stop.
"""

from collections.abc import Sequence
import contextlib
import os
from pathlib import Path
import select
import signal
import socket
import subprocess
import sys
import time
from types import FrameType
from typing import Any, NamedTuple

from moe.errors import EXIT_PREEMPTED, RESTARTS_IN_PLACE, STARTED_AGAIN
from moe.parallel.orphans import tied
from moe.parallel.relay import Relay, say

GRACE_SECONDS = 5.0  # beyond the heartbeat, for the others of a process that failed
EXIT_CTRL_C = 128 + signal.SIGINT
PASSED_ON = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,  # the terminal was closed
}
_LATER = (1, EXIT_PREEMPTED, -signal.SIGABRT)  # what the loss of a peer may look like
_LONGEST_PAUSE = 8.0


class Plan(NamedTuple):
    """What to start.

    Attributes:
        command: program and arguments for Python; several processes get the coordinator's flags too.
        processes: of the run.
        cpu_devices: virtual devices of each process; None: those of the machine.
        restarts: at most, over all.
        heartbeat_seconds: after which a process without a sign of life is taken for dead.
        workdir: of the run; its checkpoints tell progress. None: nothing is known of progress.
    """

    command: Sequence[str]
    processes: int = 1
    cpu_devices: int | None = None
    restarts: int = 0
    heartbeat_seconds: int = 100
    workdir: Path | None = None


class Ended(NamedTuple):
    """How a process ended; a negative code is a signal."""

    process: int
    code: int
    by_us: bool = False


def launch(plan: Plan) -> int:
    """Runs the plan to its end, from the main thread of a process without others.

    Returns:
        What the shell gets: 0; the exit code of the first process that failed by itself, 128 + n for
        signal n; 75 where the launcher was asked to stop and the run did; 130 after a second Ctrl-C.
    """
    asked = Asked()
    with asked:
        restarts = fruitless = 0
        while True:
            before = newest_step(plan.workdir)
            cause = Family(plan, asked).run()
            now = newest_step(plan.workdir)
            fruitless = 0 if now > before else fruitless + 1
            if asked.number is not None:
                return asked.exit_code(cause)
            if cause.code not in STARTED_AGAIN or not _may_restart(plan, restarts, fruitless):
                return shell_code(cause.code)
            restarts += 1
            at = f"step {now}" if now >= 0 else "no checkpoint"
            say(f"{describe(cause)}: start {restarts} of {plan.restarts} again, from {at}")
            asked.pause(min(_LONGEST_PAUSE, 0.5 * 2**fruitless))
            if asked.number is not None:
                return EXIT_PREEMPTED  # what was saved before is all there


def _may_restart(plan: Plan, restarts: int, fruitless: int) -> bool:
    if restarts >= plan.restarts:
        if plan.restarts:
            say(f"all {plan.restarts} restarts are used up")
        return False
    if fruitless > RESTARTS_IN_PLACE:
        say(f"no newer checkpoint in {fruitless} starts: it would end like this again")
        return False
    return True


class Asked:
    """Signals to the launcher. They are passed on once; a second Ctrl-C is counted."""

    def __init__(self):
        self.number: int | None = None  # what is passed on
        self.interrupts = 0
        self.family: Family | None = None
        self.wakeup = (-1, -1)
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Asked":
        self.wakeup = os.pipe()
        for end in self.wakeup:
            os.set_blocking(end, False)
        self._before_fd = signal.set_wakeup_fd(self.wakeup[1], warn_on_full_buffer=False)
        for number in (*PASSED_ON, signal.SIGCHLD):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._before_fd)
        for end in self.wakeup:
            os.close(end)

    @property
    def at_once(self) -> bool:
        """Whether nothing is to be waited for."""
        return self.interrupts > 1

    def exit_code(self, cause: Ended) -> int:
        """What the shell gets once everybody who was asked has ended."""
        if self.at_once:
            return EXIT_CTRL_C
        # Before a program listens, the signal itself ends it: nothing is lost.
        if cause.code in (-signal.SIGTERM, -signal.SIGINT):
            return EXIT_PREEMPTED
        return shell_code(cause.code)

    def pause(self, seconds: float) -> None:
        """Waits so long, or until a signal asks to stop."""
        end = time.monotonic() + seconds
        while self.number is None and (left := end - time.monotonic()) > 0:
            select.select([self.wakeup[0]], [], [], left)
            self.drain()

    def drain(self) -> None:
        """Empties the pipe that wakes the loop."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self.wakeup[0], 512):
                pass

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Passes on from here too: the loop may hang in a write to a terminal that stands still."""
        del frame
        if number not in PASSED_ON:
            return
        self.interrupts += number == signal.SIGINT
        if self.number is None:
            self.number = PASSED_ON[signal.Signals(number)]
        if self.family is not None:
            self.family.pass_on()


class Child:
    """One process in a group of its own: Ctrl-C on the terminal reaches the launcher alone."""

    def __init__(self, index: int, command: Sequence[str], *, piped: bool):
        output = subprocess.PIPE if piped else None
        self.index = index
        self.told = self.by_us = self._cleared = False
        self.process = subprocess.Popen(
            tied(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            process_group=0,
        )

    def kill(self) -> None:
        """Ends it, stopped or not, with whatever it has started."""
        if self.process.poll() is None:
            self.by_us = True
        self.clear()
        self.process.wait()

    def clear(self) -> None:
        """Ends what is left of its group, once: later the number may be of another group."""
        if self._cleared:
            return
        self._cleared = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


class Family:
    """The processes of one start."""

    def __init__(self, plan: Plan, asked: Asked):
        self._plan, self._asked = plan, asked
        self._children: list[Child] = []
        self._ended: list[Ended] = []
        self._deadline = float("inf")
        self._relay = Relay(asked.wakeup[0])

    def run(self) -> Ended:
        """Starts all, waits for all; returns why they ended. Nobody is left behind."""
        self._asked.family = self
        try:
            flags = process_flags(self._plan)
            for index, own in enumerate(flags):
                child = Child(index, [sys.executable, *self._plan.command, *own], piped=index > 0)
                self._children.append(child)
                self._relay.add(child.index, child.process)
            while len(self._ended) < len(self._children):
                self._relay.wait(min(1.0, max(0.0, self._deadline - time.monotonic())))
                self._asked.drain()
                self.pass_on()
                self._collect()
                self._end_late_ones()
        finally:
            self._asked.family = None
            for child in self._children:
                child.kill()
            self._relay.close()
        return first_cause(self._ended)

    def pass_on(self) -> None:
        """Tells each child once what the launcher was asked."""
        if self._asked.number is None:
            return
        for child in self._children:
            if not child.told:
                child.told = True
                child.process.send_signal(self._asked.number)

    def _collect(self) -> None:
        known = {ended.process for ended in self._ended}
        for child in self._children:
            if child.index in known or child.process.poll() is None:
                continue
            child.clear()
            self._relay.finish(child.process)
            ended = Ended(child.index, child.process.returncode, child.by_us)
            self._ended.append(ended)
            if ended.code not in (0, EXIT_PREEMPTED):
                limit = self._plan.heartbeat_seconds + GRACE_SECONDS
                self._deadline = min(self._deadline, time.monotonic() + limit)

    def _end_late_ones(self) -> None:
        late = time.monotonic() >= self._deadline
        if not late and not self._asked.at_once:
            return
        for child in self._children:
            if child.process.poll() is None:
                if late:
                    say(f"process {child.index} has outlived the others: killed")
                child.kill()
        self._collect()


def process_flags(plan: Plan) -> list[list[str]]:
    """The flags that each process gets from the launcher; a new port for each call."""
    own = [] if plan.cpu_devices is None else [f"--cpu_devices={plan.cpu_devices}"]
    if plan.processes == 1:
        return [own]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own += [f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={plan.processes}"]
    own += [f"--heartbeat_seconds={plan.heartbeat_seconds}"]
    return [[*own, f"--process_id={index}"] for index in range(plan.processes)]


def first_cause(ended: Sequence[Ended]) -> Ended:
    """Why a run ended, from its processes in the order in which they did.

    Those that the launcher killed, and those whose end may be that of a peer (1 by a broken
    connection, SIGABRT by a lost heartbeat), come last.
    """
    failed = [one for one in ended if one.code != 0]
    if not failed:
        return ended[0]

    def order(one: Ended) -> tuple[bool, int]:
        return one.by_us, 1 + _LATER.index(one.code) if one.code in _LATER else 0

    return min(failed, key=order)  # the first of equals


def newest_step(workdir: Path | None) -> int:
    """The highest number among the names in `<workdir>/checkpoints`, -1 without any."""
    if workdir is None or not (workdir / "checkpoints").is_dir():
        return -1
    names = [path.name for path in (workdir / "checkpoints").iterdir()]
    return max((int(name) for name in names if name.isdigit()), default=-1)


def shell_code(code: int) -> int:
    """An exit code as shells report it: 128 + n for signal n."""
    return 128 - code if code < 0 else code


def describe(ended: Ended) -> str:
    """`process 1 was ended by SIGKILL`."""
    if ended.code < 0:
        return f"process {ended.process} was ended by {signal.Signals(-ended.code).name}"
    return f"process {ended.process} ended with {ended.code}"
