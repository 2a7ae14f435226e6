"""Records of a prepared data set one after another, each known by its file: none is lost silently.

array_record checks a hash of each record, but a file cut at a multiple of 64 KiB can look empty, and
its records then read as blanks: the number of records of each file is compared with what the data
set says of it.
"""

from collections.abc import Iterator
import os
from typing import Any, NamedTuple

from array_record.python import array_record_module  # ty: ignore[missing-module-member]
from google.protobuf.message import DecodeError

from moe.errors import DataError

_CHUNK = 256  # records read at once
# What array_record, pyarrow, PIL, the codecs of sound and protobuf raise.
_UNREADABLE = (
    *(OSError, RuntimeError, ValueError, TypeError, LookupError, SyntaxError, EOFError),
    DecodeError,
)


class BadRecord(NamedTuple):
    """Stands where a record cannot be read."""

    why: str


class Shards:
    """The records of one split, by random access and in order.

    Args:
        builder: of the prepared data set.
        split: of the data set itself, or a slice of one.

    Raises:
        DataError: a file that is missing, cut, or has another number of records than it should.
    """

    def __init__(self, builder: Any, split: str):
        self._of = f"{builder.data_path} ({split})"
        try:
            self._files = builder.info.splits[split].file_instructions
            self._source = builder.as_data_source(split)
        except _UNREADABLE as error:
            raise DataError(_unreadable(self._of, error)) from error
        if builder.info.file_format.value == "array_record":
            for file in self._files:
                _check_number(file)

    def __len__(self) -> int:
        return len(self._source)

    def __iter__(self) -> Iterator[dict[str, Any] | BadRecord]:
        for start in range(0, len(self), _CHUNK):
            numbers = range(start, min(start + _CHUNK, len(self)))
            try:
                yield from self._source.__getitems__(numbers)
            except _UNREADABLE:
                yield from map(self._alone, numbers)  # finds the bad ones of the chunk

    def where(self, number: int) -> str:
        """The file of a record, and its number there."""
        for file in self._files:
            if number < file.take:
                return f"record {file.skip + number} of {file.filename}"
            number -= file.take
        raise IndexError(number)

    def _alone(self, number: int) -> dict[str, Any] | BadRecord:
        try:
            return self._source[number]
        except _UNREADABLE as error:
            return BadRecord(_unreadable(self.where(number), error))


def _check_number(file: Any) -> None:
    name = file.filename
    try:
        reader = array_record_module.ArrayRecordReader(os.fspath(name))
        try:
            found = reader.num_records()
        finally:
            reader.close()
    except _UNREADABLE as error:
        raise DataError(
            _unreadable(f"{name}, of {file.examples_in_shard} records", error)
        ) from error
    if found != file.examples_in_shard:
        raise DataError(
            f"{name} has {found} records, and dataset_info.json says {file.examples_in_shard}: the file "
            "was cut or exchanged. Delete the directory and prepare the data set again."
        )


def _unreadable(what: str, error: Exception) -> str:
    return (
        f"Cannot read {what}: {error}. If the files are damaged, delete the directory and prepare the "
        "data set again."
    )
