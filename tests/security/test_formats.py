"""What a run reads is numbers and JSON: a file that could carry code raises, and is not run."""

import json
from pathlib import Path

import numpy as np
import pytest

from moe.data import archives, store
from moe.data.cache import write_sums
from moe.data.examples import open_examples
from moe.data.features import find_fields
from moe.data.sources.types import Document, Source
from moe.data.tokenizers import byte_tokenizer
from moe.errors import DataError
from moe.evaluation import kept_choices
from tests.data import tiny_examples


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def text_source() -> Source:
    return Source("x", "x", lambda split: iter([Document(f"{split} text", "d", "k")]))


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "canary"


def objects(canary: Path) -> np.ndarray:
    return np.array([Canary(canary)], dtype=object)


def test_the_canary_sings(tmp_path, canary):
    np.save(tmp_path / "x.npy", objects(canary), allow_pickle=True)
    np.load(tmp_path / "x.npy", allow_pickle=True)
    assert canary.exists()


@pytest.mark.parametrize("file", ["train.starts.npy", "valid.domain.npy"])
def test_token_files(tmp_path, canary, file):
    store.open_tokens(text_source(), tmp_path, byte_tokenizer())
    (path,) = tmp_path.glob(f"tokens/*/{file}")
    np.save(path, objects(canary), allow_pickle=True)
    write_sums(path.parent)  # who changes files can change their checksums
    with pytest.raises(DataError, match="is damaged"):
        store.open_tokens(text_source(), tmp_path, byte_tokenizer())
    assert not canary.exists()


def test_the_keys_of_documents(tmp_path, canary):
    store.document_keys(text_source(), tmp_path)
    (path,) = tmp_path.glob("tokens/*/train.key.npy")
    np.save(path, objects(canary), allow_pickle=True)
    write_sums(path.parent)  # who changes files can change their checksums
    with pytest.raises(DataError, match="damaged"):
        store.document_keys(text_source(), tmp_path)
    assert not canary.exists()


@pytest.mark.parametrize("dtype", ["O", "object", "V8", "M8[s]", "U4", "f8,O", "S2", "float16"])
def test_token_files_of_a_type_that_is_no_number(tmp_path, dtype):
    store.open_tokens(text_source(), tmp_path, byte_tokenizer())
    (path,) = tmp_path.glob("tokens/*/meta.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": dtype}))
    write_sums(path.parent)
    with pytest.raises(DataError, match="is damaged"):
        store.open_tokens(text_source(), tmp_path, byte_tokenizer())


def test_kept_choices(tmp_path, canary):
    (tmp_path / "choices").mkdir()
    path = tmp_path / "choices" / "valid-1.npz"
    np.savez(path, expert=objects(canary), num_experts=np.int32(2), allow_pickle=True)
    assert kept_choices.read(tmp_path, "valid") == []
    assert not canary.exists()


def test_kept_choices_that_would_fill_memory(tmp_path):
    bomb = np.zeros((1, 1, 1, archives._ALWAYS + 1), np.int8)
    (tmp_path / "choices").mkdir()
    np.savez_compressed(tmp_path / "choices" / "valid-1.npz", expert=bomb, num_experts=np.int32(2))
    assert kept_choices.read(tmp_path, "valid") == []
    np.savez_compressed(
        tmp_path / "choices" / "valid-1.npz", expert=bomb[..., :9], num_experts=np.int32(2)
    )
    assert len(kept_choices.read(tmp_path, "valid")) == 1


def test_encoded_examples(tmp_path, canary):
    records = tiny_examples.pairs()
    fields = find_fields("seq2seq", records.features)
    open_examples(records, fields, tmp_path, byte_tokenizer())
    for name in ("train.domain.npy", "train.input.starts.npy"):
        (path,) = tmp_path.glob(f"examples/*/{name}")
        before = path.read_bytes()
        np.save(path, objects(canary), allow_pickle=True)
        write_sums(path.parent)
        with pytest.raises(DataError, match="is damaged"):
            open_examples(records, fields, tmp_path, byte_tokenizer())
        path.write_bytes(before)
    assert not canary.exists()
