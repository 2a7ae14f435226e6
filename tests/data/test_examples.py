"""From records to rows: what stands where, what counts, and what is refused."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from moe.data.cache import write_sums
from moe.data.example_data import example_data
from moe.data.features import find_fields
from moe.data.sources.shards import Shards
from moe.errors import CheckpointError, ConfigError, DataError
from moe.setup import data_notes
from tests.data import tiny_examples as tiny

B = 256  # the boundary of bytes


def opened(records, root, task, **how):
    how = {"batch_size": 2, "sequence_length": 16, "seed": 0} | how
    return example_data(records, task=task, root=root, **how)


def row_of(data, split, i):
    rows = [row for part in data.rows(split) for row in (part[j] for j in range(len(part)))]
    return next(row for row in rows if row.index == i)


def test_a_row_of_seq2seq(tmp_path):
    data = opened(tiny.pairs(), tmp_path, "seq2seq", prefix=True, batch_size=1)
    row = row_of(data, "test", 0)
    n, m = len("six"), len("seis")
    ids = [B, *b"six", B, *b"seis"]
    assert row.tokens.tolist() == ids + [0] * (16 - len(ids))
    assert row.valid.sum() == len(ids)
    assert row.prefix.sum() == n + 2
    assert row.targets[row.scored].tolist() == [*b"seis", B]
    assert np.flatnonzero(row.scored).tolist() == list(range(n + 1, n + m + 2))
    assert (row.targets[: len(ids) - 1] == row.tokens[1 : len(ids)]).all()
    assert row.segments.tolist() == [1] * len(ids) + [0] * (16 - len(ids))
    assert data.references("test", [0, 1]) == ["seis", "siete"]
    assert data.domains == ("even", "odd")
    assert opened(tiny.pairs(), tmp_path, "seq2seq", batch_size=1).rows("test")[0][0].prefix is None


@pytest.mark.parametrize("length", [4, 7, 9, 12])
def test_a_source_that_is_too_long_loses_its_beginning(tmp_path, length):
    data = opened(tiny.pairs(), tmp_path, "seq2seq", batch_size=1, sequence_length=length)
    row = row_of(data, "test", 1)
    target = [*b"siete"][: length - 2]
    room = length - 2 - len(target)
    source = [*b"seven"][max(0, 5 - room) :] if room else []
    ids = [B, *source, B, *target]
    assert row.tokens[row.valid].tolist() == ids
    assert row.scored.sum() == len(target) + 1
    assert row.targets[row.scored][:-1].tolist() == target
    assert data.left_out("test") == {"too_long": 0, "cut": int(length < 12), "bad": 0} | (
        {"cut": int(length < 9) + int(length < 12)}
    )


def test_too_long_examples_are_skipped_and_counted_or_refused(tmp_path):
    data = opened(
        tiny.pairs(), tmp_path, "seq2seq", batch_size=1, sequence_length=12, too_long="skip"
    )
    assert data.num_rows("train") == 2
    assert data.left_out("train") == {"too_long": 1, "cut": 0, "bad": 0}
    with pytest.raises(DataError, match=r"record 2 of train .*data\.too_long=skip"):
        opened(tiny.pairs(), tmp_path, "seq2seq", sequence_length=12, too_long="error")


def test_a_place_knows_whether_long_examples_are_left_out(tmp_path):
    def batches(too_long):
        how = {"too_long": too_long, "batch_size": 1, "sequence_length": 40}
        return opened(tiny.pairs(), tmp_path, "seq2seq", **how).train_batches()

    state = batches("truncate").get_state()
    assert batches("error").set_state(state) == {}
    with pytest.raises(CheckpointError, match="too_long was 'keep' and is now 'skip'"):
        batches("skip").set_state(state)


def test_a_row_of_match(tmp_path):
    data = opened(tiny.pairs(), tmp_path, "match", batch_size=1)
    row = row_of(data, "test", 0)
    assert row.tokens[row.valid].tolist() == [B, *b"six", B, *b"seis"]
    assert row.segments[row.valid].tolist() == [1] * 4 + [2] * 5
    assert row.positions[row.valid].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4]
    short = row_of(
        opened(tiny.pairs(), tmp_path, "match", batch_size=1, sequence_length=6), "test", 1
    )
    assert short.segments.tolist() == [1, 1, 1, 2, 2, 2]


def test_rows_of_pictures(tmp_path):
    data = opened(tiny.pictures(), tmp_path, "classify", sequence_length=4, patch=4)
    row = row_of(data, "train", 3)
    assert row.frames.shape == (4, 16)
    np.testing.assert_allclose(row.frames, 203 / 127.5 - 1, rtol=1e-6)
    assert (row.label, row.index) == (1, 3)
    assert row.modality.tolist() == [1] * 4
    assert row.valid.all()
    assert data.classes == ("dark", "bright")
    assert data.frame_shape == (4, 16)
    pair = opened(tiny.pictures(), tmp_path, "match", sequence_length=12, patch=4)
    row = row_of(pair, "train", 0)
    assert row.segments.tolist() == [1] * 4 + [2] * 5 + [0] * 3
    assert row.modality.tolist() == [1] * 4 + [0] * 8
    caption = opened(tiny.pictures(), tmp_path, "seq2seq", sequence_length=12, patch=4, prefix=True)
    row = row_of(caption, "train", 0)
    assert row.tokens[row.valid].tolist() == [0] * 4 + [B, *b"dark"]
    assert row.prefix.sum() == 5
    assert row.targets[row.scored].tolist() == [*b"dark", B]


@pytest.mark.parametrize("split", ["train", "test"])
def test_pictures_of_several_sizes_are_refused(tmp_path, split):
    even, odd = tiny.pictures(side=8), tiny.pictures(side=12)

    def rows(name):
        other = odd if name == split else even
        for i, (a, b) in enumerate(zip(even.read(name), other.read(name), strict=True)):
            yield b if i == 1 else a

    image = tfds.features.Image(shape=(None, None, 1))
    mixed = even._replace(features=even.features | {"image": image}, read=rows)
    with pytest.raises(DataError, match=rf"The pictures of {split} have several sizes: resize"):
        opened(mixed, tmp_path, "classify", sequence_length=4, patch=4)


def test_rows_of_sound(tmp_path):
    data = opened(
        tiny.sounds(), tmp_path, "ctc", tokenizer="characters", sequence_length=10, mels=8
    )
    row = row_of(data, "valid", 0)
    assert row.frames.shape == (40, 8)
    assert row.valid.sum() == 5  # 18 frames of 10 ms, four to a position
    assert data.tokenizer.decode(row.targets[row.scored]) == "abba"
    assert row.scored.sum() == 4
    assert not row.frames[18:].any()
    with pytest.raises(DataError, match=r"record 0 of train and 3 others do not fit"):
        opened(tiny.sounds(text="aabbaa"), tmp_path, "ctc", sequence_length=10, mels=8)
    assert opened(tiny.sounds(), tmp_path, "classify", sequence_length=10, mels=8).classes == (
        "a",
        "b",
    )
    with pytest.raises(DataError, match=r"8000 samples a second, and data\.sample_rate=16000"):
        opened(tiny.sounds(), tmp_path, "ctc", sample_rate_wanted=16000)


def test_corrupted_inputs_are_others_and_the_same_each_time(tmp_path):
    plain = opened(tiny.pairs(), tmp_path, "seq2seq", batch_size=1, sequence_length=40)
    made = [
        opened(
            tiny.pairs(),
            tmp_path,
            "seq2seq",
            batch_size=1,
            sequence_length=40,
            corruption="typos:0.9",
        )
        for _ in range(2)
    ]
    one, two = (row_of(data, "train", 2) for data in made)
    assert one.tokens.tolist() == two.tokens.tolist()
    assert one.tokens.tolist() != row_of(plain, "train", 2).tokens.tolist()
    assert one.targets[one.scored].tolist() == [*b"tres y cuatro", B]
    with pytest.raises(ConfigError, match="kind:severity"):
        opened(tiny.pairs(), tmp_path, "seq2seq", corruption="typos")


def bad_pairs(**changes):
    rows = {split: list(found) for split, found in tiny.PAIRS.items()}
    made = tiny.pairs(rows)
    good = {split: list(made.read(split)) for split in rows}
    good["train"][1] = good["train"][1] | changes
    return made._replace(read=lambda split: iter(good[split]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": b"\xff"}, r"source of record 1 of train is not UTF-8 at byte 0"),
        ({"target": ""}, r"target of record 1 of train is empty"),
    ],
)
def test_bad_records_are_named_or_counted(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        opened(bad_pairs(**changes), tmp_path, "seq2seq", batch_size=1)
    data = opened(bad_pairs(**changes), tmp_path, "seq2seq", batch_size=1, skip_bad=1)
    assert data.num_rows("train") == 2
    assert data.left_out("train")["bad"] == 1
    with pytest.raises(DataError, match=message):  # what another budget has made does not count
        opened(bad_pairs(**changes), tmp_path, "seq2seq", batch_size=1)


def test_a_bad_record_of_a_data_set_is_named_with_its_file(tmp_path):
    records = bad_pairs(target="")

    class Found(Shards):
        def __init__(self, split):
            self._split = split

        def __iter__(self):
            return iter(records.read(self._split))

        def where(self, number):
            return f"record {number} of {self._split}.array_record"

    message = r"target of record 1 of train is empty\. It is record 1 of train\.array_record\."
    with pytest.raises(DataError, match=message):
        opened(records._replace(read=Found), tmp_path, "seq2seq", batch_size=1)


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_a_split_without_examples_is_refused(tmp_path, split):
    records = tiny.pairs({**tiny.PAIRS, split: []})
    with pytest.raises(DataError, match=f"the split {split} has no example"):
        opened(records, tmp_path, "seq2seq", batch_size=1)
    assert not any(tmp_path.iterdir())


def test_the_fingerprint_of_examples_is_of_all_that_is_read(tmp_path):
    """Where examples end, which class and domain each has, and how domains are called."""
    features = {"text": tfds.features.Text(), "domain": tfds.features.Text()}
    features["label"] = tfds.features.ClassLabel(names=["x", "y"])

    def fingerprint(texts=("ab", "c"), labels=(0, 1), domains=("one", "two"), identity=None):
        rows = zip(texts, labels, domains, strict=True)
        train = [dict(zip(("text", "label", "domain"), row, strict=True)) for row in rows]
        identity = identity or f"{texts} {labels} {domains}"
        rest = {key: [{"text": "f", "label": 0, "domain": "one"}] for key in ("valid", "test")}
        records = tiny.records(features, {"train": train, **rest}, identity=identity)
        return opened(records, tmp_path, "classify", batch_size=1).fingerprint

    assert fingerprint(identity="a") == fingerprint(identity="b")
    changes = [
        {"texts": ("ab", "d")},
        {"texts": ("a", "bc")},
        {"labels": (0, 0)},
        {"domains": ("one", "one")},
        {"domains": ("one", "three")},
    ]
    assert len({fingerprint(**change) for change in ({}, *changes)}) == 6


def test_bad_pictures_and_labels(tmp_path):
    other = tiny.pictures(image=np.zeros((4, 8, 1), np.uint8))
    with pytest.raises(DataError, match=r"image of record 0 of train has the shape \(4, 8, 1\)"):
        opened(other, tmp_path, "classify", sequence_length=4)
    with pytest.raises(
        DataError, match=r"label of record 0 of train is 2, and there are 2 classes"
    ):
        opened(tiny.pictures(label=2), tmp_path, "classify", sequence_length=4)
    with pytest.raises(ConfigError, match=r"need exactly 4 positions"):
        opened(tiny.pictures(), tmp_path, "classify", sequence_length=5)
    with pytest.raises(ConfigError, match=r"cannot be cut into patches of data\.patch=3"):
        opened(tiny.pictures(), tmp_path, "classify", sequence_length=4, patch=3)


def test_encoded_once(tmp_path):
    first = opened(tiny.pairs(), tmp_path, "seq2seq", batch_size=1)
    made = tiny.pairs()
    again = opened(
        made._replace(read=lambda split: pytest.fail("read again")),
        tmp_path,
        "seq2seq",
        batch_size=1,
    )
    assert again.fingerprint == first.fingerprint
    other = tiny.pairs({**tiny.PAIRS, "test": [("eight", "ocho")]}, identity="1")
    assert opened(other, tmp_path, "seq2seq", batch_size=1).fingerprint != first.fingerprint
    for file in tmp_path.glob("examples/*/test.input"):
        file.write_bytes(b"1")
    with pytest.raises(DataError, match="damaged"):
        opened(made, tmp_path, "seq2seq", batch_size=1)


def test_examples_longer_than_their_index_are_damage_whatever_the_checksums(tmp_path):
    data = opened(tiny.pairs(), tmp_path, "seq2seq", batch_size=1)
    texts = "".join(s + t for s, t in tiny.PAIRS["train"]).encode()
    wanted = np.bincount([*texts], minlength=data.tokenizer.vocab_size)
    np.testing.assert_array_equal(data.token_counts(), wanted)
    (path,) = tmp_path.glob("examples/*/train.target")
    path.write_bytes(path.read_bytes() + b"\0\1")
    write_sums(path.parent)
    with pytest.raises(
        DataError, match=r"is damaged: .*the sizes of train\.target\.starts\.npy are 20 numbers"
    ):
        opened(tiny.pairs(), tmp_path, "seq2seq", batch_size=1)


def test_batches_of_examples_cover_a_split_once(tmp_path):
    data = opened(tiny.pictures(), tmp_path, "classify", sequence_length=4, batch_size=3)
    batches = list(data.eval_batches("test"))
    index = np.concatenate([batch.index for batch in batches])
    assert sorted(index.tolist()) == [-1, -1, 0, 1, 2, 3]
    assert batches[-1].valid.any(axis=1).sum() == 1
    train = data.train_batches()
    next(train)
    state = train.get_state()
    wanted = next(train).index
    np.testing.assert_array_equal(next(data.train_batches(start_state=state)).index, wanted)


@pytest.mark.parametrize(
    ("task", "how", "message"),
    [
        ("seq2seq", {"input_feature": "sourse"}, r"data\.input_feature='sourse' .*'source'"),
        ("seq2seq", {"target_feature": "label"}, "is no text"),
        ("ctc", {}, r"none of audio"),
        ("classify", {"input_feature": "label"}, "reads text or image or audio"),
        ("classify", {"label_feature": "source"}, "no ClassLabel"),
    ],
)
def test_features_that_do_not_fit(task, how, message):
    features = {
        "source": tfds.features.Text(),
        "target": tfds.features.Text(),
        "label": tfds.features.ClassLabel(num_classes=2),
    }
    with pytest.raises(ConfigError, match=message):
        find_fields(task, features, **how)


def test_other_names_of_features():
    features = {name: tfds.features.Text() for name in ("de", "en")}
    fields = find_fields("seq2seq", features, input_feature="de", target_feature="en")
    assert (fields.input, fields.target, fields.domain) == ("de", "en", None)


def test_what_a_row_does_not_hold_is_told(tmp_path):
    how = {"batch_size": 1, "sequence_length": 12}
    skipped = opened(tiny.pairs(), tmp_path, "seq2seq", too_long="skip", **how)
    assert data_notes(skipped) == [
        "train has examples that are left out or cut for a row: 1 too long."
    ]
    assert (
        data_notes(opened(tiny.pairs(), tmp_path, "seq2seq", batch_size=1, sequence_length=40))
        == []
    )
