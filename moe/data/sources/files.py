"""The user's own text: globs of `.txt` (a file is a document) and `.jsonl` (a line is a document).

Held out by whole document. Text files are ranked by the hash of their path: the first 5% are test,
the next 5% valid, at least one each. Where a domain has fewer than three text files, each is cut
at line ends instead, its last tenth held out. Lines of `.jsonl` go by the hash of their text, so
that repeated texts stay on one side.
"""

from collections.abc import Iterator, Mapping
import glob
import json
import math
import os
from pathlib import Path
from typing import NamedTuple
import zlib

from moe.data.sources.types import DEFAULT_DOMAIN, Document, Request, Source, split_of
from moe.errors import ConfigError, DataError

_HELD_OUT = 0.05  # of the text, for valid and for test each


class _File(NamedTuple):
    path: Path
    domain: str
    split: str | None  # None: the file holds documents of every split


def files_source(request: Request) -> Source:
    """Opens `data.files`: one glob (domain `text`) or a mapping from domain to glob.

    Raises:
        ConfigError: `data.files` is missing.
        DataError: a glob without files, a file that cannot be read or is neither .txt nor .jsonl.
    """
    if not request.files:
        raise ConfigError(
            "data.name=files needs data.files: a glob such as 'texts/**/*.txt', or a mapping from "
            "domain to glob."
        )
    globs = request.files
    if isinstance(globs, str):
        globs = {DEFAULT_DOMAIN: globs}
    files = [file for domain, pattern in globs.items() for file in _find(domain, pattern)]

    def documents(split: str) -> Iterator[Document]:
        for file in files:
            if file.split in (None, split):
                yield from _read(file, split)

    return Source("files", _identity(globs, files), documents)


def _find(domain: str, pattern: str) -> list[_File]:
    pattern = os.path.expanduser(pattern)
    paths = sorted(Path(path) for path in glob.glob(pattern, recursive=True))
    paths = [path for path in paths if not path.is_dir()]
    if not paths:
        raise DataError(f"data.files: no file matches {pattern!r} (domain {domain!r}).")
    for path in paths:
        if path.suffix not in (".txt", ".jsonl"):
            raise DataError(f"data.files: {path} is neither .txt nor .jsonl; narrow {pattern!r}.")
    texts = [path for path in paths if path.suffix == ".txt"]
    splits = _splits_by_rank(texts) if len(texts) >= 3 else {}
    return [_File(path, domain, splits.get(path)) for path in paths]


def _splits_by_rank(paths: list[Path]) -> dict[Path, str]:
    """Holds out whole files. Paths count from their common directory: it may be moved."""
    root = os.path.commonpath([path.parent for path in paths])
    names = {path: path.relative_to(root).as_posix() for path in paths}
    ranked = sorted(paths, key=lambda path: (zlib.crc32(os.fsencode(names[path])), names[path]))
    n = math.ceil(_HELD_OUT * len(ranked))
    splits = dict.fromkeys(ranked, "train")
    splits.update(dict.fromkeys(ranked[:n], "test"))
    splits.update(dict.fromkeys(ranked[n : 2 * n], "valid"))
    return splits


def _identity(globs: Mapping[str, str], files: list[_File]) -> str:
    """Lists the files with size and time of change: a cache key that costs no reading."""
    listing = []
    for file in files:
        try:
            status = file.path.stat()
        except OSError as error:
            raise _unreadable(file.path, error) from error
        size_and_time = (status.st_size, status.st_mtime_ns)
        listing.append((str(file.path.resolve()), file.domain, file.split, *size_and_time))
    return json.dumps([dict(globs), listing])


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"data.files: cannot read {path}: {error.strerror or error}.")


def _read(file: _File, split: str) -> Iterator[Document]:
    try:
        if file.path.suffix == ".jsonl":
            yield from _read_lines(file, split)
        else:
            text = _decode(file.path.read_bytes(), file.path)
            yield Document(text if file.split else _part(text, split), file.domain)
    except OSError as error:
        raise _unreadable(file.path, error) from error


def _decode(data: bytes, path: Path, offset: int = 0) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"data.files: {path} is not UTF-8 at byte offset {offset + error.start} "
            f"({error.reason}). Convert it first, with iconv for example."
        ) from error


def _part(text: str, split: str) -> str:
    """Returns a split's part of one text, cut after the line ends nearest below 90% and 95%."""
    valid = _line_start(text, 1 - 2 * _HELD_OUT)
    test = _line_start(text, 1 - _HELD_OUT)
    return {"train": text[:valid], "valid": text[valid:test], "test": text[test:]}[split]


def _line_start(text: str, fraction: float) -> int:
    cut = int(len(text) * fraction)
    line = text.rfind("\n", 0, cut) + 1
    return line if line > len(text) * (fraction - _HELD_OUT) else cut  # very long lines: any place


def _read_lines(file: _File, split: str) -> Iterator[Document]:
    offset = 0
    with file.path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                document = _parse(_decode(line, file.path, offset), file, number)
                if split_of(document.text) == split:
                    yield document
            offset += len(line)


def _parse(line: str, file: _File, number: int) -> Document:
    where = f"data.files: {file.path}, line {number}"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}.") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise DataError(f"{where} needs an object with a string 'text'; it starts {line[:60]!r}.")
    domain = record.get("domain", file.domain)
    if not isinstance(domain, str) or not domain:
        raise DataError(f"{where}: 'domain' is {domain!r}, and must be a string.")
    try:
        record["text"].encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, UTF-8 cannot
        raise DataError(
            f"{where}: character {error.start} of 'text' is a lone surrogate, which is no text."
        ) from error
    return Document(record["text"], domain)
