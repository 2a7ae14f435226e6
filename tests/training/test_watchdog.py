"""The watchdog in processes of its own: what it ends, and what it leaves alone."""

from collections.abc import Callable
import errno
import fcntl
import itertools
import os
from pathlib import Path
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time

from absl import flags
import pytest

from moe.errors import EXIT_STUCK, ConfigError
from moe.training import watchdog, watcher
from moe.training.watchdog import Watchdog


def start(code: str) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_run_that_is_silent_ends_with_stacks_and_one_line_of_cause():
    child = start(
        """
        import threading, time
        from moe.training.watchdog import Watchdog
        def reads_a_dead_disk():
            time.sleep(600)
        threading.Thread(target=reads_a_dead_disk, name="reader").start()  # would be waited for
        def waits():
            threading.Event().wait()
        with Watchdog(1.0) as dog:
            for step in range(10):
                dog.beat(f"step {step}")
                time.sleep(0.2)  # two seconds in all
            waits()
        """
    )
    with child:
        began = time.monotonic()
        _, errors = child.communicate(timeout=60)
        assert time.monotonic() - began < 30
    assert child.returncode == EXIT_STUCK
    for text in ("Thread MainThread:", " in waits", "Thread reader:", " in reads_a_dead_disk"):
        assert text in errors
    cause = errors.splitlines()[-1]
    assert cause.startswith("Stuck: nothing has moved for 1 s since step 9 (--stuck_after=1)")


def test_a_stderr_that_nobody_reads_does_not_keep_a_stuck_run_alive():
    child = start(
        """
        import os, time
        from moe.training import watchdog, watcher
        watchdog._TELLING = 0.5
        os.set_blocking(2, False)
        try:
            while True:
                os.write(2, bytes(4096))
        except BlockingIOError:
            os.set_blocking(2, True)
        with watchdog.Watchdog(0.5):
            time.sleep(600)
        """
    )
    with child:
        try:
            assert child.wait(timeout=60) == EXIT_STUCK
        finally:
            child.kill()


def watcher_of(child: subprocess.Popen) -> int:
    """The process beside it."""
    (pid,) = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    return int(pid)


def ask_to_stop(pid: int) -> None:
    """As a signal to the whole group does, once it is past its first lines."""
    wait_until(lambda: bool(ignored(pid) >> (signal.SIGTERM - 1) & 1))
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid, number)


def ignored(pid: int) -> int:
    (line,) = re.findall(r"SigIgn:\s(\w+)", Path(f"/proc/{pid}/status").read_text())
    return int(line, 16)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_c_call_that_keeps_the_interpreter_is_shown_and_killed():
    child = start(
        """
        import ctypes, os
        from moe.training import watchdog, watcher
        watchdog._TELLING = 0.5
        def calls():
            ctypes.PyDLL(None).sleep(600)  # PyDLL: without giving up the interpreter's lock
        with watchdog.Watchdog(1.0):
            os.write(1, b"calls\\n")
            calls()
        """
    )
    with child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "calls\n"
            began = time.monotonic()
            ask_to_stop(watcher_of(child))
            _, errors = child.communicate(timeout=60)
            seconds = time.monotonic() - began
        finally:
            child.kill()
    assert child.returncode == -signal.SIGKILL
    assert 2.5 < seconds < 25  # twice the second, twice the telling; up to a nap, and load
    assert errors.startswith("Timeout (0:00:02.500000)!\n")
    assert " in calls\n" in errors
    cause = errors.splitlines()[-1]
    assert cause.startswith("Stuck: for 3 s no thread could run Python.")


WATCHED = """
    import ctypes, os
    from moe.training import watchdog, watcher
    watchdog._TELLING = 0.1
    libc = ctypes.PyDLL(None)  # PyDLL: without giving up the interpreter's lock
    class Deaf(watchdog.Watchdog):  # the thread has no part in it
        def _watch(self):
            self._end.wait()
    with Deaf({seconds}) as dog:  # the process beside it: twice, and 0.2
"""


def watched(seconds: float, block: str) -> subprocess.Popen:
    head = textwrap.dedent(WATCHED).format(seconds=seconds)
    return start(head + textwrap.indent(textwrap.dedent(block), "    "))


def test_patience_for_a_c_call_that_keeps_the_interpreter():
    """And beyond the block none."""
    child = watched(
        0.5,
        """
        with dog.patient("compilation"):
            libc.sleep(2)
            with dog.patient("a part of it"):
                pass
            libc.sleep(2)
        os.write(2, b"patient\\n")
        libc.sleep(600)
        """,
    )
    with child:
        try:
            _, errors = child.communicate(timeout=60)
        finally:
            child.kill()
    assert child.returncode == -signal.SIGKILL
    assert "patient\n" in errors
    assert errors.splitlines()[-1].startswith("Stuck: for 1 s")


