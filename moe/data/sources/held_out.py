"""Sides for examples: texts that are the same but for case and punctuation share one."""

import re
import zlib

_OTHER = re.compile(r"[\W_]+")


def normalised(text: str) -> str:
    """Returns the words of a text in lower case, one space between them."""
    return _OTHER.sub(" ", text.casefold()).strip()


def split_by_text(text: str, percent: int = 10) -> str:
    """Returns the split of an example by the CRC-32 of its normalised text.

    Args:
        text: what must not be on two sides.
        percent: of the examples that are valid, and as many again that are test.
    """
    place = zlib.crc32(normalised(text).encode("utf-8")) % 100
    if place < percent:
        return "test"
    return "valid" if place < 2 * percent else "train"
