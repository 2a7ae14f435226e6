"""The directory of one run: one writer at a time, checked before anything is built.

Files in it: `config.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/<step>/`, `eval/`,
`tokenizer.json`, `report.html`.
"""

from collections.abc import Generator
import contextlib
import errno
import fcntl
import importlib.metadata
import json
import os
from pathlib import Path
import platform
import re
import socket
import subprocess
from typing import Any

import jax

from moe.errors import ConfigError, ResourceError, UserError

CONFIG_FILE = "config.json"
_LOCK_FILE = ".lock"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DRAFT = re.compile(r".+\.(\d+)\.tmp")  # of `write_atomically`, by the process that writes it
_PACKAGES = (
    "moe",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "ml-collections",
    "tensorflow-datasets",
    "tokenizers",
)


@contextlib.contextmanager
def open_workdir(path: str | Path, *, primary: bool = True) -> Generator[Path, None, None]:
    """Holds the only right to write in a workdir for the length of a `with` block.

    The right is a lock (`flock`) that the kernel takes back when its holder dies, however it dies. A
    directory that this call made and that holds no file at the end is removed again.

    Two hosts with one disk: NFS of Linux tells its server of the lock, so that other hosts see it and a
    host that vanished loses it when the server's lease ends (about 90 s); mounted with `nolock` or
    `local_lock=flock`, or on Lustre without `-o flock`, a lock holds on its own host alone and nothing
    here can tell. There only the user keeps two hosts apart.

    Args:
        path: The workdir; its parent exists.
        primary: Whether this process checks and locks; in a run of several only process 0 does.

    Yields:
        The absolute path.

    Raises:
        ConfigError: If the parent is missing, the path is no directory, nothing can be written
            there, or another run holds it.
        ResourceError: If its disk is full.
    """
    workdir = Path(path).expanduser().absolute()
    if not primary:
        yield workdir
        return
    _check_path(workdir)
    created = _make(workdir)
    descriptor = None
    try:
        _check_writable(workdir)
        descriptor = _lock(workdir)
        _remove_torn(workdir)
        yield workdir
    finally:
        if descriptor is not None:
            (workdir / _LOCK_FILE).unlink(missing_ok=True)
            os.close(descriptor)
        if created:
            _remove_without_files(workdir)


def write_config(workdir: str | Path, config: dict[str, Any]) -> None:
    """Writes `config.json`: the resolved config and what it ran on. Nothing of the environment.

    Args:
        workdir: As `open_workdir` yields it. Only process 0 calls this.
        config: JSON.
    """
    record = {
        "config": config,
        "versions": package_versions(),
        "commit": git_commit(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
    }
    write_atomically(Path(workdir) / CONFIG_FILE, json.dumps(record, indent=2) + "\n")


def read_config(workdir: str | Path) -> dict[str, Any]:
    """The contents of a workdir's `config.json`.

    Raises:
        ConfigError: If there is none or it is not what `write_config` writes.
    """
    path = Path(workdir) / CONFIG_FILE
    try:
        text = path.read_text(encoding="utf-8")
        record = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}). A workdir has the config of its run in "
            f"{CONFIG_FILE}; give the --workdir of a run that has started."
        ) from error
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise ConfigError(f"{path} has no `config`: it was not written by a training run.")
    return record


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys differ: of two equal ones readers would disagree on which counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in found if names.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return found


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("NaN is no value of a config")
    return float(name)


