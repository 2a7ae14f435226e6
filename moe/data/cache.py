"""What is made once of a data set and kept below the data directory."""

from collections.abc import Generator
import contextlib
import hashlib
import json
from pathlib import Path
import shutil
import tempfile

from moe.errors import DataError

_VERSION = 1  # of the layout of the files


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
