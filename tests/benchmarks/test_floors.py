"""What is measured on each data set, on toy data, and the command with its page."""

import math

import numpy as np
import pytest

from benchmarks import floors
from benchmarks.floors_methods import reading, result, tasks
from benchmarks.floors_methods.reading import Prepared
from moe.data.sources.types import Document, Source
from moe.errors import ConfigError, DataError
from tests.data.tiny_builder import REVIEWS, TinyReviews


class Toy:
    """Columns in memory."""

    name = "toy"

    def __init__(self, **splits):
        self._splits = splits

    @property
    def splits(self):
        return tuple(self._splits)

    def columns(self, split):
        return self._splits[split]

    def rate(self, feature):
        assert feature == "audio"
        return 8000


def values(rows, metric=None):
    return {
        (row.split, row.method): row.interval.value
        for row in rows
        if metric is None or row.metric == metric
    }


def reviews(n, flip=0):
    """Texts of which one word tells the class; `flip` of them lie."""
    labels = [i % 3 == 0 for i in range(n)]
    texts = [f"the film {i % 7} is {'good' if y else 'bad'}" for i, y in enumerate(labels)]
    return {"text": texts, "label": [int(y) ^ (i < flip) for i, y in enumerate(labels)]}


def test_texts():
    toy = Toy(train=reviews(60), valid=reviews(9), test=reviews(30, flip=6), test_long=reviews(12))
    rows = tasks.classify_texts(toy)
    found = values(rows)
    assert found["test", "TF-IDF logistic regression"] == 0.8
    assert ("test_long", "TF-IDF logistic regression") not in found
    assert found["test_long", "multinomial naive Bayes"] == 1.0
    assert found["test_long", "Bernoulli naive Bayes"] == 1.0
    np.testing.assert_allclose(found["test_long", "majority"], 2 / 3)
    assert {row.interval.n for row in rows} == {30, 12}
    (one,) = (row for row in rows if row.method.startswith("TF") and row.split == "test")
    assert one.interval.low < 0.8 < one.interval.high


def pictures(n, seed):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    images = rng.integers(0, 60, (n, 4, 4, 1)) + 150 * labels[:, None, None, None]
    return {"image": list(images.astype(np.uint8)), "label": list(labels)}


def test_pictures():
    toy = Toy(train=pictures(40, 0), valid=pictures(10, 1), test=pictures(20, 2))
    found = values(tasks.classify_pictures(toy))
    assert found == {("test", "nearest centroid"): 1.0, ("test", "logistic regression"): 1.0}


def sounds(n, seed):
    rng = np.random.default_rng(seed)
    labels = np.where(np.arange(n) % 3 == 0, 1, 0)
    hertz = np.where(labels, 2500, 400) + rng.integers(-50, 50, n)
    times = np.arange(1600) / 8000
    audio = [(9000 * np.sin(2 * np.pi * f * times[: 800 + 10 * i])) for i, f in enumerate(hertz)]
    return {"audio": [one.astype(np.int16) for one in audio], "label": list(labels)}


def test_sounds():
    toy = Toy(train=sounds(24, 0), valid=sounds(9, 1), test=sounds(12, 2))
    found = values(tasks.classify_sounds(toy))
    np.testing.assert_allclose(found["test", "majority"], 2 / 3)
    assert found["test", "logistic regression"] == 1.0


def test_translations():
    words = {"red": "rojo", "big": "grande", "sun": "sol", "sea": "mar", "new": "nuevo"}
    rng = np.random.default_rng(0)

    def pairs(n):
        drawn = [rng.choice(list(words), 5) for _ in range(n)]
        return {
            "source": [" ".join(one) + "." for one in drawn],
            "target": [" ".join(words[word] for word in one) + "." for one in drawn],
            "domain": ["en-es"] * n,
        }

    rows = tasks.translations(Toy(train=pairs(80), test=pairs(10)))
    bleu, chrf = values(rows, "BLEU"), values(rows, "chrF")
    assert bleu["test", "IBM Model 1"] == pytest.approx(100)
    assert chrf["test", "IBM Model 1"] == pytest.approx(100)
    assert 0 < bleu["test", "nearest train text"] < 100
    assert len(bleu) == len(chrf) == 3


