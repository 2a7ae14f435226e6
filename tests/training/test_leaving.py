"""The end of processes whose threads, or whose readers, do not end."""

import subprocess
import sys
import textwrap
import time

import pytest

READS = """
    import sys, threading
    import grain
    from moe.training.leaving import leave_in_time

    class Rows:
        def __len__(self):
            return 1000
        def __getitem__(self, index):
            return threading.Event().wait() if index > 3 else index

    read = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    rows = iter(grain.MapDataset.source(Rows()).to_iter_dataset(read))
    next(rows)
    print("read one")
    leave_in_time(int(sys.argv[1]), 1.0)
"""


def run(code: str, *arguments: object) -> tuple[int, str, str, float]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr, time.monotonic() - began


@pytest.mark.parametrize("code", [0, 3])
def test_threads_that_read_from_what_does_not_answer_are_not_waited_for(code):
    ended, output, errors, _ = run(READS, code)
    assert ended == code
    assert output == "read one\n"
    assert "not waiting for grain-prefetch" in errors


def test_a_process_that_ends_by_itself_is_left_alone():
    code = (
        "from moe.training.leaving import leave_in_time; leave_in_time(3, 30.0); raise ValueError"
    )
    ended, _, errors, seconds = run(code)
    assert ended == 1
    assert errors.rstrip().endswith("ValueError")
    assert seconds < 25


def test_output_that_nobody_reads_is_not_waited_for():
    command = [
        sys.executable,
        "-c",
        "from moe.training.leaving import leave_in_time\n"
        "leave_in_time(3, 1.0)\nprint('x' * 1_000_000, flush=True)",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        try:
            assert child.wait(60) == 3
        finally:
            child.kill()


@pytest.mark.parametrize(("code", "bounded"), [(0, False), (75, False), (1, True)])
def test_several_processes_wait_for_each_other_only_where_the_run_has_not_failed(code, bounded):
    ended, _, errors, _ = run(
        """
        import socket, sys, time
        import jax
        from moe.training.leaving import leave_in_time
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        jax.distributed.initialize(address, 1, 0, coordinator_bind_address=address)
        leave_in_time(int(sys.argv[1]), 0.5)
        time.sleep(3)
        sys.exit(9)
        """,
        code,
    )
    assert ended == (code if bounded else 9), errors
