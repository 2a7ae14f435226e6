"""Arrays mapped into memory, of which nothing is used before its block was compared with its checksum.

What was checked when a directory was opened may change until it is read, hours later, and of large
files only a sample is checked then.
"""

from collections.abc import Iterable, Sequence
import os
from pathlib import Path
import tokenize
from typing import Any
import weakref

from jaxtyping import Int, Shaped
import numpy as np

from moe.data.cache import BLOCK, check_block, damaged


class CheckedArray:
    """A flat array in a file of `directory_in_one_go`, read by slices and by arrays of indices.

    Each block is checked once, when something of it is first read, by the thread that reads it: 1 to 2 ms
    a block where memory holds the file.

    Args:
        path: of the file.
        dtype: of its numbers.
        sums: of its blocks, from `check_directory`.

    Raises:
        DataError: on reading, a block that is not what was written.
        OSError: the file cannot be opened.
        ValueError: it is empty, or holds no whole number of numbers, or `dtype` is not of numbers.
    """

    def __init__(self, path: Path, dtype: np.dtype, sums: Sequence[int]):
        if dtype.kind not in "biuf":
            raise ValueError(f"{path.name} cannot hold {dtype}, which are no numbers")
        self._path, self._sums = path, sums
        self._values = np.memmap(path, dtype, mode="r")
        self._shift = (BLOCK // dtype.itemsize).bit_length() - 1  # of an index, to its block
        self._seen = np.zeros(len(sums), bool)
        self._all_seen = False
        # Blocks are read rather than looked at through the map, where a bad sector or a file that was
        # cut ends the process with SIGBUS.
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def __len__(self) -> int:
        return len(self._values)

    @property
    def dtype(self) -> np.dtype:
        """Of the numbers."""
        return self._values.dtype

    def __getitem__(self, key: slice | Int[np.ndarray, " n"]) -> Shaped[np.ndarray, " n"]:
        """The numbers of a slice without a step, or of indices that are not negative."""
        if not self._all_seen:
            self._check(key)
        return self._values[key]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All of them, for functions of NumPy."""
        return np.array(self[:], dtype, copy=copy)

    def _check(self, key: slice | np.ndarray) -> None:
        if isinstance(key, slice):
            start, stop, _ = key.indices(len(self))
            if start >= stop:
                return
            blocks = np.arange(start >> self._shift, ((stop - 1) >> self._shift) + 1)
        else:
            blocks = key >> self._shift
        seen = self._seen[blocks]
        if not seen.all():
            self._read(np.unique(blocks[~seen]).tolist())

    def _read(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            first = block * BLOCK
            try:
                check_block(
                    self._path.name,
                    first,
                    os.pread(self._descriptor, BLOCK, first),
                    self._sums[block],
                )
            except (OSError, ValueError) as error:
                raise damaged(self._path.parent, str(error)) from error
            self._seen[block] = True
        self._all_seen = bool(self._seen.all())


def read_row(path: Path, dtype: type) -> Shaped[np.ndarray, " n"]:
    """A row of numbers that `np.save` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else.
    """
    # Mapped, a header that promises more than the file holds is told before memory is taken for it.
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (EOFError, tokenize.TokenError) as error:  # an empty file, a header cut in the middle
        raise ValueError(f"{path.name} is no array: {error}") from error
    if found.ndim != 1 or found.dtype != dtype:
        raise ValueError(f"{path.name} has {found.dtype}{list(found.shape)}, which is no row")
    return np.array(found)


def check_starts(name: str, starts: Int[np.ndarray, " N"], parts: int, end: int) -> None:
    """Raises ValueError unless so many parts follow each other from 0 to `end`."""
    if len(starts) != parts + 1 or starts[0] != 0 or starts[-1] != end:
        raise ValueError(
            f"the sizes of {name} are {end} numbers and {len(starts)} starts, for {parts} parts"
        )
    if (starts[1:] < starts[:-1]).any():
        raise ValueError(f"{name} has parts that end before they start")


def check_indices(name: str, values: Int[np.ndarray, " n"], size: int) -> None:
    """Raises ValueError unless each value is an index into so many."""
    wrong = np.flatnonzero((values < 0) | (values >= size))
    if len(wrong):
        raise ValueError(f"{name} has {values[wrong[0]]} at {wrong[0]}, and there are {size}")
