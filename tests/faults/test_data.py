"""Rows of the matrix where the data is at fault (14, 15, 20, 21, 23)."""

from collections.abc import Callable, Iterator
import itertools
import json
import os
from pathlib import Path
import random
import shutil
import signal
import time
from typing import TypeVar

from array_record.python import array_record_module  # ty: ignore[missing-module-member]
from ml_collections import ConfigDict
import pytest

from moe.data.batches import RowData
from moe.data.example_data import example_data
from moe.data.open import make_data
from moe.data.sources.shards import BadRecord, Shards
from moe.errors import CheckpointError, DataError
from tests import entry
from tests.data import tiny_examples
from tests.data.tiny_builder import TinyReviews
from tests.faults import harness
from tests.faults.harness import Reference

T = TypeVar("T")
USED = 12_000  # bytes that 100 records take; then comes padding
SECONDS = 60.0  # for an error to come: one or two on a quiet machine


# ---- row 14: damage


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    """A data set of one array_record file with 100 records, each with a hash of its own."""
    directory = tmp_path_factory.mktemp("tfds")
    made = TinyReviews(data_dir=directory, config="train", file_format="array_record")
    made.download_and_prepare(download_dir=directory / "downloads")
    return made


@pytest.fixture
def shard(builder) -> Iterator[Path]:
    """The file, which is as it was after the test."""
    (path,) = Path(builder.data_path).glob("*.array_record-*")
    before = path.read_bytes()
    yield path
    path.write_bytes(before)


def open_reviews(builder, root: Path, task: str = "classify", **changes) -> RowData:
    section = {
        "name": f"tfds:{builder.data_path}",
        "directory": str(root),
        "batch_size": 4,
        "sequence_length": 32,
        "text_feature": "review",
        "input_feature": "review",
        "label_feature": "domain",
    }
    return make_data(ConfigDict(section | changes), seed=0, task=task)


def attempt(call: Callable[[], T]) -> T | DataError:
    try:
        return call()
    except DataError as error:
        return error


