"""The port that processes meet at: it takes no password, so it listens to this machine alone."""

import ipaddress
from pathlib import Path
import socket
import struct
import subprocess
import sys

import pytest

LISTEN = "0A"  # of the column `st`
CHILD = """
import sys
from moe.parallel import distributed
distributed.start(cpu_devices=1, coordinator_address=sys.argv[1], num_processes=1, process_id=0)
print("started", flush=True)
sys.stdin.read()
"""


def listening(port: int) -> list[str]:
    """The addresses on which anybody of this machine listens at a port."""
    found = []
    for table in ("tcp", "tcp6"):
        path = Path("/proc/net") / table
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            _, local, _, state, *_ = line.split()
            address, _, number = local.partition(":")
            if state == LISTEN and int(number, 16) == port:
                found.append(_address(address))
    return found


def _address(text: str) -> str:
    """As the kernel writes it: words of 32 bits in this machine's byte order."""
    words = [int(text[i : i + 8], 16) for i in range(0, len(text), 8)]
    address = ipaddress.ip_address(struct.pack(f"={len(words)}I", *words))
    return str(getattr(address, "ipv4_mapped", None) or address)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.mark.skipif(
    not Path("/proc/net/tcp").exists(), reason="the kernel's table of ports is Linux's"
)
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_loopback_address_is_listened_on_alone(host):
    port = free_port()
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, f"{host}:{port}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "started\n"
            found = listening(port)
        finally:
            child.kill()
    assert found
    assert all(ipaddress.ip_address(address).is_loopback for address in found), found


def test_the_table_is_read_right():
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        one.listen()
        other.bind(("0.0.0.0", 0))
        other.listen()
        assert listening(one.getsockname()[1]) == ["127.0.0.1"]
        assert listening(other.getsockname()[1]) == ["0.0.0.0"]
