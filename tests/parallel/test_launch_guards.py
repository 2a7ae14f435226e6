"""The launcher where a terminal, a pipe or a process number is not what it was; its lines; its command line."""

import array
import contextlib
import fcntl
import os
from pathlib import Path
import runpy
import signal
import subprocess
import sys
import termios
import time
from types import SimpleNamespace
from typing import Any

from moe.parallel import launch, relay
from moe.parallel.launch import Asked, Family, Plan
from moe.parallel.relay import Relay
from tests.parallel.test_launch import LAUNCH, PATIENCE, assert_no_children, command_of


def wait_until(true, seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def waiting_in(pipe: Any) -> int:
    """Bytes that nobody has read yet."""
    count = array.array("i", [0])
    fcntl.ioctl(pipe.fileno(), termios.FIONREAD, count)
    return count[0]


def test_a_signal_reaches_all_while_the_terminal_stands_still(tmp_path):
    """Nobody reads what they print: the launcher hangs in a write, and so do they."""
    program = """
    def leave(*_):
        open(f"{here}/asked-{me}", "w").close()
        os._exit(75)
    signal.signal(signal.SIGTERM, leave)
    while True:
        say(1000 * "x")
    """
    command = [sys.executable, *command_of(tmp_path, program, "--processes=2")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        wait_until(
            lambda: waiting_in(child.stdout) > 60_000 and len(list(tmp_path.glob("start-*"))) == 2
        )
        time.sleep(0.2)
        child.terminate()
        wait_until(lambda: len(list(tmp_path.glob("asked-*"))) == 2)
        assert child.stdout is not None
        child.stdout.read()
    assert child.returncode == 75
    assert_no_children(tmp_path)


def test_a_terminal_that_is_gone_leaves_nothing_behind(tmp_path):
    """The launcher ends by an error of its own: not even what its processes have started stays."""
    program = """
    import subprocess
    if me == 0:
        other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
        with open(f"{here}/start-9-0", "w") as file:
            json.dump({"pid": other.pid}, file)
        say("ready")
        time.sleep(100)
    while True:
        time.sleep(0.05)
        say("more")
    """
    command = [sys.executable, *command_of(tmp_path, program, "--processes=2")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        assert child.stdout is not None
        while child.stdout.readline() != b"ready\n":
            pass
        child.stdout.close()
        assert child.wait(PATIENCE) != 0
    assert_no_children(tmp_path)


def test_nohup_is_respected(tmp_path):
    program = 'say("ready"), time.sleep(0.5)'
    command = ["nohup", sys.executable, *command_of(tmp_path, program)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        child.send_signal(signal.SIGHUP)
        assert child.wait(PATIENCE) == 0


def test_a_group_is_killed_once(monkeypatch):
    """Later its number may be of another group."""
    killed = []
    monkeypatch.setattr(os, "killpg", lambda *arguments: killed.append(arguments))
    child = launch.Child(0, [sys.executable, "-c", ""], piped=False)
    child.process.wait()
    child.clear()
    child.kill()
    assert killed == [(child.process.pid, signal.SIGKILL)]
    assert not child.by_us


def ended(index: int, code: int) -> Any:
    process = SimpleNamespace(poll=lambda: code, returncode=code)
    return SimpleNamespace(index=index, process=process, by_us=False, clear=lambda: None)


def test_the_first_failure_starts_the_clock_and_no_other_end_does():
    before = {number: signal.getsignal(number) for number in (*launch.PASSED_ON, signal.SIGCHLD)}
    with Asked() as asked:
        family = Family(Plan(["x.py"], processes=4, heartbeat_seconds=7), asked)
        family._relay.close()
        family._relay = SimpleNamespace(finish=lambda process: None)
        for index, code in ((0, 0), (1, 75)):  # others may still write or save
            family._children.append(ended(index, code))
            family._collect()
            assert family._deadline == float("inf")
        limit = 7 + launch.GRACE_SECONDS
        began = time.monotonic()
        family._children.append(ended(2, -6))
        family._collect()
        first = family._deadline
        assert began + limit <= first <= time.monotonic() + limit
        family._children.append(ended(3, 1))
        family._collect()
        assert family._deadline == first
    assert {number: signal.getsignal(number) for number in before} == before


def test_only_a_second_ctrl_c_is_impatient():
    """A machine that closes down may send SIGTERM again and again while the state is saved."""
    with Asked() as asked:
        for number in (
            signal.SIGTERM,
            signal.SIGTERM,
            signal.SIGHUP,
            signal.SIGCHLD,
            signal.SIGINT,
        ):
            asked._handle(number, None)
            assert not asked.at_once
            assert asked.number == signal.SIGTERM  # the first is what is passed on
        asked._handle(signal.SIGINT, None)
        assert asked.at_once


@contextlib.contextmanager
def relayed(program: str):
    """A relay, and a process that it reads."""
    wakeup = os.pipe()
    found = Relay(wakeup[0])
    with subprocess.Popen(
        ["sh", "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,
    ) as process:
        found.add(3, process)
        yield found, process
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    found.close()
    for end in wakeup:
        os.close(end)


def test_each_stream_stays_what_it_is_and_nothing_holds_up_the_end(capfd):
    """Something that goes on, and has the pipes, is not waited for."""
    with relayed("echo out; echo error >&2; printf rest; sleep 100 &") as (found, process):
        process.wait(PATIENCE)
        began = time.monotonic()
        found.finish(process)
        assert time.monotonic() - began < 10
    told = capfd.readouterr()
    assert told.out == "[3] out\n[3] rest\n"
    assert told.err == "[3] error\n"


def test_a_line_without_end_is_not_held_back(capfd, monkeypatch):
    monkeypatch.setattr(relay, "_LINE", 1000)
    with relayed("cat") as (found, process):
        assert process.stdin is not None
        process.stdin.write(b"x" * 2500)
        process.stdin.flush()
        text = ""
        while text.count("\n") < 2:
            found.wait(10.0)
            text += capfd.readouterr().out
        assert set(text.splitlines()) <= {"[3] " + length * "x" for length in range(1000, 2000)}


def test_the_workdir_of_a_command():
    workdir_of = runpy.run_path(LAUNCH)["workdir_of"]
    assert workdir_of(["train.py", "--config=c.py"]) is None
    assert workdir_of(["train.py", "--workdir=a", "--workdir", "b", "--config=c"]) == Path("b")
    assert workdir_of(["train.py", "-workdir", "b", "--workdir=~/a"]) == Path("~/a").expanduser()
