"""One writer a workdir, checked before anything is built."""

import errno
import json
import os
from pathlib import Path
import resource
import signal
import socket
import subprocess
import sys

import jax
import pytest

from moe.errors import ConfigError, ResourceError
from moe.training import workdir as workdir_module
from moe.training.workdir import open_workdir, read_config, write_atomically, write_config


def open_and_close(path: Path) -> None:
    with open_workdir(path):
        pass


def test_a_run_without_output_leaves_nothing_behind(tmp_path):
    with open_workdir(tmp_path / "run") as workdir:
        assert workdir == tmp_path / "run"
        (workdir / "checkpoints").mkdir()
    assert list(tmp_path.iterdir()) == []


def test_output_and_directories_that_were_there_stay(tmp_path):
    with open_workdir(tmp_path / "run") as workdir:
        (workdir / "metrics.jsonl").write_text("")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]
    (tmp_path / "mine").mkdir()
    open_and_close(tmp_path / "mine")
    assert (tmp_path / "mine").is_dir()


def test_a_missing_parent_and_a_file_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"its parent .*/runs is not there.*mkdir -p") as caught:
        open_and_close(tmp_path / "runs" / "one")
    assert caught.value.exit_code == 2
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"is a file. Name a directory"):
        open_and_close(tmp_path / "file")
    with pytest.raises(ConfigError, match="its parent"):
        open_and_close(tmp_path / "file" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def read_only_directory(tmp_path):
    """A disk mounted read-only for root, who passes permission bits; those bits for others."""
    directory = tmp_path / "disk"
    (directory / "run").mkdir(parents=True)
    if os.geteuid() != 0:
        (directory / "run").chmod(0o555)
        directory.chmod(0o555)
        yield directory
        directory.chmod(0o755)
        return
    bind = subprocess.run(
        ["mount", "--bind", str(directory), str(directory)], capture_output=True, text=True
    )
    if bind.returncode != 0:
        pytest.skip(f"root without the right to mount: {bind.stderr.strip()}")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(directory)], check=True)
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


@pytest.mark.parametrize("name", ["run", "new"])
def test_a_read_only_disk_is_refused(read_only_directory, name):
    with pytest.raises(ConfigError, match=rf"workdir=.*/disk/{name} cannot be written: "):
        open_and_close(read_only_directory / name)
    assert [path.name for path in read_only_directory.rglob("*")] == ["run"]


def test_a_parent_that_may_not_be_entered_is_refused(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o000)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)  # permission bits say nothing to root
    try:
        with pytest.raises(ConfigError, match=r"cannot be written: Permission denied"):
            open_and_close(tmp_path / "closed" / "run")
    finally:
        if root:
            os.seteuid(0)


def test_a_full_disk_is_refused_and_the_new_directory_is_gone(tmp_path, monkeypatch):
    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(workdir_module.os, "fsync", no_space)
    with pytest.raises(ResourceError, match="has no room: No space left on device"):
        open_and_close(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_contents_and_nothing_else(tmp_path):
    path = tmp_path / "record.json"
    write_atomically(path, "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*/record\.json'"):
            write_atomically(path, "new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
    with subprocess.Popen(["true"]) as child:
        pass
    (tmp_path / "eval").mkdir()
    gone = tmp_path / "eval" / f"valid-3.json.{child.pid}.tmp"
    written = tmp_path / "eval" / f"valid-3.json.{os.getpid()}.tmp"
    mine = tmp_path / "notes.tmp"
    for path in (gone, written, mine):
        path.touch()
    open_and_close(tmp_path)
    assert [path.exists() for path in (gone, written, mine)] == [False, True, True]


def test_a_file_system_without_locks_is_not_called_a_second_run(tmp_path, monkeypatch):
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(workdir_module.fcntl, "flock", no_locks)
    with pytest.raises(ConfigError, match="cannot be locked: No locks available"):
        open_and_close(tmp_path / "run")


HOLDER = """
import os, sys, time
from moe.training.workdir import open_workdir
with open_workdir(sys.argv[1]):
    if os.fork() == 0:
        time.sleep(3)  # a worker that outlives the run
        os._exit(0)
    print("holding", flush=True)
    time.sleep(60)
"""


def test_the_lock_names_its_holder_and_dies_with_it(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "run"], stdout=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "holding\n"
        for _ in range(2):  # who was refused leaves the lock as it is
            with pytest.raises(ConfigError, match=rf"in use by pid {child.pid} on \S+: ") as caught:
                open_and_close(tmp_path / "run")
            assert caught.value.exit_code == 2
        child.send_signal(signal.SIGKILL)
        child.wait()
        open_and_close(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_lock_file_that_was_removed_in_between_is_no_lock(tmp_path, monkeypatch):
    """Its holder removes it before it lets go: a lock on a file without a name excludes nobody."""
    path, flock, descriptors = tmp_path / ".lock", workdir_module.fcntl.flock, []

    def removed(descriptor: int, operation: int) -> None:
        flock(descriptor, operation)
        descriptors.append(descriptor)
        if len(descriptors) == 1:
            path.unlink()

    monkeypatch.setattr(workdir_module.fcntl, "flock", removed)
    with open_workdir(tmp_path):
        assert path.exists()
        assert len(set(descriptors)) == 1 < len(descriptors), "the first was closed"
    assert not path.exists()


def test_the_lock_file_is_removed_while_the_lock_holds(tmp_path, monkeypatch):
    """Else it may be that of the next run by then."""
    close, there = workdir_module.os.close, []
    with open_workdir(tmp_path):
        lock = tmp_path / ".lock"
        monkeypatch.setattr(
            workdir_module.os, "close", lambda fd: there.append(lock.exists()) or close(fd)
        )
    monkeypatch.undo()
    assert there == [False]


def test_the_name_of_an_earlier_holder_is_gone(tmp_path):
    (tmp_path / ".lock").write_text("pid 123456789 on a-machine-with-a-rather-long-name.example\n")
    with open_workdir(tmp_path):
        told = f"pid {os.getpid()} on {socket.gethostname()}\n"
        assert (tmp_path / ".lock").read_text() == told


def test_other_processes_of_a_run_neither_check_nor_lock(tmp_path):
    with open_workdir(tmp_path / "run"), open_workdir(tmp_path / "run", primary=False) as again:
        assert again == tmp_path / "run"
    with open_workdir(tmp_path / "new", primary=False):
        assert list(tmp_path.iterdir()) == []


def test_config_holds_versions_and_device_and_nothing_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "canary-123")
    write_config(tmp_path, {"seed": 1, "router": {"k": 2}})
    record = read_config(tmp_path)
    assert record["config"] == {"seed": 1, "router": {"k": 2}}
    assert record["versions"]["jax"] == jax.__version__
    assert record["devices"] == jax.device_count()
    assert record["device"] == "cpu"
    assert len(record["commit"].removesuffix("-dirty")) == 40 or record["commit"] == "unknown"
    assert "canary-123" not in (tmp_path / "config.json").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("contents", [None, "{", json.dumps({"other": 1}), "[]"])
def test_a_workdir_without_a_config_is_refused(tmp_path, contents):
    if contents is not None:
        (tmp_path / "config.json").write_text(contents)
    with pytest.raises(ConfigError, match=r"config.json"):
        read_config(tmp_path)
