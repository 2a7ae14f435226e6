"""Where text comes from. One file a source, one row of `SOURCES` or of the catalogue each."""

from collections.abc import Callable

from moe.config import nearest
from moe.data.sources.catalogue import CATALOGUE
from moe.data.sources.files import files_source
from moe.data.sources.mix import mix_source, part_names
from moe.data.sources.prepared import find_prepared, prepared_source, read_text
from moe.data.sources.stdlib import stdlib_source
from moe.data.sources.types import Request, Source
from moe.errors import ConfigError

SOURCES: dict[str, Callable[[Request], Source]] = {
    "files": files_source,  # data.files: globs of .txt and .jsonl
    "stdlib": stdlib_source,  # the interpreter's standard library
    "tfds": prepared_source,  # data.name=tfds:NAME or tfds:DIRECTORY, already prepared
    "mix": lambda request: mix_source(request, open_source),  # data.name=mix:novels,stdlib
}
_TAKE_NAMES = {  # sources that want a name after ':', with an example
    "tfds": "a data set: data.name=tfds:lm1b",
    "mix": "the sources to join: data.name=mix:novels,stdlib",
}


def open_source(name: str, request: Request) -> Source:
    """Opens the text source that `data.name` names: a row of `SOURCES`, or a data set of the catalogue.

    Raises:
        ConfigError: no such source, or keys that belong to another.
        DataError: the source cannot give its text, or is not prepared.
    """
    _check(name, request)
    return SOURCES[name](request) if name in SOURCES else _catalogue_source(name, request)


def _check(name: str, request: Request) -> None:
    texts = [row for row, entry in CATALOGUE.items() if entry.kind == "language"]
    if name not in SOURCES and name not in CATALOGUE:
        raise ConfigError(
            f"data.name={name!r} is no text source; {nearest(name, [*SOURCES, *texts])}."
        )
    if name in _TAKE_NAMES and not request.dataset:
        raise ConfigError(f"data.name={name} needs {_TAKE_NAMES[name]}, for example.")
    if name not in _TAKE_NAMES and request.dataset:
        takers = " and ".join(_TAKE_NAMES)
        raise ConfigError(
            f"data.name={name}:{request.dataset}: only {takers} take a name after ':'."
        )
    if request.files is not None and not _reads_files(name, request.dataset):
        raise ConfigError(
            f"data.files is set, but data.name={name!r} does not read it: files does."
        )


def _reads_files(name: str, dataset: str) -> bool:
    return name == "files" or (name == "mix" and "files" in dict(part_names(dataset)))


def _catalogue_source(name: str, request: Request) -> Source:
    path = find_prepared(name, request.directory)
    # Of pairs and labelled texts data.text_feature chooses what is read, source or target say.
    feature = "text" if CATALOGUE[name].kind == "language" else request.text_feature
    return read_text(name, path, feature)