def test_definitions():
    nouns = ["cat", "dog", "oak", "car", "sea", "bee"]
    about = [f"thing of kind {word} indeed" for word in nouns]
    train = {"source": about, "target": nouns}
    test = {"source": [f"kind {word}" for word in nouns], "target": nouns}
    new = {"source": ["one", "two", "three", "four"], "target": ["w", "x", "y", "z"]}
    found = values(tasks.definitions(Toy(train=train, test=test, test_new_words=new)))
    assert found["test", "TF-IDF overlap, 4 ways"] == 1.0
    assert found["test_new_words", "TF-IDF overlap, 4 ways"] == 0.25  # no word has a score
    assert found["test", "chance, 4 ways"] == found["test_new_words", "chance, 4 ways"] == 0.25


def test_missing_names():
    text = "Anne saw Emma.\nEmma left.\nThen Jane and Emma spoke."
    columns = {
        "source": [f"{text}\nSo XXXXX went.", f"{text}\nEmma met XXXXX."],
        "target": ["Emma", "Jane"],
        "candidates": ["Anne|Emma|Jane", "Anne|Emma|Jane"],
    }
    found = values(tasks.missing_names(Toy(test=columns)))
    np.testing.assert_allclose(found["test", "chance"], 1 / 3)
    assert found["test", "most frequent"] == 0.5
    # Emma stands in the second question: Anne and Jane are left, equally frequent.
    assert found["test", "most frequent, not in the question"] == 0.75
    assert found["test", "last mentioned"] == 0.5


def test_numbers():
    one = {"source": ["a 123456 b 12 c 7654321"], "target": ["123456"]}
    four = {"source": ["111111 and 222222, 333333. 444444"], "target": ["222222"]}
    found = values(tasks.numbers(Toy(test=one, test_of_4=four)))
    assert found == {
        ("test", "any number of the text"): 1.0,
        ("test_of_4", "any number of the text"): 0.25,
    }


def test_transcripts():
    toy = Toy(train={"text": ["ano", "ne", "ano"]}, test={"text": ["ano", "an", "nenene"]})
    found = values(tasks.transcripts(toy))
    assert found["test", "empty"] == 1.0
    # "an" is one insertion away; "nenene" four deletions and one substitution
    np.testing.assert_allclose(found["test", "always 'ano'"], (0 + 1 + 5) / 11)


def emoji(colours):
    images = [np.full((4, 4, 3), colour, np.uint8) for colour, *_ in colours]
    columns = {"image": [], "text": [], "domain": []}
    for image, (_, *names) in zip(images, colours, strict=True):
        for language, name in zip(("de", "en"), names, strict=True):
            columns["image"].append(image)
            columns["text"].append(name)
            columns["domain"].append(language)
    return columns


def test_picture_names():
    hearts = [((250, 0, 0), "rotes Herz", "red heart"), ((0, 0, 250), "Wal", "whale")]
    grey = [("Kuh", "cow"), ("Bus", "Bus"), ("Zug", "train"), ("Uhr", "watch"), ("Tor", "gate")]
    others = [((90, 90, 90 + i), *names) for i, names in enumerate(grey)]
    alike = [((255, 5, 5), "Herz", "heart"), ((5, 5, 255), "Blauwal", "whale shark")]
    test = emoji([*alike, *others])
    found = values(tasks.picture_names(Toy(train=emoji(hearts), test=test)))
    np.testing.assert_allclose(found["test", "chance, en"], 5 / 7)
    # 13 names: 2 are right for each picture but the bus, which is called the same in both languages
    pair, bus = (1 - math.comb(13 - n, 5) / math.comb(13, 5) for n in (2, 1))
    np.testing.assert_allclose(found["test", "chance, all languages"], (6 * pair + bus) / 7)


def test_nearest_colours_name_the_picture():
    train = [((250, 0, 0), "Herz", "heart"), ((0, 0, 250), "Wal", "whale")]
    rows = [((255, i, 5), f"Herz {i}", f"heart {i}") for i in range(5)]
    rows += [((5, i, 255), f"Wal {i}", f"whale {i}") for i in range(5)]
    found = values(tasks.picture_names(Toy(train=emoji(train), test=emoji(rows))))
    assert found["test", "chance, en"] == 0.5
    assert found["test", "name of nearest colours, en"] == 1.0
    assert found["test", "name of nearest colours, de"] == 1.0


