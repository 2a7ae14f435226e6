import dataclasses

import numpy as np
import pytest

from moe.data.cache import write_sums
from moe.data.sources.types import Document, Source
from moe.data.store import cached_tokenizer, document_keys, open_tokens
from moe.data.tokenizers import byte_tokenizer
from moe.errors import DataError


def source(documents, before=lambda split: None, identity="one"):
    """A source that counts how often it is read and can act in the middle of it."""
    reads = []

    def read(split):
        reads.append(split)
        before(split)
        yield from documents[split]

    return Source("test", identity, read), reads


DOCUMENTS = {
    "train": [Document("abc", "b"), Document("", "b"), Document("é", "a")],
    "valid": [Document("x", "b")],
    "test": [Document("yz", "a")],
}


def test_layout(tmp_path):
    store = open_tokens(source(DOCUMENTS)[0], tmp_path, byte_tokenizer())
    train = store.splits["train"]
    assert train.ids[:].tolist() == [256, 97, 98, 99, 256, 0xC3, 0xA9, 256]
    assert train.ids.dtype == np.uint16
    assert train.starts.tolist() == [0, 4, 7]
    assert store.domains == ("a", "b")
    assert train.domain.tolist() == [1, 0]
    assert store.counts["train"] == {"a": (1, 3, 2), "b": (1, 4, 3)}
    assert store.counts["valid"] == {"a": (0, 0, 0), "b": (1, 2, 1)}


def test_tokenised_once(tmp_path):
    text, reads = source(DOCUMENTS)
    first = open_tokens(text, tmp_path, byte_tokenizer())
    assert len(reads) == 3
    assert open_tokens(text, tmp_path, byte_tokenizer()).fingerprint == first.fingerprint
    assert len(reads) == 3


def test_bpe_is_trained_once_and_on_train_only(tmp_path):
    text, reads = source(DOCUMENTS)
    first = cached_tokenizer(text, tmp_path, "bpe", 300)
    assert cached_tokenizer(text, tmp_path, "bpe", 300).to_json() == first.to_json()
    assert reads == ["train"]


def test_fingerprint_is_of_the_content(tmp_path):
    same = open_tokens(source(DOCUMENTS, identity="two")[0], tmp_path, byte_tokenizer())
    base = open_tokens(source(DOCUMENTS)[0], tmp_path, byte_tokenizer())
    assert base.fingerprint == same.fingerprint
    changes = [
        {"test": [Document("yZ", "a")]},
        {"train": DOCUMENTS["train"][::-1]},
        {"train": [Document("abc", "a"), Document("é", "a")]},
        {"valid": [Document("x", "c")]},
        {
            split: [d._replace(domain=d.domain * 2) for d in found]
            for split, found in DOCUMENTS.items()
        },
    ]
    for i, change in enumerate(changes):
        other = source(DOCUMENTS | change, identity=f"change {i}")[0]
        assert open_tokens(other, tmp_path, byte_tokenizer()).fingerprint != base.fingerprint
    same_ids = dataclasses.replace(byte_tokenizer(), kind="other")
    found = open_tokens(source(DOCUMENTS)[0], tmp_path, same_ids)
    assert found.splits["train"].ids[:].tolist() == base.splits["train"].ids[:].tolist()
    assert found.fingerprint != base.fingerprint


def test_two_writers_at_once(tmp_path):
    """The second starts and ends while the first is at work: the first takes what is there."""
    inner, _ = source(DOCUMENTS)
    done = []

    def other_process(split):
        if split == "test":
            done.append(open_tokens(inner, tmp_path, byte_tokenizer()))

    outer, _ = source(DOCUMENTS, before=other_process)
    store = open_tokens(outer, tmp_path, byte_tokenizer())
    assert store.fingerprint == done[0].fingerprint
    (path,) = (tmp_path / "tokens").iterdir()  # nothing unfinished is left
    assert path.stat().st_mode & 0o777 == 0o755  # others may share it


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_empty_split_leaves_nothing(tmp_path, split):
    text, _ = source(DOCUMENTS | {split: [Document("", "a")]})
    with pytest.raises(DataError, match=f"The {split} split of 'test' has no text"):
        open_tokens(text, tmp_path / "new" / "data", byte_tokenizer())
    assert not list(tmp_path.iterdir())


