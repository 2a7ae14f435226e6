"""The directories of checkpoints as files: which there are, whether one is whole, how one goes away.

Nothing here reads an array or follows a link. A step goes away in one rename, so that a process
killed in between leaves it or does not.
"""

import json
import os
from pathlib import Path
import re
import shutil
import stat
from typing import Any

from moe.training import manifest
from moe.training.record import is_ours

RECORD_FILE = "_CHECKPOINT_METADATA"  # of Orbax; its `custom_metadata` is the record
_MARKER = "commit_success.txt"  # of Orbax, of the step and of each item
_STEP = re.compile(r"0|[1-9][0-9]*")
_LEFTOVER = re.compile(r"[0-9]+\.(orbax-checkpoint-tmp.*|removed)")


def steps_in(directory: Path) -> list[int]:
    """Numbers of all entries whose name is that of a step, ascending, whatever they are."""
    return sorted(int(entry.name) for entry in directory.iterdir() if _STEP.fullmatch(entry.name))


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a step if its checksum holds, of whatever format; None otherwise."""
    path = folder / RECORD_FILE
    if folder.is_symlink() or path.is_symlink():
        return None
    try:
        record = json.loads(path.read_bytes())["custom_metadata"]
        return record if is_ours(record) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def flaw(folder: Path, *, thorough: bool = False) -> str | None:
    """What of a step is not as it was written, as far as its files tell; None if all is.

    Args:
        folder: `<directory>/<step>`.
        thorough: Whether to read the bytes of the files that the manifest lists, too.
    """
    if folder.is_symlink():
        return "it is a link"
    if not folder.is_dir():
        return "it is not a directory"
    if not any(folder.iterdir()):
        return "it is empty"
    if read_record(folder) is None:
        return f"it has no intact record of its leaves in {RECORD_FILE}"
    for item in (".", "state", "data", "meta"):
        if not (folder / item / _MARKER).is_file():
            return f"{Path(item) / _MARKER} is missing, with which a finished save is marked"
    return manifest.difference(folder, thorough=thorough)


def move_away(folder: Path, root: Path, reason: str | None = None) -> Path:
    """Moves a step to `<root>/<step>-<n>`, the first n that is free, and writes `reason.txt` there.

    Raises:
        OSError: If it cannot be moved; it is then where it was.
    """
    if root.is_symlink():
        raise OSError(f"{root} is a link, and nothing is moved through a link")
    root.mkdir(exist_ok=True)
    n = 1
    while os.path.lexists(target := root / f"{folder.name}-{n}"):
        n += 1
    if folder.is_symlink() or not folder.is_dir():
        target.mkdir()
        folder.rename(target / folder.name)
    else:
        folder.rename(target)
    if reason is not None:
        (target / "reason.txt").write_text(reason + "\n", encoding="utf-8")
    return target


def remove(folder: Path) -> None:
    """Deletes a step. Raises OSError if that cannot be done."""
    doomed = folder.with_name(f"{folder.name}.removed")
    if doomed.exists():
        shutil.rmtree(doomed)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def clean(directory: Path) -> None:
    """Deletes what killed saves and removals have left half done; links are left alone."""
    for entry in directory.iterdir():
        if _LEFTOVER.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)


def size(folder: Path) -> int:
    """Bytes of all regular files below `folder`."""
    return sum(s.st_size for _, s in manifest.walk(folder) if stat.S_ISREG(s.st_mode))
