from collections.abc import Iterator
import json
from pathlib import Path

import pytest

from moe.data.sources.pairs import Pair, read_pairs, split_of_pair
from moe.data.sources.types import SPLITS
from moe.errors import DataError


def written(folder: Path, **files: bytes) -> list[Path]:
    """Writes files; `_` in a name stands for its dot."""
    paths = [folder / name.replace("_", ".") for name in files]
    for path, data in zip(paths, files.values(), strict=True):
        path.write_bytes(data)
    return paths


def test_aligned_files(tmp_path):
    paths = written(tmp_path, a_en=b"\xef\xbb\xbfone\r\n two \nthree", a_de=b"eins\nzwei\ndrei\n")
    assert [*read_pairs(paths, "en-de")] == [
        Pair("one", "eins", "en-de"),
        Pair("two", "zwei", "en-de"),
        Pair("three", "drei", "en-de"),
    ]


@pytest.mark.parametrize("separator", ["\u2028", "\x0c", "\x85", "\x0b", "\r", "\x1c"])
def test_only_line_feeds_end_lines(tmp_path, separator):
    paths = written(tmp_path, a_en=f"a{separator}b\nc\n".encode(), a_de=b"x\ny\n")
    assert [pair.source for pair in read_pairs(paths)] == [f"a{separator}b", "c"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a_tsv", "one\teins\ntwo\tzwei\ten-x\n"),
        ("a_jsonl", '{"source": "one", "target": "eins", "id": 3}\n'
         '{"domain": "en-x", "target": "zwei", "source": "two"}'),
    ],
)  # fmt: skip
def test_one_file(tmp_path, name, text):
    paths = written(tmp_path, **{name: text.encode()})
    assert [*read_pairs(paths)] == [Pair("one", "eins", "pairs"), Pair("two", "zwei", "en-x")]


def test_unequal_lengths_before_any_pair(tmp_path):
    paths = written(tmp_path, a_en=b"a\nb\nc\n", a_de=b"x\ny")
    with pytest.raises(DataError, match=r"a\.en has 3 lines and .*a\.de has 2"):
        read_pairs(paths)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a_en": b"a\n\nc", "a_de": b"x\ny\nz"}, r"a\.en, line 2 is empty"),
        ({"a_en": b"a\nb\nc", "a_de": b"x\n \t\nz"}, r"a\.de, line 2 is empty"),
        ({"a_en": b"a\nb\xe4", "a_de": b"x\ny"}, r"a\.en, line 2 is not UTF-8 at byte 1"),
        ({"a_tsv": b"a\tb\nc\n"}, r"a\.tsv, line 2 has 1 columns"),
        ({"a_tsv": b"a\tb\nc\td\te\tf\n"}, "line 2 has 4 columns"),
        ({"a_tsv": b"a\tb\nc\td\t\n"}, "line 2, domain is empty"),
        ({"a_tsv": b"a\tb\n\td\n"}, "line 2, source is empty"),
        ({"a_tsv": b"a\tb\nc\t\xff"}, "line 2 is not UTF-8 at byte 2"),
        ({"a_jsonl": b'{"source": "a", "target": "b"}\n{'}, r"a\.jsonl, line 2 is not JSON"),
        ({"a_jsonl": b'["source", "target"]'}, "line 1 must be an object"),
        ({"a_jsonl": b'"source target"'}, "line 1 must be an object"),
        ({"a_jsonl": b"3"}, "line 1 must be an object"),
        ({"a_jsonl": b'{"source": "a"}'}, "line 1 must be an object"),
        ({"a_jsonl": b'{"source": "a", "target": 3}'}, "line 1 must be an object"),
        ({"a_jsonl": b'{"source": "a", "target": ""}'}, "line 1, target is empty"),
        (
            {"a_jsonl": b'{"source": "a", "target": "b\\ud800"}'},
            "character 1 of 'target' is a lone",
        ),
    ],
)
def test_bad_lines_are_named(tmp_path, files, message):
    pairs = read_pairs(written(tmp_path, **files))
    assert isinstance(pairs, Iterator)
    with pytest.raises(DataError, match=message):
        list(pairs)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "not from no file"),
        ({"a_txt": b"a"}, r"one \.tsv or \.jsonl file, not from .*a\.txt"),
        ({"a_en": b"a", "a_de": b"a", "a_fr": b"a"}, "two aligned"),
        ({"a_tsv": b""}, r"a\.tsv is empty"),
        ({"a_en": b"", "a_de": b""}, r"a\.en is empty"),
    ],
)
def test_bad_files(tmp_path, files, message):
    with pytest.raises(DataError, match=message):
        read_pairs(written(tmp_path, **files))


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"Cannot read .*b\.tsv: No such file"):
        read_pairs([tmp_path / "b.tsv"])


def test_splits_by_source(tmp_path):
    lines = [json.dumps({"source": f"s {i}", "target": f"t {i}"}) for i in range(400)]
    pairs = [*read_pairs(written(tmp_path, a_jsonl="\n".join(lines).encode()))]
    splits = [split_of_pair(pair) for pair in pairs]
    assert set(splits) == set(SPLITS)
    assert 320 < splits.count("train") < 380
    for pair, split in zip(pairs, splits, strict=True):
        other = Pair(f" {pair.source.upper()}.\t", "another", "x")
        assert split_of_pair(other) == split
