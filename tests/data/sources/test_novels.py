import struct

import pytest

from moe.data.sources.novels import read_chapters, records, split_chapters, strings
from moe.errors import DataError
from tests.data.sources.tiny_packages import build, members, r_database, r_strings

FILE = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
EMMA = [
    "EMMA",
    "",
    "VOLUME I",
    "",
    "CHAPTER I",
    "",
    "Émma.",
    "VOLUME II",
    "CHAPTER I",
    "No chapter 2.",
]
PERSUASION = ["Persuasion", "Chapter 1", "Sir Walter.", "Chapter 2", "Mr Shepherd.", "Finis"]
ABBEY = ["NORTHANGER ABBEY", "CHAPTER 1.", "No one."]


def database(*novels) -> dict[str, bytes]:
    return {FILE: r_database(*(r_strings(lines) for lines in novels))}


def test_whole_novels_are_held_out(tmp_path):
    files = database(EMMA, PERSUASION, ABBEY)
    splits = build("novels", {"r-cran-janeaustenr": files}, tmp_path)
    paths = {split: sorted(e["path"] for e in examples) for split, examples in splits.items()}
    assert paths == {
        "train": ["emma/01", "emma/02"],
        "valid": ["northanger_abbey/01"],
        "test": ["persuasion/01", "persuasion/02"],
    }
    assert {e["domain"] for examples in splits.values() for e in examples} == {"novels"}


def test_chapters_are_the_text():
    chapters = [*read_chapters(members(database(EMMA)))]
    assert [chapter.number for chapter in chapters] == [1, 2]
    assert chapters[0].text == "\n".join(EMMA[:7])  # what comes before the first heading is kept
    assert chapters[1].text == "\n".join(EMMA[7:])  # the volume's heading is the next chapter's


@pytest.mark.parametrize("heading", ["CHAPTER XLVIII", "Chapter 12", " chapter 3. "])
def test_headings(heading):
    assert len([*split_chapters(["Chapter 1", "a", heading, "b"])]) == 2


@pytest.mark.parametrize("line", ["Chapter", "Chapter 3 of it", "volume 2", "the chapter 4"])
def test_other_lines_are_no_chapters(line):
    assert len([*split_chapters(["Chapter 1", "a", "b"])]) == 1
    assert [*split_chapters([line, "b"])] == []


@pytest.mark.parametrize("version", [2, 3])
def test_strings_of_both_versions(version):
    assert strings(r_strings(["a", "", "é"], version), "here") == ["a", "", "é"]


def test_missing_string_is_empty():
    raw = r_strings(["a"]) + struct.pack(">Ii", 9, -1)
    place = raw.index(struct.pack(">Ii", 16, 1))
    raw = raw[:place] + struct.pack(">Ii", 16, 2) + raw[place + 8 :]
    assert strings(raw, "here") == ["a", ""]


def test_records_are_found_by_their_streams():
    vectors = [r_strings(["a"]), r_strings(["b"] * 1000)]
    assert [*records(r_database(*vectors))] == vectors


def test_truncated_at_every_byte():
    """No cut is taken for the end, except one between records."""
    whole = r_database(r_strings(["Emma", "Chapter 1"]), r_strings(["b"]))
    first = len(r_database(r_strings(["Emma", "Chapter 1"])))
    for end in range(1, len(whole)):
        if end == first:
            assert len([*records(whole[:end])]) == 1
            continue
        with pytest.raises(DataError, match=r"record [12] at byte .* is (truncated|damaged)"):
            [*records(whole[:end])]


def test_damaged_record_is_named():
    whole = bytearray(r_database(r_strings(["a"]), r_strings(["b"])))
    whole[-2] ^= 0xFF  # of the checksum
    with pytest.raises(DataError, match=r"record 2 at byte \d+ is truncated or damaged"):
        [*records(bytes(whole))]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"A\n3", "not in R's XDR format"),
        (r_strings(["a"], kind=13), "no vector of strings, but SEXP type 13"),
        (r_strings(["a", "b"])[:-1], "line 2 of 2 is damaged"),
        (r_strings(["a", "b"])[:-9], "truncated|damaged"),
        (r_strings(["a"])[:9], "truncated"),
        (r_strings(["a", b"\xff"]), "line 2 is not UTF-8 at byte 0"),
    ],
)
def test_bad_strings(raw, message):
    with pytest.raises(DataError, match=message):
        strings(raw, "here")


def test_novel_without_chapters():
    with pytest.raises(DataError, match=r"record 2 \('LETTERS'\) has no line 'Chapter 1'"):
        [*read_chapters(members(database(EMMA, ["LETTERS", "Dear"])))]


def test_another_package():
    with pytest.raises(DataError, match="has no file"):
        [*read_chapters({})]
