"""Pictures: patches, Fashion-MNIST, the digits, and what TFDS has of CIFAR-10."""

import gzip
import json
import struct

import numpy as np
import pytest
import tensorflow_datasets as tfds

from moe.data.examples import open_records
from moe.data.features import find_fields
from moe.data.images import num_patches, patches
from moe.data.sources import fashion_mnist
from moe.data.sources.builder import prepare
from moe.data.sources.fashion_mnist import CLASSES, read_part
from moe.data.sources.mnist_digits import read_digits, split_of_pixels
from moe.data.sources.prepared import find_prepared
from moe.errors import ConfigError, DataError
from tests.data.tiny_archives import write
from tests.data.tiny_pictures import TinyPictures

FOLDER = "usr/share/datasets/fashion-mnist"


def readable_patches(image, patch, stride):
    rows = []
    for top in range(0, image.shape[0] - patch + 1, stride):
        for left in range(0, image.shape[1] - patch + 1, stride):
            square = image[top : top + patch, left : left + patch]
            rows.append([value / 127.5 - 1 for value in square.ravel().tolist()])
    return np.array(rows)


@pytest.mark.parametrize(
    ("shape", "patch", "stride"),
    [
        ((28, 28, 1), 4, 4),
        ((28, 28, 1), 7, 3),
        ((32, 16, 3), 8, 8),
        ((6, 9, 2), 3, 3),
        ((5, 5, 1), 5, 9),
    ],
)
def test_patches(shape, patch, stride):
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    found = patches(image, patch, stride)
    assert found.dtype == np.float32
    assert found.shape == (num_patches(shape, patch, stride), patch * patch * shape[2])
    np.testing.assert_allclose(found, readable_patches(image, patch, stride), atol=1e-6)


def test_patches_span_minus_one_to_one():
    image = np.array([[[0], [255]]], np.uint8)
    assert patches(image, 1, 1).tolist() == [[-1.0], [1.0]]


@pytest.mark.parametrize(("patch", "stride"), [(5, 5), (29, 1), (4, 5), (0, 1), (4, 0), (4, -4)])
def test_patches_that_do_not_fit(patch, stride):
    with pytest.raises(ConfigError, match=rf"data\.patch={patch} .*data\.stride={stride}|every"):
        patches(np.zeros((28, 28, 1), np.uint8), patch, stride)


def idx(values):
    header = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape)
    return gzip.compress(header + values.tobytes(), mtime=0)


def fashion(n=8, labels=None, part="train", seed=0):
    """The two files of a part, in bytes."""
    images = np.random.default_rng(seed).integers(0, 256, (n, 28, 28), np.uint8)
    labels = np.arange(n, dtype=np.uint8) % 10 if labels is None else labels
    files = {
        f"{FOLDER}/{part}-images-idx3-ubyte.gz": idx(images),
        f"{FOLDER}/{part}-labels-idx1-ubyte.gz": idx(labels),
    }
    return files, images, labels


def members(files):
    return {name: lambda data=data: data for name, data in files.items()}


def test_fashion_reads_idx():
    files, images, labels = fashion()
    found = read_part(members(files), "train")
    np.testing.assert_array_equal(found[0], images)
    np.testing.assert_array_equal(found[1], labels)