def flip(path: Path, place: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def bad_records(builder) -> list[int]:
    """Numbers of the records that cannot be read; none where no record can."""
    shards = attempt(lambda: list(Shards(builder, "train")))
    if isinstance(shards, DataError):
        return []
    return [number for number, record in enumerate(shards) if isinstance(record, BadRecord)]


def damage_records(builder, path: Path, count: int) -> list[int]:
    """Flips bits until so many records cannot be read, and returns which."""
    bad: list[int] = []
    for place in range(1000, USED, 777):
        flip(path, place)
        found = bad_records(builder)
        if len(found) == len(bad) + 1:
            bad = found
        else:
            flip(path, place)
        if len(bad) == count:
            return bad
    raise AssertionError("no bit of a record was found")


@pytest.mark.slow
def test_row_14_flipped_bits_in_records_are_never_silent(builder, shard):
    """Whatever bit is flipped, each record is as it was or is named."""
    good, seed = list(Shards(builder, "train")), random.SystemRandom().randrange(1000)
    draw, found = random.Random(seed), 0
    content = shard.read_bytes()
    for _ in range(60):
        place = draw.randrange(USED)
        flip(shard, place, draw.randrange(8))
        read = attempt(lambda: list(Shards(builder, "train")))
        if isinstance(read, DataError):  # in the header or the index of the file
            assert shard.name in str(read)
            found += 1
        else:
            for number, (ours, theirs) in enumerate(zip(good, read, strict=True)):
                if isinstance(theirs, BadRecord):
                    assert f"record {number} of {shard}" in theirs.why
                    found += 1
                else:
                    assert theirs == ours, f"seed {seed}: record {number}, byte {place}"
        shard.write_bytes(content)
    assert found > 10, f"seed {seed}: the bits hit nothing"


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classify", "language"])
def test_row_14_a_bad_record_is_named_with_its_file(builder, shard, tmp_path, task):
    (number,) = damage_records(builder, shard, 1)
    assert Shards(builder, "train[50:]").where(3) == f"record 53 of {shard}"
    message = rf"record {number} of .*{shard.name}: Corrupted Riegeli/records file"
    with pytest.raises(DataError, match=message):
        open_reviews(builder, tmp_path, task)


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["bytes", "characters"])
def test_row_14_bad_records_within_the_budget_are_left_out_and_counted(
    builder, shard, tmp_path, tokenizer
):
    changes = {"tokenizer": tokenizer, "vocab_size": None if tokenizer == "bytes" else 64}
    whole = open_reviews(builder, tmp_path, **changes).num_rows("train")
    damage_records(builder, shard, 2)
    splits = ("train", "valid", "test")
    data = open_reviews(builder, tmp_path / "2", skip_bad=2, **changes)
    left_out = {split: data.left_out(split)["bad"] for split in splits}
    assert sum(left_out.values()) == 2
    assert data.num_rows("train") == whole - left_out["train"]
    least = max(left_out.values()) - 1
    with pytest.raises(DataError, match=rf"{shard.name}.*data\.skip_bad={least} bad records"):
        open_reviews(builder, tmp_path / "1", skip_bad=least, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classify", "language"])
@pytest.mark.parametrize("size", [None, 0, 100, 1 << 16, (1 << 16) + 1, -1])
def test_row_14_a_shard_that_is_cut_or_gone_is_named(builder, shard, tmp_path, size, task):
    """Whatever the budget. At 64 KiB what is left looks like an empty file, whose records read as blanks."""
    data = shard.read_bytes()
    if size is None:
        shard.unlink()
    else:
        shard.write_bytes(data[:size])
    with pytest.raises(DataError, match=rf"{shard.name}.*(records|No such file)"):
        open_reviews(builder, tmp_path, task, skip_bad=1000)


@pytest.mark.slow
def test_row_14_a_shard_with_other_records_is_named(builder, shard, tmp_path):
    """A file as whole as any, of another number of records."""
    reader = array_record_module.ArrayRecordReader(str(shard))
    found = reader.read_all()
    reader.close()
    writer = array_record_module.ArrayRecordWriter(str(shard), "group_size:1")
    for record in found[:-1]:
        writer.write(record)
    writer.close()
    with pytest.raises(DataError, match=rf"{shard.name} has 99 records, .* says 100: the file was"):
        open_reviews(builder, tmp_path, skip_bad=1000)


def damages(path: Path, draw: random.Random) -> Iterator[str]:
    """Damages a file in one way after another, and mends it."""
    before = path.read_bytes()
    for place in {0, len(before) - 1, *(draw.randrange(len(before)) for _ in range(6))}:
        flip(path, place, draw.randrange(8))
        yield f"flip of byte {place} of {len(before)}"
        path.write_bytes(before)
    for data in (b"", before[: len(before) // 2], before[:-1], before + b"\0"):
        path.write_bytes(data)
        yield f"{len(data)} bytes of {len(before)}"
    path.unlink()
    yield "nothing"
    path.write_bytes(before)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classify", "language"])
def test_row_14_every_damage_of_what_was_made_of_the_data_is_found(builder, tmp_path, task):
    """Token files, their index, encoded examples, learned tokenizers: every file, every region."""
    changes = {"tokenizer": "characters", "vocab_size": 64}
    good = open_reviews(builder, tmp_path, task, **changes)
    seed = random.SystemRandom().randrange(1000)
    draw = random.Random(seed)
    files = [path for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    assert len(files) > 8
    for path in files:
        for damage in damages(path, draw):
            data = attempt(lambda: open_reviews(builder, tmp_path, task, **changes))
            if isinstance(data, DataError):
                assert str(path.parent) in str(data)
                assert path.name in str(data) or path.name == "sums.json"
            else:  # a space of JSON, say
                assert path.name == "sums.json", f"seed {seed}: {damage} of {path}"
                assert data.fingerprint == good.fingerprint
    assert open_reviews(builder, tmp_path, task, **changes).fingerprint == good.fingerprint


# ---- row 15: too little


def text_section(folder: Path, **changes) -> ConfigDict:
    section = {
        "name": "files",
        "files": f"{folder}/*.txt",
        "directory": str(folder / "made"),
        "batch_size": 4,
        "sequence_length": 8,
    }
    return ConfigDict(section | changes)


def test_row_15_empty_text_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"\*\.txt"):
        make_data(text_section(tmp_path), seed=0)
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match=r"files.*(text|document|empty)"):
        make_data(text_section(tmp_path), seed=0)
    assert not (tmp_path / "made").exists()


def test_row_15_fewer_rows_than_a_batch_are_refused_and_as_many_are_enough(tmp_path):
    entry.tiny_text(tmp_path)
    rows = make_data(text_section(tmp_path), seed=0).num_rows("train")
    with pytest.raises(DataError, match=rf"at least data\.batch_size={rows + 1} .*has {rows}:"):
        make_data(text_section(tmp_path, batch_size=rows + 1), seed=0)
    enough = make_data(text_section(tmp_path, batch_size=rows), seed=0)
    assert next(enough.train_batches()).tokens.shape == (rows, 8)


@pytest.mark.parametrize("lines", [0, 1, 3])
def test_row_15_too_few_pairs_are_refused(tmp_path, lines):
    file = tmp_path / "pairs.tsv"
    file.write_text("".join(f"one {i}\tuno {i}\n" for i in range(lines)))
    section = text_section(tmp_path, name="pairs", files=str(file))
    with pytest.raises(DataError, match=rf"pairs\.tsv.*(has {lines} pairs|empty|no pair)"):
        make_data(section, seed=0, task="seq2seq")


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_row_15_a_split_that_has_no_row_left_is_refused(tmp_path, split):
    """All its examples are too long for a row, and are left out."""
    records = tiny_examples.pairs({**tiny_examples.PAIRS, split: [("x" * 50, "y")]})
    how = {"task": "seq2seq", "root": tmp_path, "batch_size": 1, "sequence_length": 40, "seed": 0}
    assert example_data(records, **how).num_rows(split) == 1
    words = r"needs at least (data\.batch_size=1 rows|1 row).* has 0"
    with pytest.raises(DataError, match=words):
        example_data(records, too_long="skip", **how)


def test_row_15_the_run_ends_with_3_and_leaves_nothing(tmp_path):
    entry.tiny_text(tmp_path)
    flags = [entry.QUICKSTART, *entry.MODEL_FLAGS, *entry.data_flags(tmp_path)]
    began = time.monotonic()
    ended = entry.run(
        "train", *flags, "--config.data.batch_size=8000", f"--workdir={tmp_path / 'run'}"
    )
    assert ended.code == 3, ended
    assert "needs at least data.batch_size=8000" in ended.err
    assert time.monotonic() - began < SECONDS
    assert not (tmp_path / "run").exists()


# ---- rows 20, 21: other batch sizes, other numbers of processes


def rows_of(data: RowData, count: int, state=None, blocks: int = 1) -> tuple[list[bytes], dict]:
    """So many global batches row by row, read as so many processes, and the place after them."""
    readers = [data.train_batches(block, blocks, state) for block in range(blocks)]
    taken = [list(itertools.islice(reader, count)) for reader in readers]
    rows = [
        row.tobytes() for batches in zip(*taken, strict=True) for b in batches for row in b.tokens
    ]
    states = [reader.get_state() for reader in readers]
    assert all(state == states[0] for state in states)
    for reader in readers:
        reader.close()
    return rows, json.loads(json.dumps(states[0]))


def follow(folder: Path, legs: list[tuple[int, int, int]]) -> None:
    """A run whose legs have (batch size, batches, processes): its rows are a prefix of the order."""
    entry.tiny_text(folder)
    seen, state = [], None
    for size, count, blocks in legs:
        data = make_data(text_section(folder, batch_size=size), seed=5)
        rows, state = rows_of(data, count, state, blocks)
        seen += rows
    assert state is not None
    assert state["next_row"] == len(seen)
    one = make_data(text_section(folder, batch_size=1), seed=5)
    assert len(seen) > one.num_rows("train")  # beyond an epoch
    assert rows_of(one, len(seen))[0] == seen


def test_row_20_every_row_once_with_changed_batch_sizes(tmp_path):
    follow(tmp_path, [(8, 90, 1), (16, 40, 1), (12, 41, 1), (4, 33, 1), (8, 90, 1)])


@pytest.mark.slow
def test_row_21_every_row_once_with_changed_process_counts(tmp_path):
    follow(tmp_path, [(8, 99, 2), (8, 80, 1), (8, 35, 4), (16, 41, 2), (12, 30, 1)])


@pytest.mark.slow
def test_row_21_other_data_is_refused_whatever_the_processes(tmp_path):
    entry.tiny_text(tmp_path)
    _, state = rows_of(make_data(text_section(tmp_path), seed=5), 3, blocks=2)
    other = make_data(text_section(tmp_path), seed=6)
    with pytest.raises(CheckpointError, match=r"seed was 5 and is now 6.*--allow_change=seed"):
        other.train_batches(0, 1, state)


# ---- row 23: a reader process is killed


def readers_of(pid: int) -> list[int]:
    """Processes that read for another."""
    found = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for path in found for child in path.read_text().split()]
    return [
        child
        for child in children
        if b"moe.data.reader" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.slow
def test_row_23_a_killed_reader_ends_the_run_and_it_goes_on_as_if_undisturbed(
    reference: Reference, tmp_path: Path
):
    """Exit 3 in seconds; a run that is killed itself takes its readers along; same losses after."""
    workdir = tmp_path / "run"
    slow, two = ["slow_step@11-40:0.3"], "--config.data.workers=2"
    with reference.train(workdir, two, faults=slow) as child:
        child.wait_for("SAVING 10")
        child.wait_for("step 12/")
        readers = readers_of(child.pid)
        assert len(readers) == 2
        began = time.monotonic()
        os.kill(readers[0], signal.SIGKILL)
        ended = child.finish()
        assert time.monotonic() - began < SECONDS
    assert ended.code == 3, ended.text
    assert f"pid {readers[0]}) was ended by SIGKILL" in ended.text
    assert all(map(gone, readers))

    with reference.train(workdir, two, faults=slow) as child:
        child.wait_for("step 13/")
        readers = readers_of(child.pid)
        assert len(readers) == 2
        child.signal(signal.SIGKILL)
        end = time.monotonic() + SECONDS
        while not all(map(gone, readers)):
            assert time.monotonic() < end
            time.sleep(0.05)

    with reference.train(workdir, "--config.data.workers=1") as child:
        ended = child.finish()
    assert ended.code == 0, ended.text
    assert harness.bits(workdir) == reference.bits
    assert harness.digest(workdir, harness.STEPS) == reference.digest
    shutil.rmtree(workdir)
