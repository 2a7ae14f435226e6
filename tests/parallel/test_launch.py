"""The launcher, with small programs in place of a trainer."""

import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import tempfile
import textwrap
import time

import pytest

from moe.errors import STARTED_AGAIN
from moe.parallel.launch import Ended, first_cause, newest_step
from tests.faults.harness import Child, only_one
from tests.faults.harness import Ended as Done

LAUNCH = str(Path(__file__).parents[2] / "scripts" / "launch.py")
# The same where people's patience is not what is tested.
HASTY = """
import runpy, sys
from moe.parallel import launch
launch.GRACE_SECONDS, launch._LONGEST_PAUSE = 0.2, 0.05
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
PATIENCE = 120.0  # of a machine that is shared

# What each program starts with: its number, and a file of its own for each start.
PRELUDE = """
import json, os, signal, sys, time
flags = dict(a[2:].split("=", 1) for a in sys.argv[1:] if a.startswith("--") and "=" in a)
me, here = int(flags.get("process_id", 0)), flags["workdir"]
starts = len([n for n in os.listdir(here) if n.startswith(f"start-{me}-")])
with open(f"{here}/start-{me}-{starts}", "w") as file:
    json.dump({"flags": flags, "pid": os.getpid()}, file)
def say(text):
    os.write(1, f"{text}\\n".encode())  # in one piece, among lines of other processes
def saved(step):
    os.makedirs(f"{here}/checkpoints/{step}")
def listen(number, code):
    signal.signal(number, lambda *_: (say(f"asked {number}"), os._exit(code)))
def die(number):
    os.kill(os.getpid(), number)
