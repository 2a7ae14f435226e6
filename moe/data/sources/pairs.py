"""The user's own pairs: two aligned text files, or one file of tab-separated or JSON lines.

Lines end with a line feed (a carriage return before it is dropped) and nothing else: separators
such as U+2028 or a form feed are part of a sentence, and taking them for line ends would shift every
pair that follows.
"""

from collections.abc import Callable, Iterator, Sequence
import json
from pathlib import Path
from typing import NamedTuple

from moe.data.sources.held_out import normalised
from moe.data.sources.types import split_of
from moe.errors import DataError

DEFAULT_DOMAIN = "pairs"


class Pair(NamedTuple):
    """A text and what is to be made of it, a translation for example."""

    source: str
    target: str
    domain: str  # en-es


def read_pairs(paths: Sequence[Path], domain: str = DEFAULT_DOMAIN) -> Iterator[Pair]:
    """Yields the pairs of the user's files in their order.

    Args:
        paths: two aligned UTF-8 text files (source, target), or one file: `.tsv` with the columns
            source, target and perhaps domain, without a header; `.jsonl` with an object a line of
            the strings `source`, `target` and perhaps `domain`.
        domain: of pairs that name none.

    Raises:
        DataError: another number or kind of files, one that cannot be read, text files of unequal
            lengths (before the first pair), no pairs at all, invalid UTF-8, an empty side, or a
            line in another form; names file and line.
    """
    if len(paths) == 2:
        return _aligned(paths[0], paths[1], domain)
    readers: dict[str, Callable[[str, str], tuple[str, ...]]] = {
        ".tsv": _columns,
        ".jsonl": _object,
    }
    if len(paths) != 1 or paths[0].suffix not in readers:
        raise DataError(
            f"Pairs come from two aligned text files or from one .tsv or .jsonl file, not from "
            f"{', '.join(map(str, paths)) or 'no file'}."
        )
    _count(paths[0])
    return _single(paths[0], readers[paths[0].suffix], domain)


def split_of_pair(pair: Pair) -> str:
    """Returns the split of a pair, by the hash of the words of its source.

    Pairs of one source are on one side: a held-out sentence is never one that was trained on.
    """
    return split_of(normalised(pair.source) or pair.source)


def _aligned(source: Path, target: Path, domain: str) -> Iterator[Pair]:
    counts = _count(source), _count(target)
    if counts[0] != counts[1]:
        raise DataError(
            f"{source} has {counts[0]} lines and {target} has {counts[1]}: line n of one must be the "
            "translation of line n of the other. Mend the files, or give a .tsv file."
        )

    def pairs() -> Iterator[Pair]:
        for (where, text), (where_target, translation) in zip(
            _lines(source), _lines(target), strict=True
        ):
            yield Pair(_filled(text, where), _filled(translation, where_target), domain)

    return pairs()


def _single(
    path: Path, parse: Callable[[str, str], tuple[str, ...]], domain: str
) -> Iterator[Pair]:
    for where, line in _lines(path):
        source, target, *own = parse(line, where)
        named = _filled(own[0], f"{where}, domain") if own else domain
        yield Pair(_filled(source, f"{where}, source"), _filled(target, f"{where}, target"), named)


def _count(path: Path) -> int:
    """Counts the lines of a file; the last may lack its line feed."""
    try:
        with path.open("rb") as file:
            count = sum(1 for _ in file)
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror or error}.") from error
    if not count:
        raise DataError(f"{path} is empty: it has no pairs.")
    return count


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yields (where, line) of a file."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            try:
                # A byte order mark is no text.
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{where} is not UTF-8 at byte {error.start} ({error.reason}). Convert the file "
                    "first, with iconv for example."
                ) from error
            yield where, text.removesuffix("\n").removesuffix("\r")


def _filled(text: str, where: str) -> str:
    text = text.strip()
    if not text:
        raise DataError(f"{where} is empty: remove the pair, or fill in what is missing.")
    return text


def _columns(line: str, where: str) -> tuple[str, ...]:
    columns = tuple(line.split("\t"))
    if len(columns) not in (2, 3):
        raise DataError(
            f"{where} has {len(columns)} columns: source, target and perhaps domain are wanted, with "
            "one tab between them."
        )
    return columns


def _object(line: str, where: str) -> tuple[str, ...]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}.") from error
    keys = ("source", "target", "domain")
    fields = record if isinstance(record, dict) else {}
    values = [fields[key] for key in keys if key in fields]
    if not {*keys[:2]} <= {*fields} or not all(isinstance(value, str) for value in values):
        raise DataError(
            f"{where} must be an object with the strings 'source' and 'target' and perhaps "
            f"'domain'; it starts {line[:60]!r}."
        )
    for key, value in zip(keys, values, strict=False):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, UTF-8 cannot
            raise DataError(
                f"{where}: character {error.start} of {key!r} is a lone surrogate, which is no text."
            ) from error
    return tuple(values)
