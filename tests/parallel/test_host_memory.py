"""Large blocks are reused: the second fill of a freed block takes no page faults."""

import subprocess
import sys
import textwrap

import pytest

SCRIPT = """
    import ctypes, resource, sys
    from moe.parallel.host_memory import reuse_buffers
    if sys.argv[1] == "reuse":
        assert reuse_buffers()
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    faults = []
    for _ in range(2):
        block = libc.malloc(64 << 20)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        ctypes.memset(block, 1, 64 << 20)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        libc.free(block)
    print(faults[1])
"""


def second_fill_faults(mode: str) -> int:
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), mode]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_blocks_are_reused():
    assert second_fill_faults("reuse") < 10
    assert second_fill_faults("plain") > 10
