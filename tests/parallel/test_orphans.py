"""A child dies with its parent, which was killed and could say nothing."""

import os
from pathlib import Path
import signal
import subprocess
import sys
import time

import pytest

from moe.parallel.orphans import tied

PARENT = """
import subprocess, sys
from moe.parallel.orphans import tied
child = subprocess.Popen(tied([sys.executable, "-c", "import time; print(1, flush=True); time.sleep(99)"]))
print(child.pid, flush=True)
child.wait()
"""


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_child_of_a_killed_parent_dies():
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        lines = {parent.stdout.readline().strip(), parent.stdout.readline().strip()}
        (child,) = (int(line) for line in lines - {b"1"})
        assert is_running(child)
        parent.kill()
        end = time.monotonic() + 30
        while is_running(child):
            assert time.monotonic() < end, "the child is still there"
            time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_parent_that_died_before_the_child_was_tied_is_seen():
    command = tied([sys.executable, "-c", "print('ran')"])
    command[command.index(str(os.getpid()))] = "1"  # as if adopted by another process
    ended = subprocess.run(command, capture_output=True)
    assert (ended.returncode, ended.stdout) == (-signal.SIGKILL, b"")


def test_tied_command_is_the_command_itself():
    ended = subprocess.run(tied([sys.executable, "-c", "import os; print(os.getpid()); exit(7)"]))
    assert ended.returncode == 7
