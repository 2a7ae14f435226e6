"""Real signals, to this process, to one in the middle of a C call, and to one of two processes."""

import contextlib
import os
from pathlib import Path
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.training import interruption as module
from moe.training.checkpoint import Checkpointer
from moe.training.interruption import GRACE, Interruption


def wait_for_request(interruption: Interruption) -> bool:
    for _ in range(200):
        if interruption.requested():
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_for_a_stop_and_the_old_handlers_return(number):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    read, write = os.pipe()
    os.set_blocking(write, False)
    outside = signal.set_wakeup_fd(write)
    with Interruption() as interruption:
        assert not interruption.requested()
        assert not interruption.asked
        os.kill(os.getpid(), number)
        assert wait_for_request(interruption)
        assert interruption.requested()
        assert interruption.asked
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert signal.set_wakeup_fd(outside) == write
    for end in (read, write):
        os.close(end)


def start(code: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_line(child: subprocess.Popen, line: str) -> None:
    assert child.stdout is not None
    for text in child.stdout:
        if text.strip() == line:
            return
    pytest.fail(f"the process ended before it printed {line}")


def test_the_second_ctrl_c_leaves_in_the_middle_of_a_long_c_call():
    child = start(
        """
        import hashlib
        from moe.training.interruption import Interruption
        with Interruption():
            print("busy", flush=True)
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes without one Python byte code
        """
    )
    with child:
        wait_for_line(child, "busy")
        child.send_signal(signal.SIGINT)
        assert child.stderr is not None
        assert child.stderr.readline() == "\n"
        assert "Ctrl-C again leaves at once" in child.stderr.readline()
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=10) == 130


