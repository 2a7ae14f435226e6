"""Reader of SWORD text modules in the zText format: compressed blocks, and an index of verses.

Of each testament a module has three files: `.bzs` (offset, size and unpacked size of each block),
`.bzz` (the blocks, zlib) and `.bzv` (block, offset and size of each verse). The verses lie in the
slots of a versification: the headings of testament, book and chapter have slots of their own.
"""

from collections.abc import Iterator, Mapping
import html
import re
import struct
from typing import NamedTuple

from moe.data.archives import Reader, inflate, largest, require
from moe.data.sources.language import decode
from moe.errors import DataError

_TESTAMENTS = ("ot", "nt")
_BLOCK = struct.Struct("<III")  # offset, size, unpacked size
_VERSE = struct.Struct("<IIH")  # block, offset, size
_CHAPTER = re.compile(r'<chapter [^>]*osisID="([^"]+)"')
# Footnotes, and titles that are no part of the text (those of psalms are).
_NOTES = re.compile(r"<note\b.*?</note>|<title\b(?![^>]*canonical).*?</title>", re.DOTALL)
_ADDED = re.compile(r"</?transChange\b[^>]*>")  # words of the translators' own
_TAG = re.compile(r"<[^>]+>")
_EDGE = "\0"  # stands for a tag of `_ADDED`


class Chapter(NamedTuple):
    """The verses of one chapter, "" where the translation has none of that number."""

    name: str  # OSIS: Gen.1
    verses: tuple[str, ...]


def read_chapters(members: Mapping[str, Reader], package: str) -> Iterator[Chapter]:
    """Yields the chapters of a module in their order.

    Args:
        members: of the package's archive.
        package: to name in errors.

    Raises:
        DataError: a file is missing, truncated, damaged or not UTF-8, or has no chapters.
    """
    bases = [name.removesuffix("ot.bzs") for name in members if name.endswith("/ot.bzs")]
    if len(bases) != 1:
        raise DataError(f"{package} must hold one zText module, and holds {len(bases)}.")
    for testament in _TESTAMENTS:
        yield from _chapters(read_slots(members, f"{bases[0]}{testament}", package))


def read_slots(members: Mapping[str, Reader], base: str, package: str) -> list[str]:
    """Reads every slot of one testament, with its markup.

    Args:
        members: of the package's archive.
        base: name of the three files without `.bzs`, `.bzv` and `.bzz`.
        package: to name in errors.
    """
    index, verses, data = (require(members, f"{base}.bz{kind}", package) for kind in "svz")
    for name, part, size in (("s", index, _BLOCK.size), ("v", verses, _VERSE.size)):
        if len(part) % size:
            raise DataError(f"{package}: {base}.bz{name} is truncated: {len(part)} bytes.")
    blocks, room = [], largest(len(data))  # of all blocks: several may be the same bytes
    for number, (offset, size, _) in enumerate(_BLOCK.iter_unpack(index)):
        where = f"{package}: {base}.bzz, block {number}"
        block, _ = inflate(data[offset : offset + size], where, room)
        blocks.append(block)
        room -= len(block)
    slots = []
    for number, (block, offset, size) in enumerate(_VERSE.iter_unpack(verses)):
        where = f"{package}: {base}.bzv, slot {number}"
        if size and (block >= len(blocks) or offset + size > len(blocks[block])):
            raise DataError(f"{where} lies outside the text.")
        slots.append(decode(blocks[block][offset : offset + size], where) if size else "")
    return slots


def _chapters(slots: list[str]) -> Iterator[Chapter]:
    found = [
        (slot, match[1]) for slot, text in enumerate(slots) for match in _CHAPTER.finditer(text)
    ]
    if not found:
        raise DataError("The module has no chapters marked in OSIS.")
    starts = [slot for slot, _ in found]
    # The heading of a book has the slot before that of its first chapter.
    ends = [slot - name.endswith(".1") for slot, name in found[1:]]
    for start, end, (_, name) in zip(starts, [*ends, len(slots)], found, strict=True):
        yield Chapter(name, tuple(map(plain, slots[start + 1 : end])))


def plain(markup: str) -> str:
    """Returns a verse without markup, footnotes, headings and paragraph signs.

    Some modules lack the spaces around added words, which would run into their neighbours.
    """
    text = html.unescape(_TAG.sub("", _ADDED.sub(_EDGE, _NOTES.sub("", markup))))
    text = re.sub(rf"(?<=[\w,;:.?!]){_EDGE}(?=[\w¿¡])", " ", text).replace(_EDGE, "")
    return " ".join(text.replace("¶", " ").split())
