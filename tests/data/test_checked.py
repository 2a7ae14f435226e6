"""Mapped arrays: whatever is read of them was compared with its checksum after they were opened."""

from collections.abc import Callable
import itertools
import json
import os
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
import numpy as np
import pytest

from moe.data import cache, checked
from moe.data.cache import BLOCK, check_directory, write_sums
from moe.data.checked import CheckedArray
from moe.data.example_data import example_data
from moe.data.open import make_data
from moe.errors import DataError
from tests.data import tiny_examples

LARGE = 6 << 30  # bytes of a file with holes: beyond 32 bits, and beyond what a start checks whole


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 4]))


@pytest.fixture
def blocks_of_16(monkeypatch):
    """Blocks of 16 bytes."""
    for module in (cache, checked):
        monkeypatch.setattr(module, "BLOCK", 16)


def opened(folder: Path, values: np.ndarray) -> CheckedArray:
    path = folder / "x"
    path.write_bytes(values.tobytes())
    write_sums(folder)
    return CheckedArray(path, values.dtype, check_directory(folder)["x"])


@pytest.mark.parametrize("dtype", ["uint8", "int32"])
def test_what_is_read_is_what_was_written_or_names_the_block(tmp_path, blocks_of_16, dtype):
    """Any reads of a file with a bit flipped after it was opened: an error where they touch its block."""
    size = np.dtype(dtype).itemsize
    reads = st.lists(st.tuples(st.integers(0, 99), st.integers(0, 30), st.booleans()), max_size=5)

    @settings(deadline=None, max_examples=40)
    @given(st.integers(1, 100), st.integers(0, 99), reads)
    def holds(n, place, reads):
        values = np.arange(n, dtype=dtype)
        array = opened(tmp_path, values)
        assert (len(array), array.dtype) == (n, values.dtype)
        bad = place % n * size // 16
        flip(tmp_path / "x", place % n * size)
        for start, count, as_slice in reads:
            numbers = np.arange(start, start + count) % n
            key = slice(min(start, n), start + count) if as_slice else numbers
            touched = np.arange(n)[key] * size // 16
            if bad in touched:
                message = rf"{tmp_path} is damaged: x, bytes {bad * 16} to .*Delete that directory"
                with pytest.raises(DataError, match=message):
                    array[key]
            else:
                np.testing.assert_array_equal(array[key], values[key])

    holds()


def test_a_block_is_read_once_and_all_of_them_for_numpy(tmp_path, blocks_of_16, monkeypatch):
    array = opened(tmp_path, np.arange(40, dtype=np.int32))
    found = []
    monkeypatch.setattr(checked, "check_block", lambda name, first, *rest: found.append(first))
    array[3:5]
    array[np.array([0, 5, 5, 4])]
    assert found == [0, 16]
    assert np.bincount(array).tolist() == [1] * 40
    assert found == [0, 16, *range(32, 160, 16)]
    array[:]
    assert len(found) == 10


def test_a_file_that_is_cut_after_opening_is_an_error_and_no_signal(tmp_path, blocks_of_16):
    array = opened(tmp_path, np.arange(9000, dtype=np.int32))
    with (tmp_path / "x").open("r+b") as file:
        file.truncate(40)
    assert array[:8].tolist() == list(range(8))
    for start in (8, 8000):
        with pytest.raises(DataError, match=rf"x, bytes {start * 4} to"):
            array[start : start + 1]


def test_a_file_is_closed_with_its_array(tmp_path):
    def held() -> int:
        return sum(os.path.realpath(link) == str(tmp_path / "x") for link in links.iterdir())

    links = Path("/proc/self/fd")
    array = opened(tmp_path, np.arange(8, dtype=np.int32))
    assert held()
    del array
    assert not held()


def test_a_file_that_grew_by_a_block_is_damaged(tmp_path, blocks_of_16):
    opened(tmp_path, np.arange(8, dtype=np.int32))
    with (tmp_path / "x").open("ab") as file:
        file.write(bytes(16))
    with pytest.raises(DataError, match="x has 48 bytes, and had 2 blocks of 16"):
        check_directory(tmp_path)


@pytest.mark.parametrize("dtype", ["O", "V8", "V0", "M8[s]", "U4", "S2", "f8,f8"])
def test_what_is_no_number_is_not_mapped(tmp_path, dtype):
    (tmp_path / "x").write_bytes(bytes(80))
    with pytest.raises(ValueError, match="no numbers"):
        CheckedArray(tmp_path / "x", np.dtype(dtype), [0])