def signal_and_wait(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_first_step_leaves_through_the_clean_up(number, capsys):
    with (
        Interruption() as interruption,
        pytest.raises(SystemExit) as end,
        interruption.nothing_to_lose(),
    ):
        signal_and_wait(number)
    assert end.value.code == 75
    assert capsys.readouterr().err.count("there is nothing to save") == 1


def test_a_second_signal_does_not_break_the_clean_up():
    cleaned = []

    def works() -> None:
        try:
            signal_and_wait(signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
            cleaned.append(True)

    with (
        Interruption() as interruption,
        pytest.raises(SystemExit),
        interruption.nothing_to_lose(),
    ):
        works()
    assert cleaned


def test_a_signal_of_another_kind_asks_for_nothing(monkeypatch, capsys):
    heard = threading.Event()
    monkeypatch.setattr(module, "GRACE", 0.0)
    monkeypatch.setattr(module.os, "_exit", lambda code: heard.set())
    before = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    try:
        with Interruption() as interruption, interruption.nothing_to_lose():
            os.kill(os.getpid(), signal.SIGUSR1)
            assert not heard.wait(0.3)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert capsys.readouterr().err == ""


def test_a_signal_before_the_phase_is_honoured_at_its_beginning():
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        assert wait_for_request(interruption)
        with pytest.raises(SystemExit), interruption.nothing_to_lose():
            pytest.fail("the phase has begun")


def test_a_signal_whose_exception_was_lost_is_honoured_at_the_end_of_the_phase():
    with (
        Interruption() as interruption,
        pytest.raises(SystemExit) as end,
        interruption.nothing_to_lose(),
        contextlib.suppress(SystemExit),  # as a callback from C does
    ):
        signal_and_wait(signal.SIGTERM)
    assert end.value.code == 75


def test_signals_at_the_end_of_the_phase_are_neither_lost_nor_fatal_to_a_run_that_steps():
    """Wherever the signal falls around the end: it leaves, or the steps that began are told."""
    child = start(
        """
        import os, random, signal, sys, threading, time
        from moe.training import interruption as module
        module.GRACE = 0.5
        sys.setswitchinterval(1e-5)  # the sender's thread is not kept waiting
        left = told = 0
        for trial in range(150):
            listening = module.Interruption()
            delay = random.Random(trial).uniform(0.001, 0.007)
            with listening:
                killer = threading.Timer(delay, os.kill, [os.getpid(), signal.SIGTERM])
                killer.start()
                try:
                    with listening.nothing_to_lose():
                        until = time.perf_counter() + 0.004
                        while time.perf_counter() < until:
                            pass
                    killer.join()
                    time.sleep(0.7 if told % 20 == 0 else 0.01)  # steps, some beyond the grace
                    assert listening.requested()
                    told += 1
                except SystemExit as end:
                    assert end.code == 75
                    left += 1
                killer.join()
        print(left > 20 and told > 20, left, told)
        """
    )
    with child:
        output, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    assert output.startswith("True"), output


def test_a_phase_that_ends_while_the_signal_is_being_told_is_a_run_that_steps(monkeypatch):
    """Its steps are not cut off when the grace is over."""
    told, ended, killed = threading.Event(), threading.Event(), threading.Event()

    def tell(text: str) -> None:
        told.set()
        ended.wait()

    monkeypatch.setattr(module, "GRACE", 0.1)
    monkeypatch.setattr(module, "_tell", tell)
    monkeypatch.setattr(module.os, "_exit", lambda code: killed.set())
    with Interruption() as interruption:
        with interruption.nothing_to_lose():
            os.write(interruption._pipe[1], bytes([signal.SIGTERM]))  # the handler comes later:
            assert told.wait(60)
        ended.set()
        os.kill(os.getpid(), signal.SIGTERM)
        assert wait_for_request(interruption)
        assert not killed.wait(0.5)


def test_a_signal_leaves_a_phase_of_nothing_to_lose_in_the_middle_of_a_long_c_call():
    child = start(
        """
        import hashlib
        from moe.training.interruption import Interruption
        with Interruption() as interruption, interruption.nothing_to_lose():
            print("busy", flush=True)
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
        """
    )
    with child:
        wait_for_line(child, "busy")
        time.sleep(0.5)  # into the call
        began = time.monotonic()
        child.send_signal(signal.SIGTERM)
        time.sleep(1.0)
        child.send_signal(signal.SIGTERM)  # which gives it no more time
        assert child.wait(timeout=60) == 75
        assert GRACE <= time.monotonic() - began < GRACE + 6  # of a loaded machine
        assert child.stderr is not None
        told = child.stderr.read()
    assert "without clean-up" in told
    assert told.count("nothing to save") == 1


PROCESS = """
    import sys, time
    import jax, jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec
    from moe.errors import EXIT_PREEMPTED
    from moe.training.checkpoint import Checkpointer
    from moe.training.interruption import Interruption
    directory, address, process, set_up = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(address, 2, process, coordinator_bind_address=address)
    mesh = jax.sharding.Mesh(jax.devices(), "fsdp")
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    state = {"w": jax.jit(lambda: jnp.arange(32.0).reshape(8, 4), out_shardings=rows)()}
    with Interruption() as interruption, Checkpointer(directory) as checkpoints:
        with interruption.nothing_to_lose():
            print("ready", flush=True)
            time.sleep(float(set_up))
        for step in range(1, 3000):
            time.sleep(0.01)
            if interruption.requested():
                checkpoints.save(step, state, {"next_index": step}, {}, {"bits_per_byte": 2.0})
                print(step, flush=True)
                raise SystemExit(EXIT_PREEMPTED)
"""


@pytest.mark.parametrize(
    ("number", "set_up"), [(signal.SIGINT, 0.0), (signal.SIGTERM, 2.0)], ids=["step", "set_up"]
)
def test_a_signal_to_one_of_two_processes_saves_the_same_step_in_both(
    number: int, set_up: float, tmp_path: Path
):
    """One in the set-up, of which the other knows nothing, is honoured after the first step."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    children = [start(PROCESS, tmp_path, address, process, set_up) for process in (0, 1)]
    try:
        for child in children:
            wait_for_line(child, "ready")
        children[1].send_signal(number)
        outputs = [child.communicate(timeout=60) for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [75, 75], outputs
    first, second = (int(output.splitlines()[-1]) for output, _ in outputs)
    assert first == second
    assert first == 1 or not set_up
    # What two processes wrote together, one process restores alone.
    target = jax.ShapeDtypeStruct(
        (8, 4), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
    )
    with Checkpointer(tmp_path, read_only=True) as checkpoints:
        restored = checkpoints.restore("best", {"w": target})
    assert restored.step == first
    assert restored.data_state == {"next_index": first}
    np.testing.assert_array_equal(restored.state["w"], np.arange(32.0).reshape(8, 4))
