import collections
import json

import pytest

from moe.data.sources import open_source
from moe.data.sources.types import SPLITS, Request, split_of
from moe.errors import DataError


def read(files, tmp_path):
    """Returns the documents of each split."""
    source = open_source("files", Request("", tmp_path / "data", files, "text"))
    documents = {split: list(source.documents(split)) for split in SPLITS}
    assert documents == {split: list(source.documents(split)) for split in SPLITS}  # and again
    return documents


def write(folder, n, text=lambda i: f"text {i}\n"):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        (folder / f"{i}.txt").write_text(text(i))


def test_hash_holds_out_a_tenth_and_never_moves():
    counted = collections.Counter(split_of(f"path/{i}.py") for i in range(20_000))
    assert counted["valid"] / 20_000 == pytest.approx(0.05, abs=0.005)
    assert counted["test"] / 20_000 == pytest.approx(0.05, abs=0.005)
    assert [split_of(key) for key in ("os.py", "ast.py", "abc.py")] == ["train", "valid", "test"]


@pytest.mark.parametrize(("n", "held_out"), [(3, 1), (20, 1), (100, 5)])
def test_text_files_are_held_out_whole(tmp_path, n, held_out):
    write(tmp_path / "texts", n)
    documents = read(str(tmp_path / "texts" / "*.txt"), tmp_path)
    assert [len(documents[split]) for split in SPLITS] == [n - 2 * held_out, held_out, held_out]
    texts = [document.text for split in SPLITS for document in documents[split]]
    assert sorted(texts) == sorted(f"text {i}\n" for i in range(n))
    assert {document.domain for split in SPLITS for document in documents[split]} == {"text"}


def test_moving_the_directory_keeps_the_split(tmp_path):
    write(tmp_path / "here", 30)
    before = read(str(tmp_path / "here/*.txt"), tmp_path)
    (tmp_path / "here").rename(tmp_path / "there")
    assert read(str(tmp_path / "there/*.txt"), tmp_path) == before


def test_one_text_file_is_cut_at_line_ends(tmp_path):
    text = "".join(f"line {i} é\n" for i in range(1000))
    (tmp_path / "book.txt").write_text(text)
    documents = read(str(tmp_path / "book.txt"), tmp_path)
    parts = [document.text for split in SPLITS for document in documents[split]]
    assert "".join(parts) == text
    assert all(part.endswith("\n") for part in parts)
    sizes = [len(part) / len(text) for part in parts]
    assert sizes == pytest.approx([0.9, 0.05, 0.05], abs=0.01)


def test_one_long_line_is_cut_anyway(tmp_path):
    (tmp_path / "line.txt").write_text("head\n" + "x" * 1000)
    documents = read(str(tmp_path / "line.txt"), tmp_path)
    sizes = [len(document.text) for split in SPLITS for document in documents[split]]
    assert sizes == [904, 50, 51]


def test_domains_from_a_mapping(tmp_path):
    write(tmp_path / "a/deep", 5)
    write(tmp_path / "b", 4)
    files = {"novels": str(tmp_path / "a/**/*.txt"), "news": str(tmp_path / "b/*.txt")}
    documents = read(files, tmp_path)
    counted = collections.Counter(d.domain for split in SPLITS for d in documents[split])
    assert counted == {"novels": 5, "news": 4}
    assert {d.domain for d in documents["valid"]} == {"novels", "news"}


def test_lines_of_jsonl_go_by_their_text(tmp_path):
    lines = [{"text": f"text {i % 300}", "id": i} for i in range(600)]  # every text twice
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(map(json.dumps, lines)))
    documents = read({"mail": str(path)}, tmp_path)
    texts = {split: [d.text for d in documents[split]] for split in SPLITS}
    assert sum(map(len, texts.values())) == 600
    assert not set(texts["train"]) & set(texts["valid"] + texts["test"])
    assert not set(texts["valid"]) & set(texts["test"])
    assert all(texts.values())
    assert {d.domain for d in documents["train"]} == {"mail"}


def test_lines_may_name_their_domain(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x", "domain": "one"}\n{"text": "y"}\n')
    documents = read(str(path), tmp_path)
    assert {d.domain for split in SPLITS for d in documents[split]} == {"one", "text"}


def lines(*records: bytes) -> bytes:
    return b'{"text": "fine"}\n' + b"\n".join(records)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", lines(b'{"txt": "x"}'), r"a.jsonl, line 2 needs .*'text'.*txt"),
        ("a.jsonl", lines(b"", b'{"text": 3}'), r"line 3 needs .*'text'"),
        ("a.jsonl", lines(b"[1]"), r"line 2 needs an object"),
        ("a.jsonl", lines(b'{"text": '), r"line 2 is not JSON: .* column"),
        ("a.jsonl", lines(b'{"text": "x", "domain": 1}'), r"line 2: 'domain' is 1"),
        ("a.jsonl", lines(rb'{"text": "\ud800"}'), r"line 2: character 0 .* lone surrogate"),
        ("a.jsonl", lines(b'{"text": "\xff"}'), r"a.jsonl is not UTF-8 at byte offset 27"),
        ("a.txt", b"abc\xe9", r"a.txt is not UTF-8 at byte offset 3"),
        ("a.csv", b"abc", r"a.csv is neither .txt nor .jsonl"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(str(tmp_path / "a.*"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_glob_without_files(tmp_path):
    (tmp_path / "directory.txt").mkdir()
    with pytest.raises(DataError, match=r"no file matches '.*\.txt' \(domain 'text'\)"):
        read(str(tmp_path / "*.txt"), tmp_path)


def test_unreadable_file(tmp_path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(DataError, match=r"cannot read .*a.txt: No such file"):
        read(str(tmp_path / "*.txt"), tmp_path)
