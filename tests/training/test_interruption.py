"""Real signals, to this process, to one in the middle of a C call, and to one of two processes."""

import os
from pathlib import Path
import signal
import socket
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.training.checkpoint import Checkpointer
from moe.training.interruption import Interruption


def wait_for_request(interruption: Interruption) -> bool:
    for step in range(200):
        if interruption.requested(step):
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_for_a_stop_and_the_old_handlers_return(number):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Interruption() as interruption:
        assert not interruption.requested(0)
        os.kill(os.getpid(), number)
        assert wait_for_request(interruption)
        assert interruption.requested(1000)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


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


PROCESS = """
    import sys, time
    import jax, jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec
    from moe.errors import EXIT_PREEMPTED
    from moe.training.checkpoint import Checkpointer
    from moe.training.interruption import Interruption
    directory, address, process = sys.argv[1], sys.argv[2], int(sys.argv[3])
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(address, 2, process, coordinator_bind_address=address)
    mesh = jax.sharding.Mesh(jax.devices(), "fsdp")
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    state = {"w": jax.jit(lambda: jnp.arange(32.0).reshape(8, 4), out_shardings=rows)()}
    with Interruption() as interruption, Checkpointer(directory) as checkpoints:
        print("ready", flush=True)
        for step in range(1, 3000):
            time.sleep(0.01)
            if interruption.requested(step):
                checkpoints.save(step, state, {"next_index": step}, {}, {"bits_per_byte": 2.0})
                print(step, flush=True)
                raise SystemExit(EXIT_PREEMPTED)
"""


def test_ctrl_c_to_one_of_two_processes_saves_the_same_step_in_both(tmp_path: Path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    children = [start(PROCESS, tmp_path, address, process) for process in (0, 1)]
    try:
        for child in children:
            wait_for_line(child, "ready")
        children[1].send_signal(signal.SIGINT)
        outputs = [child.communicate(timeout=60) for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [75, 75], outputs
    first, second = (int(output.splitlines()[-1]) for output, _ in outputs)
    assert first == second
    # What two processes wrote together, one process restores alone.
    target = jax.ShapeDtypeStruct(
        (8, 4), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
    )
    with Checkpointer(tmp_path, read_only=True) as checkpoints:
        restored = checkpoints.restore("best", {"w": target})
    assert restored.step == first
    assert restored.data_state == {"next_index": first}
    np.testing.assert_array_equal(restored.state["w"], np.arange(32.0).reshape(8, 4))
