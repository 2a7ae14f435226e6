"""Six novels of Jane Austen, a document each chapter; whole novels are held out.

The R package `janeaustenr` keeps them in a lazy-load database: records of a big-endian length and
a zlib stream, each the serialisation (XDR, R Internals section 1.8) of a vector of lines.
"""

from collections.abc import Iterable, Iterator, Mapping
import re
import struct
from typing import NamedTuple

from moe.data.archives import Reader, inflate, largest, require
from moe.data.packages import Package
from moe.data.sources.language import LanguageBuilder, decode
from moe.data.sources.types import Document
from moe.errors import DataError

PACKAGES = (
    Package(
        "apt",
        "r-cran-janeaustenr",
        "1.0.0-1",
        sha256="df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
        size=1626392,
    ),
)
SPLIT_OF_NOVEL = {"persuasion": "test", "northanger_abbey": "valid"}  # all others: train

_DATABASE = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
_XDR = b"X\n"  # format of the serialisation
_STRINGS, _STRING = 16, 9  # SEXP types: vector of strings, one string
_TYPE = 0xFF  # bits of the flags that hold the type
_MISSING = -1  # length of NA
_HEADER = 14  # bytes: format 2, versions 3 x 4; then the native encoding, from version 3 on
_HEADING = re.compile(r"(volume|chapter)\s+([ivxlc]+|\d+)\.?", re.IGNORECASE)


class Chapter(NamedTuple):
    """One chapter, heading included."""

    novel: str  # pride_and_prejudice
    number: int  # from 1 over all volumes
    text: str


class AustenNovels(LanguageBuilder):
    """Six novels of Jane Austen by chapter: Persuasion is test, Northanger Abbey valid.

    Licence: the novels are in the public domain, the package `janeaustenr` is MIT.
    """

    def documents(self) -> Iterator[tuple[str, Document]]:
        """Yields (split, chapter)."""
        for chapter in read_chapters(self.members("r-cran-janeaustenr")):
            path = f"{chapter.novel}/{chapter.number:02}"
            split = SPLIT_OF_NOVEL.get(chapter.novel, "train")
            yield split, Document(chapter.text, "novels", path)


def read_chapters(members: Mapping[str, Reader]) -> Iterator[Chapter]:
    """Yields the chapters of all novels in the order of the database.

    Raises:
        DataError: the database is missing, truncated or damaged, or a novel has no chapters.
    """
    database = require(members, _DATABASE, "r-cran-janeaustenr")
    for number, raw in enumerate(records(database), start=1):
        lines = strings(raw, f"{_DATABASE}, record {number}")
        title = next((line.strip() for line in lines if line.strip()), "")
        chapters = [*split_chapters(lines)]
        if not chapters:
            raise DataError(f"{_DATABASE}, record {number} ({title!r}) has no line 'Chapter 1'.")
        novel = title.lower().replace(" ", "_")
        for chapter, text in enumerate(chapters, start=1):
            yield Chapter(novel, chapter, text)


def records(database: bytes) -> Iterator[bytes]:
    """Yields the decompressed records of a lazy-load database.

    Raises:
        DataError: a record is truncated or damaged; it names the record's number.
    """
    start, number = 0, 0
    while start < len(database):
        number += 1
        where = f"{_DATABASE}, record {number} at byte {start}"
        raw, rest = inflate(database[start + 4 :], where, largest(len(database)))
        wanted = int.from_bytes(database[start : start + 4], "big")
        if len(raw) != wanted:
            raise DataError(f"{where} is truncated: it has {len(raw)} of {wanted} bytes.")
        yield raw
        start = len(database) - len(rest)


def strings(raw: bytes, where: str) -> list[str]:
    """Reads a serialised vector of strings.

    Args:
        raw: the serialisation, format XDR, version 2 or 3.
        where: to name in errors.

    Raises:
        DataError: it is truncated, something else, or not UTF-8; names the line.
    """
    try:
        if raw[:2] != _XDR:
            raise DataError(f"{where} is not in R's XDR format; it starts {raw[:8]!r}.")
        (version,) = struct.unpack_from(">i", raw, 2)
        place = _HEADER
        if version == 3:
            place += 4 + struct.unpack_from(">i", raw, place)[0]
        flags, count = struct.unpack_from(">Ii", raw, place)
        if flags & _TYPE != _STRINGS:
            raise DataError(f"{where} is no vector of strings, but SEXP type {flags & _TYPE}.")
        return _lines(raw, place + 8, count, where)
    except struct.error as error:
        raise DataError(f"{where} is truncated: {error}.") from error


def _lines(raw: bytes, place: int, count: int, where: str) -> list[str]:
    lines = []
    for line in range(1, count + 1):
        flags, length = struct.unpack_from(">Ii", raw, place)
        place += 8
        end = place + max(length, 0)
        if flags & _TYPE != _STRING or length < _MISSING or end > len(raw):
            raise DataError(f"{where}, line {line} of {count} is damaged.")
        lines.append(decode(raw[place:end], f"{where}, line {line}"))
        place = end
    return lines


def split_chapters(lines: Iterable[str]) -> Iterator[str]:
    """Yields the texts of chapters; what comes before the first heading opens the first chapter.

    The heading of a volume belongs to the chapter that follows it.
    """
    chapter: list[str] = []
    begun = False  # a chapter's heading is in `chapter`
    for line in lines:
        heading = _HEADING.fullmatch(line.strip())
        if heading and begun:
            yield "\n".join(chapter).strip()
            chapter, begun = [], False
        begun = begun or (heading is not None and heading[1].lower() == "chapter")
        chapter.append(line)
    if begun:
        yield "\n".join(chapter).strip()