"""


def command_of(tmp_path: Path, program: str, *flags: str) -> list[str]:
    (tmp_path / "program.py").write_text(PRELUDE + textwrap.dedent(program))
    return [LAUNCH, *flags, "--", str(tmp_path / "program.py"), f"--workdir={tmp_path}"]


def start(tmp_path: Path, program: str, *flags: str) -> Child:
    return Child([sys.executable, *command_of(tmp_path, program, *flags)], {})


def run(tmp_path: Path, program: str, *flags: str) -> Done:
    command = [sys.executable, "-c", HASTY, *command_of(tmp_path, program, *flags)]
    with Child(command, {}) as child:
        ended = child.finish(PATIENCE)
    assert_no_children(tmp_path)
    return ended


def told(tmp_path: Path) -> list[dict]:
    """What each process of each start found."""
    paths = sorted(tmp_path.glob("start-*"), key=lambda path: path.name.split("-")[::-1])
    return [json.loads(path.read_text()) for path in paths]


def assert_no_children(tmp_path: Path, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while left := [pid for pid in (one["pid"] for one in told(tmp_path)) if is_alive(pid)]:
        assert time.monotonic() < end, f"still there: {left}"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_processes_get_their_flags_and_lines_their_number(tmp_path):
    ended = run(
        tmp_path,
        """
        say(f"I am {me}")
        sys.stderr.write("no end of line" if me == 2 else "")
        """,
        "--processes=3",
        "--cpu_devices=4",
        "--heartbeat=7",
    )
    assert ended.code == 0, ended.text
    assert sorted(ended.text.splitlines()) == [
        "I am 0",
        "[1] I am 1",
        "[2] I am 2",
        "[2] no end of line",
    ]
    flags = [one["flags"] for one in told(tmp_path)]
    assert [one.pop("process_id") for one in flags] == ["0", "1", "2"]
    (address,) = {one.pop("coordinator_address") for one in flags}
    assert address.startswith("127.0.0.1:")
    for one in flags:
        del one["workdir"]
        assert one == {"num_processes": "3", "cpu_devices": "4", "heartbeat_seconds": "7"}


def test_one_process_is_no_run_of_several(tmp_path):
    ended = run(tmp_path, "say('alone')", "--processes=1", "--cpu_devices=2")
    assert (ended.code, ended.text) == (0, "alone\n")
    (one,) = told(tmp_path)
    assert set(one["flags"]) == {"workdir", "cpu_devices"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_passed_on_once_and_nothing_starts_again(number, tmp_path):
    """A terminal that is closed asks to stop, as SIGTERM does."""
    program = """
    listen(signal.SIGTERM, 75), listen(signal.SIGHUP, 1)
    say(f"ready {me}")
    time.sleep(100)
    """
    with start(tmp_path, program, "--processes=2", "--restarts=3") as child:
        wait_for_all(child, "ready 0", "[1] ready 1")
        child.signal(number)
        ended = child.finish(PATIENCE)
    assert ended.code == 75, ended.text
    assert ended.text.count(f"asked {int(signal.SIGTERM)}") == 2
    assert "launch:" not in ended.text
    assert_no_children(tmp_path)


def wait_for_all(child: Child, *lines: str) -> None:
    """Processes print in any order."""
    missing = set(lines)
    while missing:
        missing.discard(child.wait_for("", PATIENCE).strip())


def test_ctrl_c_of_a_terminal_reaches_the_launcher_alone(tmp_path):
    """A terminal signals the whole group of the launcher: its children are in groups of their own.

    Nor do they read what is typed: several would take it from each other.
    """
    program = """
    listen(signal.SIGINT, 75)
    silent = os.path.samestat(os.fstat(0), os.stat(os.devnull))
    say(f"ready {os.getpgid(0) == os.getpid()} {silent}")
    time.sleep(100)
    """
    command = [sys.executable, *command_of(tmp_path, program)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0
    ) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == "ready True True\n"
        os.killpg(launcher.pid, signal.SIGINT)
        assert launcher.communicate(timeout=PATIENCE)[0] == "asked 2\n"
    assert launcher.returncode == 75


def test_a_second_ctrl_c_kills_all_at_once(tmp_path):
    program = """
    signal.signal(signal.SIGINT, lambda *_: say(f"not yet {me}"))
    say(f"ready {me}")
    while True:
        time.sleep(100)
    """
    with start(tmp_path, program, "--processes=2", "--restarts=3") as child:
        wait_for_all(child, "ready 0", "[1] ready 1")
        child.signal(signal.SIGINT)
        wait_for_all(child, "not yet 0", "[1] not yet 1")
        began = time.monotonic()
        child.signal(signal.SIGINT)
        ended = child.finish(PATIENCE)
    assert ended.code == 130, ended.text
    assert time.monotonic() - began < 10
    assert ended.text.count("not yet") == 2  # each was told once
    assert_no_children(tmp_path)


def test_a_signal_before_the_program_listens_loses_nothing(tmp_path):
    with start(tmp_path, "say('ready'), time.sleep(100)", "--restarts=3") as child:
        child.wait_for("ready", PATIENCE)
        child.signal(signal.SIGTERM)
        ended = child.finish(PATIENCE)
    assert ended.code == 75, ended.text


def test_the_others_of_a_failed_process_end_in_bounded_time_even_stopped_ones(tmp_path):
    """Process 1 loses a connection, 2 aborts without its peers, 0 stands still for ever.

    The SIGKILL that 0 gets from the launcher is not why they ended: it would start them again.
    """
    program = """
    if me == 0:
        die(signal.SIGSTOP)
    if me == 2:
        time.sleep(0.3)
        die(signal.SIGABRT)
    sys.exit(1)
    """
    ended = run(tmp_path, program, "--processes=3", "--heartbeat=1", "--restarts=3")
    assert ended.code == 1, ended.text
    assert "launch: process 0 has outlived the others: killed" in ended.text
    assert 1.2 <= ended.seconds < 1.2 + 20
    assert len(told(tmp_path)) == 3


def test_what_a_process_has_started_goes_with_it(tmp_path):
    """At once: process 0 waits for it, and its number may be of another group when the run ends."""
    program = """
    import subprocess
    if me == 1:
        other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
        with open(f"{here}/start-9-0.tmp", "w") as file:
            json.dump({"pid": other.pid}, file)
        os.rename(f"{here}/start-9-0.tmp", f"{here}/start-9-0")
        os._exit(0)
    while not os.path.exists(f"{here}/start-9-0"):
        time.sleep(0.02)
    with open(f"{here}/start-9-0") as file:
        pid = json.load(file)["pid"]
    while os.path.exists(f"/proc/{pid}") and "Z" not in open(f"/proc/{pid}/stat").read().rpartition(")")[2]:
        time.sleep(0.02)
    """
    assert run(tmp_path, program, "--processes=2").code == 0


def test_children_die_with_a_launcher_that_is_killed(tmp_path):
    program = "signal.signal(signal.SIGTERM, signal.SIG_IGN), say(f'ready {me}'), time.sleep(100)"
    with start(tmp_path, program, "--processes=2") as child:
        wait_for_all(child, "ready 0", "[1] ready 1")
        child.signal(signal.SIGKILL)
        assert child.finish(PATIENCE).code == -signal.SIGKILL
    assert_no_children(tmp_path)


@pytest.mark.parametrize(
    ("ends", "code", "starts"),
    [
        (["sys.exit(75)", "sys.exit(70)", "die(9)", "die(6)", "die(11)"], 0, 6),
        (["sys.exit(75)", "sys.exit(3)"], 3, 2),
    ],
)
def test_what_is_started_again(ends, code, starts, tmp_path):
    """Each start saves a newer step, the last one ends well."""
    program = f"saved(10 * starts)\nif starts < {len(ends)}:\n    exec({ends}[starts])"
    ended = run(tmp_path, program, "--restarts=9")
    assert ended.code == code, ended.text
    assert len(told(tmp_path)) == starts


def test_how_a_run_must_end_to_be_started_again():
    signals = {-signal.SIGKILL, -signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGTERM}
    assert set(STARTED_AGAIN) == {75, 70} | signals


def test_every_start_has_a_port_of_its_own(tmp_path):
    program = "saved(10 * starts + me)\nif starts < 2: die(signal.SIGKILL)\nsay('done')"
    ended = run(tmp_path, program, "--processes=2", "--restarts=2", "--heartbeat=1")
    assert ended.code == 0, ended.text
    addresses = [one["flags"]["coordinator_address"] for one in told(tmp_path)]
    assert len(addresses) == 6
    assert len(set(addresses)) == 3


def test_restarts_are_counted(tmp_path):
    ended = run(tmp_path, "saved(starts)\ndie(signal.SIGKILL)", "--restarts=2")
    assert ended.code == 128 + 9
    assert len(told(tmp_path)) == 3
    assert "process 0 was ended by SIGKILL: start 1 of 2 again, from step 0" in ended.text
    assert "all 2 restarts are used up" in ended.text


def test_two_restarts_in_a_row_without_a_newer_checkpoint_are_enough(tmp_path):
    """Starts 0, 3 save; 1, 2 and 4, 5, 6 do not: the third of these is the last."""
    program = "if starts in (0, 3): saved(1 + starts)\ndie(signal.SIGKILL)"
    ended = run(tmp_path, program, "--restarts=99")
    assert ended.code == 128 + 9
    assert len(told(tmp_path)) == 7, ended.text
    assert "no newer checkpoint in 3 starts" in ended.text


def test_a_signal_between_two_starts_ends_it(tmp_path):
    with start(tmp_path, "die(signal.SIGKILL)", "--restarts=99") as child:
        child.wait_for("launch:", PATIENCE)
        child.signal(signal.SIGTERM)
        ended = child.finish(PATIENCE)
    assert ended.code == 75, ended.text


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--processes=0", "--", "x.py"], "processes"),
        (["--processes=2"], "nothing where `-- PROGRAM.py FLAGS`"),
        (["train.py"], "train.py where `-- PROGRAM.py FLAGS`"),
        (["--proceses=2", "--", "x.py"], "Did you mean: processes"),
        (["--", "x.py", "--process_id=1"], "--process_id=1 after `--`"),
    ],
)
def test_mistakes_are_told(arguments, word):
    done = subprocess.run([sys.executable, LAUNCH, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert word in done.stderr
    assert done.stderr.startswith("ConfigError: ")


def test_help_lists_the_flags():
    done = subprocess.run([sys.executable, LAUNCH, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--heartbeat" in done.stdout


def test_the_cause_is_the_first_that_failed_by_itself():
    survivor, broken, killed = Ended(0, -6), Ended(0, 1), Ended(2, -9, by_us=True)
    assert first_cause([survivor, Ended(1, 3), killed]).code == 3
    assert first_cause([Ended(1, -9), broken]).code == -9
    assert first_cause([broken, Ended(1, -9)]).code == -9  # it was seen before its peer
    assert first_cause([survivor, broken]).code == 1
    assert first_cause([Ended(0, 75), Ended(1, 75)]).code == 75
    assert first_cause([survivor, killed]).code == -6
    assert first_cause([Ended(0, 0), survivor]).code == -6
    assert first_cause([Ended(0, 0), Ended(1, 0)]).code == 0


def test_steps_are_read_from_names(tmp_path):
    assert newest_step(None) == -1
    assert newest_step(tmp_path) == -1
    for name in ("8", "10", "12.orbax-checkpoint-tmp", "scores.json"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_step(tmp_path) == 10


FAILING = """
from pathlib import Path
import sys
import tempfile
import time
from absl import flags
import jax
from jax.experimental import multihost_utils
from moe import cli
from moe.errors import DataError
from moe.parallel import distributed
from moe.parallel.meeting import meet