@pytest.mark.parametrize("which", ["images-idx3", "labels-idx1"])
def test_fashion_truncated_or_corrupt(which):
    files, images, labels = fashion()
    name = f"{FOLDER}/train-{which}-ubyte.gz"
    whole = files[name]
    harmless = 0
    for at in [*range(0, len(whole), max(1, len(whole) // 40)), len(whole) - 1]:
        with pytest.raises(DataError, match=f"{name} (is|holds)"):
            read_part(members({**files, name: whole[:at]}), "train")
        flipped = bytearray(whole)
        flipped[at] ^= 16
        try:
            found = read_part(members({**files, name: bytes(flipped)}), "train")
        except DataError:
            continue
        harmless += 1  # time and system of gzip, bits that fill up a byte
        np.testing.assert_array_equal(found[0], images)
        np.testing.assert_array_equal(found[1], labels)


def test_fashion_that_does_not_fit():
    files, images, labels = fashion()
    pictures, answers = files
    for name, data, message in (
        (pictures, idx(images[:, :, 0]), "no idx file of unsigned bytes in 3 dimensions"),
        (answers, gzip.compress(b"\0\0\x0d\1\0\0\0\1\0"), "no idx file of unsigned bytes in 1 "),
        (answers, idx(labels[:-1]), "8 pictures but 7 labels"),
        (pictures, gzip.compress(gzip.decompress(idx(images))[:-1]), "holds 6271 bytes for shape"),
        (
            pictures,
            gzip.compress(gzip.decompress(idx(images)) + b"!"),
            "holds 6273 bytes for shape",
        ),
    ):
        with pytest.raises(DataError, match=message):
            read_part(members({**files, name: data}), "train")
    del files[answers]
    with pytest.raises(DataError, match=r"has no file '.*train-labels-idx1"):
        read_part(members(files), "train")


def test_fashion_label_outside_the_classes():
    labels = np.array([0, 9, 10, 3], np.uint8)
    with pytest.raises(
        DataError, match="Fashion-MNIST train, record 2: label 10 is outside the 10 "
    ):
        read_part(members(fashion(4, labels)[0]), "train")


def test_fashion_splits(tmp_path, monkeypatch, capsys):
    train, images, _ = fashion(9)
    test, held_out, _ = fashion(4, part="t10k", seed=1)
    # An archive that the user brought, of another version than the recorded one.
    write(tmp_path / "packages" / "dataset-fashion-mnist_2_all.deb", {**train, **test})
    with pytest.raises(DataError, match="has 9 pictures, of which the last 5000 are held out"):
        prepare("fashion_mnist", tmp_path)
    monkeypatch.setattr(fashion_mnist, "_VALID", 2)
    builder = prepare("fashion_mnist", tmp_path)
    assert "dataset-fashion-mnist_2_all.deb: its reader was written" in capsys.readouterr().out
    assert builder.info.features["label"].names == list(CLASSES)
    expected = {"train": images[:7], "valid": images[7:], "test": held_out}
    for split, wanted in expected.items():
        examples = list(builder.as_data_source(split))
        found = {example["image"].tobytes(): int(example["label"]) for example in examples}
        assert found == {
            image.tobytes(): i + 7 * (split == "valid") for i, image in enumerate(wanted)
        }


def digits(n=3):
    """Pictures [10 n 28 28] of 0 to 255 and their files."""
    images = np.random.default_rng(0).integers(0, 256, (10, n, 28, 28), np.uint8)
    numbers = {digit: (images[digit].ravel() / 255).round(4).tolist() for digit in range(10)}
    return images, {f"package/src/digits/{d}.json": {"data": x} for d, x in numbers.items()}


def in_json(files):
    return {name: json.dumps(value).encode() for name, value in files.items()}


def test_digits():
    images, files = digits()
    found = list(read_digits(members(in_json(files))))
    assert [label for _, label in found] == [digit for digit in range(10) for _ in range(3)]
    np.testing.assert_array_equal(
        np.stack([image for image, _ in found]), images.reshape(30, 28, 28)
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda data: data[:-1],
            r"4\.json, record 2: 783 numbers are left over; a picture takes 784",
        ),
        (
            lambda data: [*data[:800], 1.5, *data[801:]],
            r"4\.json, record 1: a pixel is not between",
        ),
        (
            lambda data: [*data[:800], float("nan"), *data[801:]],
            r"record 1: a pixel is not between",
        ),
        (lambda data: ["x", *data[1:]], r"4\.json is not the JSON of numbers"),
    ],
)
def test_digits_that_do_not_fit(damage, message):
    _, files = digits()
    entry = files["package/src/digits/4.json"]
    entry["data"] = damage(entry["data"])
    with pytest.raises(DataError, match=message):
        list(read_digits(members(in_json(files))))


def test_digits_files_that_are_damaged():
    files = in_json(digits()[1])
    name = "package/src/digits/7.json"
    for data in (files[name][:-9], b"{}", b"[1]", b"\xff"):
        with pytest.raises(DataError, match=r"7\.json is not the JSON of numbers"):
            list(read_digits(members({**files, name: data})))
    del files[name]
    with pytest.raises(DataError, match=r"package mnist has no file 'package/src/digits/7\.json'"):
        list(read_digits(members(files)))


def test_equal_digits_are_on_one_side():
    images = np.random.default_rng(0).integers(0, 256, (2000, 28, 28), np.uint8)
    splits = [split_of_pixels(image) for image in images]
    assert splits == [split_of_pixels(image.copy()) for image in images]
    share = {split: splits.count(split) / len(splits) for split in ("train", "valid", "test")}
    assert share["train"] == pytest.approx(0.8, abs=0.03)
    assert share["valid"] == pytest.approx(0.1, abs=0.02)
    assert share["test"] == pytest.approx(0.1, abs=0.02)


def test_features_of_cifar10_are_read(tmp_path):
    """TFDS's own features, random pictures of its mock, written once and read as any run does."""
    with tfds.testing.mock_data(num_examples=12):
        known = tfds.builder("cifar10", file_format="array_record")
        features = known.info.features
        source = known.as_data_source("train")
        examples = [source[i] for i in range(12)]
    builder = TinyPictures(features, examples, data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare(download_dir=tmp_path / "downloads")
    records = open_records(find_prepared("tfds:tiny_pictures", tmp_path))
    fields = find_fields("classify", records.features)
    assert (fields.input, fields.kind, fields.label, len(fields.classes)) == (
        "image",
        "image",
        "label",
        10,
    )
    found = list(records.read("train"))
    assert len(found) == 12
    wanted = {example["image"].tobytes(): int(example["label"]) for example in examples}
    for record in found:
        assert record["image"].shape == (32, 32, 3)
        assert wanted[record["image"].tobytes()] == int(record["label"])
        assert patches(record["image"], 4, 4).shape == (64, 48)
