"""Keeps what XLA has compiled, so that a run that starts again does not compile again.

An entry is found by the program with its shardings, the XLA flags and the versions of jaxlib and of
the platform; what it computes is bitwise what a fresh compilation computes. Whoever can write to the
folder can make the runs that read it execute anything: share it only with people you trust.
"""

from collections.abc import Generator
import contextlib
import hashlib
import math
import os
from pathlib import Path
import platform
import sys
import tempfile
from typing import Any, TextIO
import warnings
import zlib

from absl import flags
import jax
from jax.experimental.compilation_cache import compilation_cache

FOLDER = "compile_cache"
OFF = "none"
MIN_SECONDS = 0.1  # a program that compiles faster is not worth a file
_DIRECTORY = "jax_compilation_cache_dir"
_THRESHOLD = "jax_persistent_cache_min_compile_time_secs"
_NOT_KEPT = "Error writing persistent compilation cache entry"  # what jax warns with
_ZLIB = 0x78  # first byte of a zlib stream


def define_flag(values: flags.FlagValues) -> None:
    """`--compile_cache` of an entry point."""
    flags.DEFINE_string(
        "compile_cache",
        None,
        f"Folder of compiled programs, which runs may share; {OFF!r} keeps none. Without it "
        f"JAX_COMPILATION_CACHE_DIR, or {FOLDER} in the workdir.",
        flag_values=values,
    )


@contextlib.contextmanager
def persistent(
    workdir: Path, choice: str | None = None, *, primary: bool = True
) -> Generator[None, None, None]:
    """Compiled programs go to a folder, and come from it, for the length of a `with` block.

    A folder that cannot be used never stops a run: a line on standard error tells of it. Call this
    when the processes have found each other.

    Args:
        workdir: of the run; `compile_cache` in it is the default.
        choice: a folder, an address that jax can write to (`gs://...`), or `none`. None takes what
            jax has been told already, by its environment variable or the caller, else the default.
        primary: whether this process makes the folder and writes to it; of several only process 0 does.
    """
    settings, note = _settings(workdir, choice, primary=primary)
    before = {name: jax.config.values[name] for name in settings}
    if note is not None:
        print(f"note: {note}", file=sys.stderr)  # noqa: T201
    absent = _absent(settings[_DIRECTORY])
    _update(settings)
    try:
        with _said_once(settings[_DIRECTORY]):
            yield
    finally:
        _update(before)
        for path in absent:  # jax makes them before it has anything for them
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def _said_once(folder: str | None) -> Generator[None, None, None]:
    """A disk that fills up: jax warns of every program that it cannot keep, and leaves parts of them."""
    show, said = warnings.showwarning, []

    def once(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not str(message).startswith(_NOT_KEPT):
            show(message, category, filename, lineno, file, line)
        elif not said:
            said.append(str(message))
            with contextlib.suppress(OSError):  # standard error may lie on the same disk
                print(  # noqa: T201
                    f"note: the compile cache {folder} cannot be written ({message}). The run goes on, and "
                    "compiles again what is not kept. This is said once.",
                    file=sys.stderr,
                )

    warnings.showwarning = once  # ty: ignore[invalid-assignment]
    try:
        yield
    finally:
        warnings.showwarning = show
        if said and folder is not None and "://" not in folder:
            _drop_torn(Path(folder))


def _settings(
    workdir: Path, choice: str | None, *, primary: bool
) -> tuple[dict[str, Any], str | None]:
    """Values of jax's own settings, and the note."""
    if choice == OFF:
        return {_DIRECTORY: None}, None
    told = jax.config.values[_DIRECTORY]
    if choice is None and told:
        folder, settings = told, {}
    else:
        folder = f"{choice or workdir / FOLDER}/{machine()}"
        settings = {_THRESHOLD: MIN_SECONDS}
    if "://" in folder:
        return {**settings, _DIRECTORY: folder}, None
    if not primary:  # it only reads, and must not make the folder of a run that is refused
        return {**settings, _DIRECTORY: folder if os.path.isdir(folder) else None}, None
    error = _write_error(Path(folder))
    if error is None:
        _drop_torn(Path(folder))
        return {**settings, _DIRECTORY: folder}, None
    note = f"the compile cache {folder} cannot be written ({error})"
    if os.access(folder, os.R_OK | os.X_OK) and os.path.isdir(folder):
        loads = f"{note}: programs are loaded from it, and new ones are not kept."
        return {_DIRECTORY: folder, _THRESHOLD: math.inf}, loads
    return {_DIRECTORY: None}, f"{note}: this run compiles everything anew, and keeps nothing."


def machine() -> str:
    """Folder name of what compiled programs run on.

    XLA:CPU compiles for the very processor, and its entries do not say for which: on another one
    they would end the process by an illegal instruction.
    """
    kind = jax.default_backend()
    if kind != "cpu":
        return kind  # jax's key holds the topology
    features = platform.processor()
    with contextlib.suppress(OSError):  # of Linux alone
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features += "\n".join(sorted({x for x in lines if x.startswith(("flags", "Features"))}))
    return f"cpu-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def _absent(folder: str | None) -> list[Path]:
    """The folder and those above it that are not there yet, innermost first."""
    if folder is None or "://" in folder:
        return []
    path = Path(folder).absolute()
    return [one for one in (path, *path.parents) if not one.exists()]


def _write_error(folder: Path) -> str | None:
    """Why nothing can be written there. Permission bits say nothing to root, or of a full disk.

    The folder itself is made by jax when it compiles: a run that is refused leaves nothing.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"probe")
    except OSError as error:
        return error.strerror
    return None


def _drop_torn(folder: Path) -> None:
    """Removes entries that were cut short: jax would warn of them at every start and never replace them."""
    for path in folder.glob("*-cache"):
        with contextlib.suppress(OSError):  # gone meanwhile, or of another user
            data = path.read_bytes()
            if not data or (data[0] == _ZLIB and not _is_whole(data)):
                path.unlink()


def _is_whole(data: bytes) -> bool:
    stream = zlib.decompressobj()
    try:
        stream.decompress(data)
    except zlib.error:
        return False
    return stream.eof


def _update(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # jax opens its folder once
