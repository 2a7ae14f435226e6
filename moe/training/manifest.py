"""The manifest of a finished checkpoint: size and checksum of each of its files.

It lets a step be verified without the model that wrote it, and shows a file that was cut short
before anything is loaded. A step is whole without one: the process may have been killed between
the save and the hashing, and the digests of the leaves decide what is loaded.

The checksum guards against accidents and not against forgers, who could write the manifest as
well: XXH3 reads as fast as the memory gives, and SHA-256 takes a third as long as the save.
"""

from collections.abc import Callable, Iterator
import hashlib
import json
import os
from pathlib import Path
import stat
from typing import Any

import xxhash

from moe.errors import CheckpointError
from moe.training.record import is_signed, sign
from moe.training.workdir import write_atomically

MANIFEST_FILE = "manifest.json"
_NOT_LISTED = {MANIFEST_FILE, MANIFEST_FILE + ".tmp"}
_FORMAT = 2
_CHECKSUMS: dict[int, tuple[str, Callable[[], Any]]] = {
    1: ("sha256", hashlib.sha256),
    2: ("xxh3_128", xxhash.xxh3_128),
}


def write(folder: Path) -> None:
    """Hashes the files of a finished step and writes `manifest.json` beside them.

    Raises:
        OSError: If a file cannot be read or the manifest cannot be written.
    """
    files = {
        name: {"bytes": status.st_size, _CHECKSUMS[_FORMAT][0]: _checksum(folder / name, _FORMAT)}
        for name, status in walk(folder)
        if name not in _NOT_LISTED
    }
    content = sign({"format": _FORMAT, "files": files})
    write_atomically(folder / MANIFEST_FILE, json.dumps(content, indent=1) + "\n")


def read(folder: Path) -> tuple[int, dict[str, dict]] | None:
    """Format, and size and checksum of each file by name; None if there is no manifest.

    Raises:
        ValueError: If there is one and it is damaged.
        CheckpointError: If it is of a format that is not read here.
    """
    try:
        content = json.loads((folder / MANIFEST_FILE).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{MANIFEST_FILE} is damaged: {error}") from error
    if not is_signed(content):
        raise ValueError(f"{MANIFEST_FILE} is damaged: its checksum is wrong")
    format_, listed = content.get("format"), content.get("files")
    if type(format_) is not int:
        raise ValueError(f"{MANIFEST_FILE} is damaged: its format is {format_!r}")
    if format_ not in _CHECKSUMS:
        raise CheckpointError(
            f"{folder / MANIFEST_FILE} has format {format_}, and this program reads "
            f"{list(_CHECKSUMS)}. Use the version that wrote it, or a newer one."
        )
    if not _are_files(listed, _CHECKSUMS[format_][0]):
        raise ValueError(f"{MANIFEST_FILE} is damaged: it lists no files with size and checksum")
    return format_, listed


def _are_files(value: Any, checksum: str) -> bool:
    return isinstance(value, dict) and all(
        isinstance(entry, dict) and {"bytes", checksum} <= set(entry) for entry in value.values()
    )


def difference(folder: Path, *, thorough: bool) -> str | None:
    """The first listed file that is missing or not as listed, in words; None if all are.

    Args:
        folder: Of a finished step.
        thorough: Whether bytes are compared, beside sizes.

    Raises:
        CheckpointError: If the manifest is of a format that is not read here.
    """
    try:
        format_, listed = read(folder) or (_FORMAT, {})
        there = dict(walk(folder))
        for name, entry in listed.items():
            if name not in there or not stat.S_ISREG(there[name].st_mode):
                return f"the file {name} is missing"
            if there[name].st_size != entry["bytes"]:
                return f"{name} has {there[name].st_size} bytes, not {entry['bytes']}"
            if thorough and _checksum(folder / name, format_) != entry[_CHECKSUMS[format_][0]]:
                return f"the bytes of {name} are not those that were written"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def extra(folder: Path) -> list[str]:
    """Files that the manifest does not list. Raises as `read`."""
    found = read(folder)
    if found is None:
        return []
    _, listed = found
    return [name for name, _ in walk(folder) if name not in listed and name not in _NOT_LISTED]


def walk(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Relative name and status of every entry below that is no directory; links are not followed."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            for name, status in walk(Path(entry.path)):
                yield f"{entry.name}/{name}", status
        else:
            yield entry.name, entry.stat(follow_symlinks=False)


def _checksum(path: Path, format_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, _CHECKSUMS[format_][1]).hexdigest()
