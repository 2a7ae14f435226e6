"""Tiny packages of the tests' own, and builders run on them as `prepare` does."""

from collections.abc import Callable, Mapping
from pathlib import Path
import struct
from typing import Any
import zipfile
import zlib

from moe.data.sources.builder import PackageBuilder, write_quietly
from moe.data.sources.catalogue import Entry, find_entry

Members = dict[str, Callable[[], bytes]]


def members(files: Mapping[str, bytes]) -> Members:
    return {name: lambda data=data: data for name, data in files.items()}


def build(
    name: str | Entry, packages: Mapping[str, Mapping[str, bytes]], folder: Path
) -> dict[str, list[dict[str, str]]]:
    """Prepares a data set from these files by package; its examples by split.

    Args:
        name: of the catalogue, or an entry that need not be in it.
        packages: package -> file -> content.
        folder: for the archives and the prepared data.
    """
    entry = find_entry(name) if isinstance(name, str) else name
    options = {} if entry.config is None else {"config": entry.config}
    builder: Any = entry.load()(data_dir=folder / "data", file_format="array_record", **options)
    assert isinstance(builder, PackageBuilder)
    archives = {}
    for package, files in packages.items():
        archives[package] = folder / f"{package}.zip"
        with zipfile.ZipFile(archives[package], "w") as archive:
            for file, data in files.items():
                archive.writestr(file, data)
    builder.archives = archives
    write_quietly(builder)
    assert {package.name for package in entry.packages()} == set(packages)
    return {
        split: [
            {
                feature: value.decode() if isinstance(value, bytes) else str(value)
                for feature, value in example.items()
            }
            for example in builder.as_data_source(split)
        ]
        for split in builder.info.splits
    }


def r_strings(lines: list[str | bytes], version: int = 3, kind: int = 16) -> bytes:
    """Serialises a vector of strings as R does."""
    head = b"X\n" + struct.pack(">iii", version, 0x40201, 0x30500)
    if version == 3:
        head += struct.pack(">i", 5) + b"UTF-8"
    head += struct.pack(">Ii", kind, len(lines))
    for line in lines:
        data = line.encode() if isinstance(line, str) else line
        head += struct.pack(">Ii", 0x8009, len(data)) + data
    return head


def r_database(*vectors: bytes) -> bytes:
    return b"".join(struct.pack(">I", len(raw)) + zlib.compress(raw) for raw in vectors)


def sword_files(books: Mapping[str, list[list[str]]], base: str = "m/t/") -> dict[str, bytes]:
    """Writes a module in zText: OSIS book name -> chapters of verses; the last book is the NT's."""
    names = [*books]
    files = {}
    for testament, own in (("ot", names[:-1]), ("nt", names[-1:])):
        slots = ["", '<milestone type="x-importer"/>']
        for book in own:
            slots.append(f'<div osisID="{book}" type="book"/><title type="main">{book}</title>')
            for number, verses in enumerate(books[book], start=1):
                slots.append(f'<chapter n="{number}" osisID="{book}.{number}" sID="x"/> ')
                slots += verses
        files |= ztext(f"{base}{testament}", [slot.encode() for slot in slots])
    return files


def ztext(base: str, slots: list[bytes]) -> dict[str, bytes]:
    """Lays slots into two blocks."""
    half = len(slots) // 2
    index, verses, data = b"", b"", b""
    for block, part in enumerate((slots[:half], slots[half:])):
        raw = b"".join(part)
        packed = zlib.compress(raw)
        index += struct.pack("<III", len(data), len(packed), len(raw))
        data += packed
        offset = 0
        for slot in part:
            verses += struct.pack("<IIH", block, offset, len(slot))
            offset += len(slot)
    return {f"{base}.bzs": index, f"{base}.bzv": verses, f"{base}.bzz": data}


def catalogue(messages: Mapping[str, str], order: str = "<") -> bytes:
    """Writes a `.mo` file."""
    texts = [side.encode() for pair in messages.items() for side in pair]
    count, tables, data = len(messages), [b"", b""], b""
    start = 28 + 16 * count
    for number, text in enumerate(texts):
        tables[number % 2] += struct.pack(f"{order}II", len(text), start + len(data))
        data += text + b"\0"
    head = struct.pack(f"{order}IIIIIII", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, 0)
    return head + tables[0] + tables[1] + data
