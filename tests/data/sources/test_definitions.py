import pytest

from moe.data.sources.definitions import (
    PARTS_OF_SPEECH,
    Definition,
    read_definitions,
    split_definitions,
)
from moe.data.sources.held_out import normalised
from moe.errors import DataError
from tests.data.sources.tiny_packages import build, members

FOLDER = "usr/share/wordnet"
LICENCE = "  1 This software | \n"


def line(word: str, gloss: str, offset: int = 1) -> str:
    return f"{offset:08} 04 n 02 {word} 0 other 0 001 @ 00217014 n 0000 | {gloss}  \n"


def files(**lines: str) -> dict[str, bytes]:
    """By part of speech; those not given have the licence alone."""
    return {
        f"{FOLDER}/data.{pos}": (LICENCE + lines.get(pos, "")).encode() for pos in PARTS_OF_SPEECH
    }


def read(**lines: str) -> list[Definition]:
    return [*read_definitions(members(files(**lines)))]


def test_words_and_definitions():
    noun = line("laying_waste", "destruction by rain; or fire", 7)
    found = read(adj=line("on_tap(p)", '(of ale) at hand; "ale on tap"; "more"'), noun=noun)
    assert found == [
        ("noun/00000007", "destruction by rain; or fire", "laying waste", "noun"),
        ("adjective/00000001", "(of ale) at hand", "on tap", "adjective"),
    ]


@pytest.mark.parametrize(
    ("gloss", "definition"),
    [
        ('a place: "he took it"', "a place"),
        ('as in the expression "on the job";', 'as in the expression "on the job"'),
        ("café | bar", "café | bar"),
        ('one; two; "three; four"', "one; two"),
    ],
)
def test_definitions_end_where_examples_begin(gloss, definition):
    assert read(verb=line("x", gloss))[0].text == definition


def test_same_definitions_share_a_side():
    definitions = [
        Definition(f"noun/{copy}{i}", f"thing {i}{'!' * copy}", f"word {i} {copy}", "noun")
        for i in range(500)
        for copy in range(2)
    ]
    parts = split_definitions(definitions)
    sides = [{normalised(d.text) for d in parts[split]} for split in ("train", "valid", "test")]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 500
    assert all(sides)
    assert sum(len(parts[split]) for split in ("train", "valid", "test")) == 1000


def test_new_words_are_no_targets_of_train():
    definitions = [
        Definition(
            f"noun/{i}", f"thing {i}", f"Word {i % 700}" if i % 2 else f"word {i % 700}", "noun"
        )
        for i in range(1000)
    ]
    parts = split_definitions(definitions)
    known = {d.word.lower() for d in parts["train"]}
    assert parts["test_new_words"] == [d for d in parts["test"] if d.word.lower() not in known]
    assert 0 < len(parts["test_new_words"]) < len(parts["test"])


def test_prepared(tmp_path):
    lines = "".join(line(f"word_{i}", f"thing number {i}", i) for i in range(300))
    splits = build("definitions", {"wordnet-base": files(noun=lines)}, tmp_path)
    assert [*splits] == ["train", "valid", "test", "test_new_words"]
    found = {e["source"]: e["target"] for part in splits.values() for e in part}
    assert found == {f"thing number {i}": f"word {i}" for i in range(300)}
    assert {e["domain"] for e in splits["train"]} == {"noun"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("00000001 04 n 01 word 0 000\n", r"data\.verb, line 2 is no set of synonyms"),
        ("00000001 04 | gloss\n", r"line 2 is no set of synonyms"),
        (line("word", '; "only an example"'), r"line 2: the definition is empty"),
        (line("(p)", "a"), r"line 2: the word is empty"),
    ],
)
def test_bad_lines(bad, message):
    with pytest.raises(DataError, match=message):
        read(verb=bad)


def test_another_encoding():
    given = files() | {f"{FOLDER}/data.adv": line("word", "caf\xe9").encode("latin-1")}
    with pytest.raises(DataError, match=r"data\.adv, line 1 is not UTF-8 at byte"):
        [*read_definitions(members(given))]


def test_missing_file():
    given = files()
    del given[f"{FOLDER}/data.adj"]
    with pytest.raises(DataError, match=r"wordnet-base has no file .*data\.adj"):
        [*read_definitions(members(given))]