def test_a_large_file_is_checked_where_it_is_read_and_its_index_whole(tmp_path, monkeypatch):
    """A start takes a sample of the file; of the `.npy` beside it, which is read at once, every block."""
    monkeypatch.setattr(cache, "_WHOLE", 16 * BLOCK)
    monkeypatch.setattr(cache, "_SMALL", BLOCK)
    zeros = cache.zlib.crc32(bytes(BLOCK))
    for name, blocks in (("x", LARGE // BLOCK), ("x.starts.npy", 5)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(blocks * BLOCK)
    sums = {"x": [zeros] * (LARGE // BLOCK), "x.starts.npy": [zeros] * 5}
    (tmp_path / "sums.json").write_text(json.dumps(sums))
    array = CheckedArray(tmp_path / "x", np.dtype(np.int32), check_directory(tmp_path)["x"])
    block, last = BLOCK // 4, LARGE // 4 - 1
    flip(tmp_path / "x", 1400 * BLOCK)  # and back, for later starts take samples of it
    assert not array[1399 * block : 1400 * block].any()
    assert not array[np.array([0, last])].any()
    for key in (slice(1400 * block - 1, 1400 * block + 1), np.array([0, 1401 * block - 1])):
        with pytest.raises(DataError, match=rf"x, bytes {1400 * BLOCK} to {1401 * BLOCK}, are not"):
            array[key]
    flip(tmp_path / "x", 1400 * BLOCK)
    for first in range(0, 5 * BLOCK, BLOCK):
        flip(tmp_path / "x.starts.npy", first)
        with pytest.raises(DataError, match=rf"x\.starts\.npy, bytes {first} to"):
            check_directory(tmp_path)
        flip(tmp_path / "x.starts.npy", first)


def test_examples_are_checked_where_they_are_read(tmp_path):
    how = {"task": "seq2seq", "batch_size": 1, "sequence_length": 40, "seed": 0}
    for name in ("input", "target"):
        data = example_data(tiny_examples.pairs(), root=tmp_path / name, **how)
        (path,) = (tmp_path / name).glob(f"examples/*/train.{name}")
        flip(path, 0)
        batches = data.train_batches()
        with pytest.raises(
            DataError, match=rf"{path.parent} is damaged: train\.{name}, bytes 0 to"
        ):
            next(batches)
        batches.close()
        assert next(data.eval_batches("test")) is not None


@pytest.fixture(scope="module")
def two_domains(tmp_path_factory) -> Callable[..., dict]:
    """A `data` section whose rows are of the first block, but one in a few hundred of the others."""
    folder = tmp_path_factory.mktemp("corpus")
    with (folder / "corpus.jsonl").open("w") as file:
        for domain, count, size in (("often", 60, 1000), ("seldom", 60, 100_000)):
            for i in range(count):
                text = f"{domain} {i} ".ljust(size, "x")
                file.write(json.dumps({"text": text, "domain": domain}) + "\n")

    def section(root: Path, workers: int) -> dict:
        return {
            "name": "files",
            "files": str(folder / "corpus.jsonl"),
            "directory": str(root),
            "weights": {"often": 0.998, "seldom": 0.002},
            "batch_size": 8,
            "sequence_length": 64,
            "workers": workers,
        }

    return section


@pytest.mark.parametrize("workers", [0, 1])
def test_a_byte_that_flips_while_a_run_reads_is_told(two_domains, tmp_path, workers):
    """Its reader has read ahead, and not from the block that changes."""
    data = make_data(ConfigDict(two_domains(tmp_path, workers)), seed=0)
    (path,) = tmp_path.glob("tokens/*/train.ids")
    assert path.stat().st_size > 2 * BLOCK
    batches = data.train_batches()
    for _ in range(3):
        next(batches)
    for block in range(1, -(-path.stat().st_size // BLOCK)):
        flip(path, block * BLOCK + 1000)
    message = rf"{path.parent} is damaged: train\.ids, bytes \d+ to \d+, are not .*Delete that dir"
    with pytest.raises(DataError, match=message):
        list(itertools.islice(batches, 2000))
    assert 3 * 8 < batches.next_row < 2000 * 8
    batches.close()