def test_a_process_that_was_stopped_is_not_killed():
    """Stopped in the middle of a call that keeps the interpreter: the wait is not counted."""
    child = watched(
        1.0,
        """
        os.write(1, b"calls\\n")
        libc.poll(None, 0, 1000)
        """,
    )
    with child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "calls\n"
            child.send_signal(signal.SIGSTOP)
            time.sleep(3.5)
            child.send_signal(signal.SIGCONT)
            _, errors = child.communicate(timeout=60)
        finally:
            child.kill()
    assert child.returncode == 0, errors
    assert "Stuck" not in errors


def test_a_watcher_ends_with_a_process_that_was_killed():
    """Though a child of it holds the pipe open."""
    child = watched(
        32.0,  # it would wait for twice that
        """
        os.write(1, b"ready\\n")
        if os.fork() == 0:
            libc.sleep(10)
            os._exit(0)
        libc.sleep(600)
        """,
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        watchers = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        child.kill()
        wait_until(lambda: not Path(f"/proc/{watchers[0]}").exists())


def test_silence_is_counted_in_naps(monkeypatch):
    """Whatever the clock says after a machine was suspended: limit 10 in naps of 1 are at least 6."""
    looks, clock = [], itertools.count(0, 3600)
    monkeypatch.setattr(watcher.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(watcher, "is_stopped", lambda pid: False)
    monkeypatch.setattr(watcher.select, "select", lambda *args: looks.append(args) or ([], [], []))
    assert watcher.silence(os.getppid(), 10.0, 1.0) == 12.0
    assert len(looks) == 6


def test_a_watcher_that_is_gone_is_told_once_and_the_run_goes_on(caplog):
    with Watchdog(60.0) as dog:
        assert dog._watcher is not None
        assert dog._watcher._process is not None
        dog._watcher._process.kill()
        dog._watcher._process.wait()
        for _ in range(2):
            with dog.patient("compilation"):
                pass
    assert [record.message[:28] for record in caplog.records] == ["No process watches this one "]


def test_a_watcher_that_cannot_start_is_told_and_the_run_goes_on(caplog, monkeypatch):
    def none_left(*args: object, **named: object) -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(watchdog.subprocess, "Popen", none_left)
    with Watchdog(60.0) as dog, dog.patient("compilation"):
        pass
    (told,) = [record.message for record in caplog.records]
    assert "(Resource temporarily unavailable)" in told


def test_a_watcher_that_is_stopped_holds_nothing_up():
    with Watchdog(60.0) as dog:
        assert dog._watcher is not None
        assert dog._watcher._process is not None
        dog._watcher._process.send_signal(signal.SIGSTOP)
        fcntl.fcntl(dog._watcher._pipe, fcntl.F_SETPIPE_SZ, 4096)
        for _ in range(5000):
            dog._tell_watcher()


def test_a_process_that_was_stopped_goes_on():
    child = start(
        """
        import time
        from moe.training.watchdog import Watchdog
        with Watchdog(6.0) as dog:
            dog.beat("step 1")
            print("ready", flush=True)
            for _ in range(20):  # two seconds awake
                time.sleep(0.1)
        """
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        time.sleep(1.0)
        child.send_signal(signal.SIGSTOP)
        time.sleep(8.0)
        child.send_signal(signal.SIGCONT)
        _, errors = child.communicate(timeout=60)
    assert child.returncode == 0, errors


def test_patience_and_beats_keep_a_run_and_leave_no_thread(monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(watchdog.os, "_exit", lambda code: ended.set())
    with Watchdog(0.3) as dog:
        with dog.patient("compilation"):
            time.sleep(1.0)
            with dog.patient("a part of it"):
                pass
            time.sleep(1.0)
        assert not ended.is_set()
        assert ended.wait(30)  # and after the block it watches again
    assert "watchdog" not in [thread.name for thread in threading.enumerate()]


def test_zero_seconds_watch_nothing():
    with Watchdog(0) as dog:
        dog.beat("step 1")
        assert "watchdog" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_a_time_that_is_none_is_refused(seconds):
    with pytest.raises(ConfigError, match="--stuck_after="):
        Watchdog(seconds)


def test_the_flag_has_a_default():
    values = flags.FlagValues()
    watchdog.define_flag(values)
    values(["train.py", "--stuck_after=5"])
    assert values.stuck_after == 5
    values(["train.py"])
    values.unparse_flags()
    values(["train.py"])


def test_a_beat_is_cheap():
    dog = Watchdog(60.0)
    began = time.perf_counter()
    for _ in range(1000):
        dog.beat("a step")
    assert time.perf_counter() - began < 0.1  # 0.1 ms each, on a machine shared by ten
