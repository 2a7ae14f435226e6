"""What is made once of a data set and kept below the data directory, with checksums of its files.

Every file is checked in blocks each time its directory is opened: 2 to 3 GiB a second and core where
memory holds it, as much as the disk gives where not. Above `_WHOLE` bytes a directory's small files and
those that are read at once (`.npy`) are checked whole, and of each other one a sample, another one at
every start; its blocks are checked when they are first read (`moe.data.checked`).
"""

from collections.abc import Generator, Sequence
import contextlib
import hashlib
import json
from pathlib import Path
import random
import shutil
import tempfile
import zlib

from moe.errors import DataError

_VERSION = 2  # of the layout of the files
_SUMS = "sums.json"
BLOCK = 4 << 20  # bytes
_WHOLE = 4 << 30  # bytes
_SMALL = 64 << 20  # bytes


def cache_key(*parts: object) -> str:
    """A name for what is made of these parts, which JSON can hold."""
    return hashlib.sha256(json.dumps([_VERSION, *parts]).encode()).hexdigest()[:32]


@contextlib.contextmanager
def directory_in_one_go(path: Path) -> Generator[Path]:
    """Gives a temporary directory that becomes `path` at the end, or nothing if the body fails."""
    new = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=path.parent))
    except OSError as error:
        raise DataError(
            f"Cannot write to {path.parent}: {error.strerror or error}. Set data.directory to a "
            "directory that can be written."
        ) from error
    try:
        yield temporary
        write_sums(temporary)
        temporary.chmod(0o755)  # mkdtemp's is for its owner alone; the cache may be shared
        _rename_unless_there(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in new:
            with contextlib.suppress(OSError):  # not empty: something was written
                parent.rmdir()


def _rename_unless_there(temporary: Path, path: Path) -> None:
    """Renames a directory; another process that was faster has written the same, and wins."""
    try:
        temporary.rename(path)
    except OSError:
        if not path.is_dir():
            raise


def check_directory(path: Path) -> dict[str, list[int]]:
    """Compares the files of a directory of `directory_in_one_go` with what was written.

    Returns:
        The checksums of the blocks of each file, by its name.

    Raises:
        DataError: a file that is missing, cut or changed; names it and where.
    """
    try:
        files = json.loads((path / _SUMS).read_text(encoding="utf-8"))
        whole = _total(files) <= _WHOLE
        draw = random.Random()
        for name, sums in files.items():
            blocks = range(len(sums))
            if not whole and len(sums) * BLOCK > _SMALL and not name.endswith(".npy"):
                blocks = draw.sample(blocks, max(1, len(sums) * _WHOLE // _total(files)))
            _check_file(path / name, sums, blocks)
        return files
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise damaged(path, str(error)) from error


def damaged(path: Path, what: str) -> DataError:
    """The error of a directory whose files are not what was written."""
    return DataError(
        f"What was made of the data in {path} is damaged: {what}. Delete that directory to remake it."
    )


def _total(files: dict[str, list[int]]) -> int:
    """Bytes of all blocks."""
    return sum(len(sums) for sums in files.values()) * BLOCK


def write_sums(path: Path) -> None:
    """Writes the checksums of all files of a directory as they are now."""
    files = {}
    for file in sorted(set(path.iterdir()) - {path / _SUMS}):
        with file.open("rb") as data:
            blocks = iter(lambda data=data: data.read(BLOCK), b"")
            files[file.name] = [zlib.crc32(block) for block in blocks]
    (path / _SUMS).write_text(json.dumps(files), encoding="utf-8")


def _check_file(path: Path, sums: list[int], blocks: Sequence[int]) -> None:
    size = path.stat().st_size
    if -(-size // BLOCK) != len(sums):
        raise ValueError(f"{path.name} has {size} bytes, and had {len(sums)} blocks of {BLOCK}")
    with path.open("rb") as data:
        for block in blocks:
            data.seek(block * BLOCK)
            check_block(path.name, block * BLOCK, data.read(BLOCK), sums[block])


def check_block(name: str, first: int, read: bytes, wanted: int) -> None:
    """Raises ValueError unless the bytes of a file from `first` on have this checksum."""
    if zlib.crc32(read) != wanted:
        raise ValueError(f"{name}, bytes {first} to {first + len(read)}, are not what was written")
