"""What happened to a run, one JSON line an event: `history.jsonl` in its workdir.

Starts, with what they ran on and what differs from the start before, and rewinds. A line that stands
is never changed; a line cut by a death in the middle of writing it is left out when read.
"""

from collections.abc import Iterator, Mapping
import datetime
import json
import os
from pathlib import Path
import re
from typing import Any, TypeGuard

import jax

from moe.errors import CheckpointError
from moe.training import rewind
from moe.training.workdir import CONFIG_FILE, git_commit, package_versions, read_config

HISTORY_FILE = "history.jsonl"
_ROWS = 2**62  # more than any data has
_STRINGS = re.compile(rb'"(\\.|[^"\\])*("|\\?$)')


def append(workdir: str | Path, event: str, **fields: Any) -> None:
    """Adds one event; when it returns, the line is on the disk.

    Args:
        workdir: of the run. Only process 0 calls this.
        event: its kind.
        fields: JSON.

    Raises:
        OSError: the disk is full or read-only; the lines before are as they were.
    """
    line = json.dumps({"event": event, **fields}) + "\n"
    path = Path(workdir) / HISTORY_FILE
    with path.open("a+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            _write_whole(file, _start_of_line(file, end) + line.encode())
            os.fsync(file.fileno())
            if end == 0:
                _keep_name(path.parent)
        except OSError:
            file.truncate(end)  # no half line in front of the next
            raise


def _keep_name(directory: Path) -> None:
    """A new file's name is on the disk when its directory is."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _start_of_line(file: Any, end: int) -> bytes:
    """What ends a line that was cut, so that the next one stands alone."""
    if end == 0:
        return b""
    file.seek(end - 1)
    return b"" if file.read(1) == b"\n" else b"\n"


def _write_whole(file: Any, data: bytes) -> None:
    while data:
        data = data[file.write(data) :]


def read(workdir: str | Path) -> list[dict[str, Any]]:
    """All events, oldest first; none where there is no file.

    Raises:
        CheckpointError: a line that is no event, or a rewind without its numbers, other than one that
            was cut.
    """
    path = Path(workdir) / HISTORY_FILE
    if not path.exists():
        return []
    events = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            if _cut(line):
                continue
            found = None
        if not _is_event(found):
            raise CheckpointError(
                f"{path}, line {number} is no event: the file was changed by hand or is damaged. It "
                "decides where a run that was rewound goes on. Mend or remove that line."
            )
        events.append(found)
    return events


def _is_event(found: Any) -> TypeGuard[dict[str, Any]]:
    if not isinstance(found, dict) or not isinstance(found.get("event"), str):
        return False
    if found["event"] != rewind.EVENT:
        return True
    numbers = [found.get(key) for key in ("step", "next_row", "resume_row")]
    return all(type(number) is int and 0 <= number < _ROWS for number in numbers)


def _cut(line: bytes) -> bool:
    """Whether a line is nothing, or the beginning of an event without its end."""
    if not line.strip(b"\0"):
        return True
    bare = _STRINGS.sub(b"", line)
    return b'{"event": '.startswith(line[:10]) and bare.count(b"{") > bare.count(b"}")


def started(
    workdir: str | Path,
    *,
    step: int,
    config: Mapping[str, Any],
    data_changes: Mapping[str, list[Any]],
) -> dict[str, Any]:
    """The event of a start: `append(workdir, **started(...))`, before `config.json` is replaced.

    Args:
        workdir: of the run.
        step: from which it goes on.
        config: of this start, JSON.
        data_changes: what `TrainBatches.set_state` returned: allowed differences, `{key: [then, now]}`.

    Returns:
        The event with versions, commit, devices, and `changes`: of the data under `data`, and of the
        config under `config`, `{dotted key: [then, now]}`, None where a key was not there. `utc` is
        for people; nothing depends on it.

    Raises:
        ConfigError: `config.json` is there and cannot be read.
    """
    changed = {}
    if (Path(workdir) / CONFIG_FILE).exists():
        then = dict(_flat(read_config(workdir)["config"]))
        now = dict(_flat(json.loads(json.dumps(config))))
        keys = [key for key in {**then, **now} if then.get(key) != now.get(key)]
        changed = {key: [then.get(key), now.get(key)] for key in keys}
    return {
        "event": "start",
        "step": step,
        "utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": package_versions(),
        "commit": git_commit(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "changes": {"data": dict(data_changes), "config": changed},
    }


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
