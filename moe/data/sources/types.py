"""What every text source gives: documents of a split, each with its domain."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple
import zlib

SPLITS = ("train", "valid", "test")
DEFAULT_DOMAIN = "text"

_PERCENT_VALID = 5
_PERCENT_TEST = 5


class Request(NamedTuple):
    """What the config asks of a source."""

    dataset: str  # the part of `data.name` after the colon, "" without one
    directory: Path  # where prepared data and tokens live
    files: str | Mapping[str, str] | None
    text_feature: str


class Document(NamedTuple):
    """One text, never split between train, valid and test."""

    text: str
    domain: str
    key: str = ""  # documents of one key are held out together; "" stands for the text itself


class Source(NamedTuple):
    """A text corpus with three splits.

    `identity` changes whenever the documents may have changed: it is the key of the token cache.
    `documents(split)` yields the same documents in the same order at every call.
    """

    name: str
    identity: str
    documents: Callable[[str], Iterator[Document]]


def split_of(key: str) -> str:
    """Returns the split of a document by the CRC-32 of its key: 90% train, 5% valid, 5% test.

    A hash, so that a document stays where it is when others come or go.
    """
    percent = zlib.crc32(key.encode("utf-8", "surrogateescape")) % 100
    if percent < _PERCENT_TEST:
        return "test"
    return "valid" if percent < _PERCENT_TEST + _PERCENT_VALID else "train"