def test_language():
    def texts(n, start):
        return {
            "text": [f"{'one two three ' * 9}{i}" for i in range(start, start + n)]
            + ["ä" * 50] * n,
            "domain": ["en"] * n + ["other"] * n,
        }

    rows = tasks.language(Toy(train=texts(20, 0), test=texts(5, 20)))
    by_domain = {(row.data, row.method): row.interval for row in rows}
    assert {row.data for row in rows} == {"toy: en", "toy: other"}
    order = by_domain["toy: en", "Kneser-Ney, order 5"]
    assert order.value < 0.3
    assert order.low <= order.value <= order.high
    xz = by_domain["toy: en", "xz -9"].value
    assert by_domain["toy: en", "xz -9 after train"].value < xz / 2
    assert all(row.interval.n == 5 for row in rows)


def test_texts_are_counted_up_to_a_size(monkeypatch):
    monkeypatch.setattr(tasks, "MOST_BYTES", 5)
    assert tasks.leading([b"ab", b"cd", b"efg"]) == [b"ab", b"cd"]
    assert tasks.leading([b"abcdefgh", b"c"]) == [b"abcdefgh"]


def test_prepared_columns(tmp_path):
    builder = TinyReviews(data_dir=tmp_path, config="train_test", file_format="array_record")
    builder.download_and_prepare(download_dir=tmp_path / "downloads")
    data = Prepared("tfds:tiny_reviews/train_test", tmp_path)
    assert set(data.splits) == {"test", "train"}
    columns = data.columns("test")
    assert sorted(columns["review"]) == sorted(f"test {review}" for review in REVIEWS)
    assert {type(text) for text in columns["review"]} == {str}
    for text, domain in zip(columns["review"], columns["domain"], strict=True):
        assert domain == ("good" if "good" in text else "bad")
    assert data.columns("test") is columns
    assert data.columns("valid") == {"review": [], "domain": [], "number": []}


def test_texts_of_a_source(tmp_path, monkeypatch):
    documents = {"train": [Document("one", "code"), Document("two", "prose")], "test": []}
    source = Source("stdlib", "", lambda split: iter(documents[split]))
    monkeypatch.setattr(reading, "open_source", lambda name, request: source)
    data = reading.open_data("stdlib", tmp_path)
    assert data.columns("train") == {"text": ["one", "two"], "domain": ["code", "prose"]}
    assert data.columns("test") == {"text": [], "domain": []}
    assert "test" in data.splits


def test_every_task_is_of_the_catalogue():
    assert set(floors.measured()) <= {*floors.CATALOGUE, "stdlib"}
    assert floors.measured()["novels"] is tasks.language


def test_page_keeps_other_rows_and_replaces_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(floors, "commit", lambda: "abc")
    page = tmp_path / "floors.md"
    head = result.markdown([], "")
    page.write_text(f"Before\n{floors.BEGIN}\n{head}\n{floors.END}\nAfter\n")

    def row(data, value):
        return result.Floor(data, "test", "m", "accuracy", result.exact(value, 3))

    floors.write(page, [row("novels", 0.5)])
    floors.write(page, [row("fashion_mnist", 0.25), row("fashion_mnist", 0.75)])
    floors.write(page, [row("novels: x", 0.125)])
    lines = page.read_text().splitlines()
    assert lines[:4] == ["Before", floors.BEGIN, *head.splitlines()]
    told = [line.split(" | ")[4] for line in lines[4:-2]]
    assert told in (["0.250", "0.750", "0.125"], ["0.125", "0.250", "0.750"])
    assert lines[-2:] == [floors.END, "After"]
    page.write_text("nothing")
    with pytest.raises(ConfigError, match="put them back"):
        floors.write(page, [])


def test_what_is_not_prepared_is_told(tmp_path, capsys):
    assert floors.measure("novels", tasks.language, tmp_path, required=False) == []
    assert "novels: left out" in capsys.readouterr().out
    with pytest.raises(DataError, match="prepare_data"):
        floors.measure("novels", tasks.language, tmp_path, required=True)


def test_an_unknown_name_is_an_error_with_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'fashion_mnist'"):
        floors.main(["floors.py", "--only=fashion_minst", f"--data_dir={tmp_path}"])