def write_atomically(path: Path, contents: str | bytes) -> None:
    """Replaces a file as a whole: readers see the old contents or the new, and nothing else is left.

    Raises:
        OSError: it could not be written, with `path` as `filename`; the old contents stand.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    data = contents.encode() if isinstance(contents, str) else contents
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        error.filename = str(path)  # a write that fails has no name of its own
        raise


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run computes."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "unknown"
    return versions


def git_commit() -> str:
    """The commit of this source, with `-dirty` if files differ from it; "unknown" without git."""
    here = Path(__file__).resolve()
    git = ["git", "-C", str(here.parent)]
    tracked = [*git, "ls-files", "--error-unmatch", here.name]
    describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        for command in (tracked, describe):
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def _check_path(workdir: Path) -> None:
    try:
        is_file = workdir.exists() and not workdir.is_dir()
        has_parent = workdir.parent.is_dir()
    except OSError as error:
        raise _not_writable(workdir, error) from error
    if is_file:
        raise ConfigError(f"--workdir={workdir} is a file. Name a directory.")
    if not has_parent:
        raise ConfigError(
            f"--workdir={workdir}: its parent {workdir.parent} is not there. Only the last part "
            f"of the path is made for you; run `mkdir -p {workdir.parent}` or correct the path."
        )


def _make(workdir: Path) -> bool:
    try:
        workdir.mkdir()
    except FileExistsError:
        return False
    except OSError as error:
        raise _not_writable(workdir, error) from error
    return True


def _check_writable(workdir: Path) -> None:
    """Makes, fills and removes a file: permission bits say nothing to root or on other disks."""
    probe = workdir / f".probe-{os.getpid()}"
    try:
        with probe.open("xb") as file:
            file.write(b"probe")
            file.flush()
            os.fsync(file.fileno())
        probe.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
        raise _not_writable(workdir, error) from error


def _not_writable(workdir: Path, error: OSError) -> UserError:
    if error.errno in _FULL:
        return ResourceError(
            f"--workdir={workdir} has no room: {error.strerror}. A run writes checkpoints and records "
            "there; free space, or choose a directory on another disk."
        )
    return ConfigError(
        f"--workdir={workdir} cannot be written: {error.strerror}. A run needs to create files "
        "there; choose a directory on a disk that is writable and has room."
    )


def _lock(workdir: Path) -> int:
    """Takes the lock and writes who holds it; returns the open file descriptor."""
    path = workdir / _LOCK_FILE
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise _not_writable(workdir, error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(descriptor, 4096, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise _not_locked(workdir, error, holder) from error
        if _is_file(descriptor, path):
            break
        os.close(descriptor)  # a run that has just ended removed the file between our two calls
    os.ftruncate(descriptor, 0)
    with contextlib.suppress(OSError):  # the lock holds, with its holder's name or without
        os.write(descriptor, f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
    # A forked worker that outlives a killed run must not keep the lock.
    os.register_at_fork(after_in_child=lambda: _close_if_file(descriptor, path))
    return descriptor


def _not_locked(workdir: Path, error: OSError, holder: str) -> ConfigError:
    if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
        return ConfigError(
            f"--workdir={workdir} is in use by {holder or 'another run'}: {error.strerror}. "
            "Two runs would overwrite each other; wait for it, stop it, or choose another "
            "workdir."
        )
    return ConfigError(
        f"--workdir={workdir} cannot be locked: {error.strerror}. The lock keeps a second run from "
        "writing there; choose a directory on a file system that has locks."
    )


def _remove_torn(workdir: Path) -> None:
    """Removes what a process that was killed had not finished writing."""
    for folder in (workdir, workdir / "eval", workdir / "choices"):
        for path in folder.glob("*.tmp"):
            found = _DRAFT.fullmatch(path.name)
            if found is not None and not _is_alive(int(found[1])):
                path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    """Whether this host has such a process, of whomever."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _close_if_file(descriptor: int, path: Path) -> None:
    if _is_file(descriptor, path):
        os.close(descriptor)


def _remove_without_files(workdir: Path) -> None:
    """Removes a tree of empty directories; leaves a tree with any file in it as it is."""
    if any(entry.is_symlink() or not entry.is_dir() for entry in workdir.rglob("*")):
        return
    for directory, _, _ in os.walk(workdir, topdown=False):
        os.rmdir(directory)
