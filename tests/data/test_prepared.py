import pathlib
import time

import pytest

from moe.data.sources import open_source
from moe.data.sources.prepared import prepared_directory
from moe.data.sources.types import SPLITS, Request
from moe.errors import ConfigError, DataError
from tests.data.tiny_builder import REVIEWS, TinyReviews


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Returns a data directory and a function that prepares a config of the tiny data set in it."""
    directory = tmp_path_factory.mktemp("tfds")

    def prepare(config: str) -> pathlib.Path:
        builder = TinyReviews(data_dir=directory, config=config, file_format="array_record")
        builder.download_and_prepare(download_dir=directory / "downloads")
        return directory

    return prepare


def read(name, directory, feature="review"):
    source = open_source("tfds", Request(name, directory, None, feature))
    return source, {split: list(source.documents(split)) for split in SPLITS}


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        ("train", (90, 5, 5)),
        ("train_test", (95, 5, 100)),
        ("train_validation", (95, 100, 5)),
        ("train_validation_test", (100, 100, 100)),
    ],
)
def test_splits(prepared, config, sizes):
    _, documents = read(f"tiny_reviews/{config}", prepared(config))
    assert tuple(len(documents[split]) for split in SPLITS) == sizes
    texts = [document.text for split in SPLITS for document in documents[split]]
    assert len(set(texts)) == sum(sizes)  # nothing in two splits
    expected = {f"{split} {review}" for split in config.split("_") for review in REVIEWS}
    assert set(texts) == expected
    for document in documents["train"]:
        assert document.domain == ("good" if "good" in document.text else "bad")


def test_a_directory_or_version_names_it_too(prepared):
    directory = prepared("train")
    source, documents = read("tiny_reviews/train", directory)
    for name in ("tiny_reviews/train:1.2.0", str(directory / "tiny_reviews/train/1.2.0")):
        other, same = read(name, directory)
        assert same == documents
        assert other.identity == source.identity


def test_unprepared_is_refused_at_once(tmp_path):
    start = time.monotonic()
    with pytest.raises(DataError, match=r"'lm1b' is not prepared in .*download_and_prepare"):
        read("lm1b", tmp_path)
    assert time.monotonic() - start < 2
    assert not list(tmp_path.iterdir())


def test_another_version_is_not_taken_for_it(prepared):
    with pytest.raises(DataError, match="is not prepared"):
        read("tiny_reviews/train:9.9.9", prepared("train"))


def test_a_name_of_several_data_sets(prepared):
    prepared("train")
    with pytest.raises(DataError, match=r"several data sets: .*train, train_test.*\. Name one"):
        read("tiny_reviews", prepared("train_test"))


def test_newest_version(tmp_path):
    for version in ("1.9.0", "1.10.0", "incomplete.XYZ_2.0.0"):
        (tmp_path / "some" / version).mkdir(parents=True)
        (tmp_path / "some" / version / "dataset_info.json").write_text("{}")
    assert prepared_directory("some", tmp_path) == tmp_path / "some" / "1.10.0"
    assert prepared_directory("some:1.9.0", tmp_path) == tmp_path / "some" / "1.9.0"


def test_other_features_are_named(prepared):
    for feature in ("text", "number"):
        with pytest.raises(DataError, match=f"no text feature {feature!r}.*'review'"):
            read("tiny_reviews/train", prepared("train"), feature)


def test_without_train_split(prepared):
    with pytest.raises(DataError, match="no split 'train', only test"):
        read("tiny_reviews/test", prepared("test"))


def test_format_without_random_access(prepared, tmp_path):
    original = prepared("train") / "tiny_reviews/train/1.2.0"
    for file in original.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    info = tmp_path / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(DataError, match=r"prepared as tfrecord.*array_record"):
        read(str(tmp_path), tmp_path)


@pytest.mark.parametrize("damage", [lambda data: data[:100], lambda data: data[::-1], None])
def test_damaged_records(prepared, tmp_path, damage):
    original = prepared("train") / "tiny_reviews/train/1.2.0"
    for file in original.iterdir():
        data = file.read_bytes()
        if "array_record" not in file.name:
            (tmp_path / file.name).write_bytes(data)
        elif damage:
            (tmp_path / file.name).write_bytes(damage(data))
    with pytest.raises(DataError, match="prepare the data set again"):
        read(str(tmp_path), tmp_path)


def test_text_that_is_not_utf8(prepared):
    with pytest.raises(DataError, match=r"record 0 of .*-00000-of-00001 is not UTF-8 at byte 1"):
        read("tiny_reviews/broken", prepared("broken"))


def test_a_name_is_needed(tmp_path):
    with pytest.raises(ConfigError, match="tfds needs a data set"):
        read("", tmp_path)