values = flags.FlagValues()
distributed.define_flags(values)
flags.DEFINE_string("workdir", None, "", flag_values=values)

def main(argv):
    values(argv)
    distributed.start_from_flags(values)
    mark = Path(values.workdir) / "late"
    if jax.process_index() == 1:
        time.sleep(1)
        mark.touch()
    meet("here")
    print(f"met {mark.exists()}", flush=True)
    multihost_utils.process_allgather(jax.numpy.ones(1))
    if jax.process_index() == 1:
        raise DataError("record 7 of process 1 cannot be read")
    while True:
        multihost_utils.process_allgather(jax.numpy.ones(1))

cli.run(main)
"""


def test_the_error_of_one_real_process_is_the_exit_code_of_all(tmp_path):
    """At the usual exit it would wait for its peer until both are aborted, and its code is lost."""
    (tmp_path / "program.py").write_text(FAILING)
    flags = ["--processes=2", "--cpu_devices=1", "--heartbeat=60", "--restarts=2"]
    program = ["--", str(tmp_path / "program.py"), f"--workdir={tmp_path}"]
    with (
        only_one(Path(tempfile.gettempdir()) / "moe-two-processes.lock"),
        Child([sys.executable, LAUNCH, *flags, *program], {}) as child,
    ):
        ended = child.finish()
    assert ended.code == 3, ended.text
    assert "[1] DataError: record 7 of process 1 cannot be read" in ended.text
    assert sum(line.endswith("met True") for line in ended.text.splitlines()) == 2
    assert "launch:" not in ended.text  # nothing had to be killed, nothing was started again
    assert "Left " not in ended.text  # nor did anybody wait for exits that cannot come
