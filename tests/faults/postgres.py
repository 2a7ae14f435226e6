"""A PostgreSQL server of its own for one test: on loopback, in a temporary folder, as nobody."""

from collections.abc import Generator, Sequence
import contextlib
import os
from pathlib import Path
import pwd
import re
import shutil
import socket
import subprocess
import tempfile

import pytest

SECONDS = 120  # for what a quiet machine does in a few


class Server:
    """A server that can be stopped and started again.

    Args:
        binaries: the folder of `initdb` and `pg_ctl`.
        libraries: where their shared libraries are, beside the system's.
        folder: empty; everything is kept there.
    """

    def __init__(self, binaries: Path, libraries: Sequence[Path], folder: Path):
        self._binaries, self._folder = binaries, folder
        self._data, self._log = folder / "data", folder / "log.txt"
        # initdb and the server refuse to be root's.
        self._user = {"user": "nobody", "group": pwd.getpwnam("nobody").pw_gid, "extra_groups": ()}
        if os.geteuid() != 0:
            self._user = {}
        else:
            shutil.chown(folder, "nobody")
        self._environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "HOME": str(folder)}
        if libraries:
            self._environment["LD_LIBRARY_PATH"] = ":".join(map(str, libraries))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        password = folder / "password"
        password.write_text("hush\n")
        password.chmod(0o644)
        self._run("initdb", "-D", self._data, "-U", "sweeper", "-A", "scram-sha-256", "-N",
                  f"--pwfile={password}")  # fmt: skip
        self.start()

    @property
    def storage(self) -> str:
        """For `--storage`: a file with the address, which has a password."""
        path = self._folder / "address.txt"
        path.touch(mode=0o600)
        path.write_text(f"postgresql+psycopg://sweeper:hush@127.0.0.1:{self.port}/postgres\n")
        return f"file:{path}"

    def start(self) -> None:
        options = f"-p {self.port} -h 127.0.0.1 -k {self._folder} -c fsync=off"
        self._run("pg_ctl", "-D", self._data, "-l", self._log, "-o", options, "-w", "-t", SECONDS,
                  "start")  # fmt: skip

    def stop(self) -> None:
        """At once: connections are cut."""
        self._run("pg_ctl", "-D", self._data, "-m", "immediate", "-w", "stop")

    def end(self) -> None:
        """As `stop`, of a server that a test may have stopped."""
        if (self._data / "postmaster.pid").exists():
            self.stop()

    def _run(self, program: str, *arguments: object) -> None:
        # Into a file: the server keeps what pg_ctl was given, and a pipe would never end.
        with (self._folder / f"{program}.txt").open("wb") as output:
            done = subprocess.run(
                [self._binaries / program, *map(str, arguments)],
                env=self._environment,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=SECONDS,
                umask=0o077,
                **self._user,
            )
        told = (self._folder / f"{program}.txt").read_text(errors="replace")
        assert done.returncode == 0, f"{program}: {told}"


@contextlib.contextmanager
def postgres() -> Generator[Server]:
    """A server until the end of the block; the test is skipped where there is none to be had."""
    # Not below pytest's own folder, which nobody else may enter.
    with tempfile.TemporaryDirectory(prefix="postgres-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        binaries, libraries = _installed() or _from_debian(folder / "packages")
        home = folder / "server"
        home.mkdir()
        server = Server(binaries, libraries, home)
        try:
            yield server
        finally:
            server.end()


def _installed() -> tuple[Path, list[Path]] | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    if on_path is not None:
        found.append(Path(on_path).resolve())
    complete = [path.parent for path in found if (path.parent / "pg_ctl").exists()]
    return (complete[-1], []) if complete else None


def _from_debian(folder: Path) -> tuple[Path, list[Path]]:
    """Downloads and unpacks the server and its libraries; nothing is installed."""
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        pytest.skip("PostgreSQL is not installed and this is no Debian")
    folder.mkdir()
    if os.geteuid() == 0:
        shutil.chown(folder, "_apt")
    listed = _output("apt-cache", "search", "--names-only", r"^postgresql-[0-9]+$")
    versions = sorted(int(n) for n in re.findall(r"^postgresql-(\d+) ", listed, re.MULTILINE))
    if not versions:
        pytest.skip("PostgreSQL is not installed and apt-cache lists no postgresql-NN")
    server = f"postgresql-{versions[-1]}"
    tree = _output("apt-cache", "depends", "--recurse", "--no-recommends", "--no-suggests",
                   "--no-conflicts", "--no-breaks", "--no-replaces", "--no-enhances", server)  # fmt: skip
    names = [n for n in set(re.findall(r"^(\S+)$", tree, re.MULTILINE)) if n.startswith("lib")]
    wanted = [server, f"postgresql-client-{versions[-1]}", *sorted(names)]
    done = subprocess.run(
        ["apt-get", "download", *(n for n in wanted if not n.startswith(("libc6", "libperl")))],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"Debian packages cannot be had: {done.stderr.strip()[-200:]}")
    root = folder / "root"
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, root], check=True)
    folder.chmod(0o755)
    libraries = [*root.glob("usr/lib/*-linux-*"), *root.glob("lib/*-linux-*")]
    return root / f"usr/lib/postgresql/{versions[-1]}/bin", libraries


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
