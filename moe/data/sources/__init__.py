"""Where text comes from. One file a source, one row of `SOURCES` each."""

from collections.abc import Callable

from moe.config import nearest
from moe.data.sources.files import files_source
from moe.data.sources.prepared import prepared_source
from moe.data.sources.stdlib import stdlib_source
from moe.data.sources.types import Request, Source
from moe.errors import ConfigError

SOURCES: dict[str, Callable[[Request], Source]] = {
    "files": files_source,  # data.files: globs of .txt and .jsonl
    "stdlib": stdlib_source,  # the interpreter's standard library
    "tfds": prepared_source,  # data.name=tfds:NAME or tfds:DIRECTORY, already prepared
}


def open_source(name: str, request: Request) -> Source:
    """Opens the source that `data.name` names.

    Raises:
        ConfigError: no such source, or keys that belong to another.
        DataError: the source cannot give its text.
    """
    if name not in SOURCES:
        raise ConfigError(f"data.name={name!r} is no text source; {nearest(name, SOURCES)}.")
    if name == "tfds" and not request.dataset:
        raise ConfigError("data.name=tfds needs a data set: data.name=tfds:lm1b, for example.")
    if name != "tfds" and request.dataset:
        raise ConfigError(f"data.name={name}:{request.dataset}: only tfds takes a name after ':'.")
    if request.files is not None and name != "files":
        raise ConfigError(
            f"data.files is set, but data.name={name!r} does not read it: files does."
        )
    return SOURCES[name](request)
