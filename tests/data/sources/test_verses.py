from collections import Counter

import pytest

from moe.data.sources import sword
from moe.data.sources.types import split_of
from moe.data.sources.verses import Verse, align, without_trained
from moe.errors import DataError
from tests.data.sources.tiny_packages import build, members, sword_files, ztext

CHAPTERS = 100


def books(language: str) -> dict[str, list[list[str]]]:
    """Every chapter has three verses; some are repeated, one is missing in Spanish."""
    gen = [[f"{language} {c}.{v}" for v in (1, 2, 3)] for c in range(CHAPTERS)]
    for chapter in gen[::2]:
        chapter[1] = f"{language} and the LORD spake"
    jonah = [[f"{language} j"], [f"{language} numbered", f"{language} otherwise"]]
    matt = [[f"{language} m{c}"] for c in range(3)]
    if language == "es":
        matt[1] = [""]
    return {"Gen": gen, "Jonah": jonah, "Matt": matt}


def packages():
    return {
        "sword-text-kjv": sword_files(books("en")),
        "sword-text-sparv": sword_files(books("es")),
    }


def test_chapters_and_their_verses():
    chapters = [*sword.read_chapters(members(sword_files(books("en"))), "kjv")]
    names = [f"Gen.{c + 1}" for c in range(CHAPTERS)]
    assert [c.name for c in chapters] == [
        *names,
        "Jonah.1",
        "Jonah.2",
        "Matt.1",
        "Matt.2",
        "Matt.3",
    ]
    assert chapters[1].verses == ("en 1.1", "en 1.2", "en 1.3")
    assert chapters[CHAPTERS].verses == ("en j",)  # the heading of a book is no verse
    assert chapters[-1].verses == ("en m2",)


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ('In the <w lemma="strong:H7225">beginning</w> <w>God</w>', "In the beginning God"),
        ("A.<note>a<reference>b</reference></note> B<title>ALEPH.</title>", "A. B"),
        ('<title canonical="true" type="psalm">A Psalm.</title> LORD', "A Psalm. LORD"),
        ("¶ And &amp; so", "And & so"),
        (
            'hay allí<transChange type="added">también</transChange>bdelio',
            "hay allí también bdelio",
        ),
        ('he <transChange type="added">was</transChange>, then', "he was, then"),
        ("<transChange>The</transChange><w>LORD</w>\u2019s", "The LORD\u2019s"),
        ('<chapter eID="Num.12"/><div eID="gen134" type="x-p"/>', ""),
    ],
)
def test_plain(markup, text):
    assert sword.plain(markup) == text


def test_scripture_has_a_chapter_on_one_side(tmp_path):
    splits = build("scripture", packages(), tmp_path)
    for split, examples in splits.items():
        paths = {d: {e["path"] for e in examples if e["domain"] == d} for d in DOMAINS}
        assert paths["scripture_en"] - {"Matt.2"} == paths["scripture_es"] - {"Matt.2"}
        assert all(split_of(e["path"]) == split for e in examples)
        assert examples
    assert {e["text"] for e in splits["train"] if e["path"] == "Gen.2"} == {
        "en 1.1\nen 1.2\nen 1.3",
        "es 1.1\nes 1.2\nes 1.3",
    }


DOMAINS = ("scripture_en", "scripture_es")


def test_pairs(tmp_path):
    splits = build("verses_en_es", packages(), tmp_path)
    pairs = [e for examples in splits.values() for e in examples]
    assert all(e["source"].replace("en", "es") == e["target"] for e in pairs)
    assert {e["domain"] for e in pairs} == {"en-es"}
    sources = {split: [e["source"] for e in examples] for split, examples in splits.items()}
    assert not set(sources["train"]) & set(sources["valid"])
    assert not (set(sources["train"]) | set(sources["valid"])) & set(sources["test"])
    assert sources["train"].count("en and the LORD spake") > 1  # repeats in train stay
    for c in range(CHAPTERS):  # neighbours are together
        own = {s for s, texts in sources.items() for v in (1, 3) if f"en {c}.{v}" in texts}
        assert own == {split_of(f"Gen.{c + 1}")}
    everything = [*sources["train"], *sources["valid"], *sources["test"]]
    assert "en numbered" not in everything
    assert "en m1" not in everything


def test_what_is_left_out_is_counted():
    skipped = Counter()
    chapters = [
        [*sword.read_chapters(members(sword_files(books(language))), language)]
        for language in ("en", "es")
    ]
    verses = [*align(*chapters, skipped)]
    assert len(verses) == 3 * CHAPTERS + 1 + 2
    assert skipped == {"verses numbered otherwise": 2, "verses missing": 1}


def test_held_out_verse_that_train_has():
    held = next(f"Gen.{n}" for n in range(99) if split_of(f"Gen.{n}") == "test")
    train = next(f"Gen.{n}" for n in range(99) if split_of(f"Gen.{n}") == "train")
    verses = [Verse(held, "A  b", "x"), Verse(held, "c", "Y"), Verse(held, "d", "w")]
    verses += [Verse(train, "a b", "z"), Verse(train, "e", "y"), Verse(train, "e", "y")]
    skipped = Counter()
    kept = [*without_trained(verses, skipped)]
    assert kept == [("train", verse) for verse in verses[3:]] + [("test", verses[2])]
    assert skipped == {"held-out verses met before": 2}


def test_unequal_lengths():
    one = [sword.Chapter("Gen.1", ("a", "b"))]
    with pytest.raises(DataError, match=r"Gen\.1 has 2 verses in English and 3 in Spanish"):
        [*align(one, [sword.Chapter("Gen.1", ("a", "b", "c"))], Counter())]
    with pytest.raises(DataError, match="1 and 2 chapters"):
        [*align(one, [*one, sword.Chapter("Gen.2", ())], Counter())]


def broken(part: str, change) -> dict[str, bytes]:
    files = sword_files(books("en"))
    files[f"m/t/ot.bz{part}"] = change(files[f"m/t/ot.bz{part}"])
    return files


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("s", lambda data: data[:-1], r"ot\.bzs is truncated: 23 bytes"),
        ("v", lambda data: data[:-3], r"ot\.bzv is truncated"),
        ("v", lambda data: data[:10] + b"\xff" * 10 + data[20:], "slot 1 lies outside the text"),
        ("z", lambda data: data[:-5], "block 1 is truncated or damaged"),
        ("z", lambda data: b"xx" + data[2:], "block 0 is truncated or damaged"),
    ],
)
def test_damaged_module(part, change, message):
    with pytest.raises(DataError, match=message):
        [*sword.read_chapters(members(broken(part, change)), "kjv")]


def test_invalid_utf8_names_the_slot():
    files = sword_files(books("en")) | ztext(
        "m/t/ot", [b"", b'<chapter osisID="A.1">', b"a", b"\xff"]
    )
    with pytest.raises(DataError, match="slot 3 is not UTF-8 at byte 0"):
        [*sword.read_chapters(members(files), "kjv")]


def test_no_module_and_no_chapters():
    with pytest.raises(DataError, match="one zText module, and holds 0"):
        [*sword.read_chapters({}, "kjv")]
    files = ztext("m/ot", [b"a", b"b"]) | ztext("m/nt", [b"a", b"b"])
    with pytest.raises(DataError, match="no chapters"):
        [*sword.read_chapters(members(files), "kjv")]