def test_failure_keeps_what_was_there(tmp_path):
    open_tokens(source(DOCUMENTS)[0], tmp_path, byte_tokenizer())
    before = sorted(tmp_path.rglob("*"))
    text, _ = source(DOCUMENTS | {"test": []}, identity="two")
    with pytest.raises(DataError):
        open_tokens(text, tmp_path, byte_tokenizer())
    assert sorted(tmp_path.rglob("*")) == before


def test_directory_that_cannot_be_written(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(DataError, match=r"Cannot write to .*data\.directory"):
        open_tokens(source(DOCUMENTS)[0], blocked / "data", byte_tokenizer())


def test_tokenizers_keys_and_tokens_are_what_was_written(tmp_path):
    """Changed so that they can be read as well as before."""
    text, _ = source(DOCUMENTS)
    cached_tokenizer(text, tmp_path, "characters", None)
    document_keys(text, tmp_path)
    for name, place in (("tokenizer.json", '"abc'), ("train.key.npy", "")):
        (path,) = tmp_path.glob(f"tokens/*/{name}")
        data = bytearray(path.read_bytes())
        data[data.index(place.encode()) + 3 if place else -1] ^= 7  # "abd"
        path.write_bytes(data)
    with pytest.raises(DataError, match=r"is damaged: tokenizer\.json, bytes 0 to"):
        cached_tokenizer(text, tmp_path, "characters", None)
    with pytest.raises(DataError, match=r"is damaged: train\.key\.npy, bytes 0 to"):
        document_keys(text, tmp_path)
    open_tokens(text, tmp_path, byte_tokenizer())
    (path,) = tmp_path.glob("tokens/*/test.ids")
    path.write_bytes(bytes([*path.read_bytes()[:-1], 0]))
    with pytest.raises(DataError, match=r"is damaged: test\.ids, bytes 0 to 8"):
        open_tokens(text, tmp_path, byte_tokenizer())


@pytest.mark.parametrize("file", ["train.ids", "valid.starts.npy", "test.domain.npy"])
def test_files_that_disagree_are_damage_whatever_their_checksums(tmp_path, file):
    text, _ = source(DOCUMENTS)
    open_tokens(text, tmp_path, byte_tokenizer())
    (path,) = tmp_path.glob(f"tokens/*/{file}")
    if path.suffix == ".npy":
        np.save(path, np.append(np.load(path), np.load(path)[-1:]))
    else:
        path.write_bytes(path.read_bytes() + b"\0\1")
    write_sums(path.parent)
    with pytest.raises(DataError, match=rf"damaged: .*the sizes of {file.partition('.')[0]}\."):
        open_tokens(text, tmp_path, byte_tokenizer())


@pytest.mark.parametrize("damage", ["cut", "empty", "missing", "meta", "domain"])
def test_damaged_files_are_noticed(tmp_path, damage):
    text, _ = source(DOCUMENTS)
    open_tokens(text, tmp_path, byte_tokenizer())
    (path,) = (tmp_path / "tokens").iterdir()
    ids = path / "train.ids"
    if damage == "cut":
        ids.write_bytes(ids.read_bytes()[:-4])
    elif damage == "empty":
        ids.write_bytes(b"")
    elif damage == "missing":
        ids.unlink()
    elif damage == "domain":
        np.save(path / "train.domain.npy", np.zeros(9, np.int32))
    else:
        (path / "meta.json").write_text("{")
    with pytest.raises(DataError, match=r"damaged.*Delete that directory"):
        open_tokens(text, tmp_path, byte_tokenizer())
