import json

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from moe.data.tokenizers import bpe_tokenizer, from_json, make_tokenizer, train_bpe
from moe.errors import ConfigError, DataError

CORPUS = [
    "the cat sat on the mat, the other cat sat on the other mat\n" * 3,
    "def f(x):\n    return x\n",
]
TOKENIZERS = [make_tokenizer("bytes", None, []), make_tokenizer("bpe", 300, CORPUS)]
each = pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["bytes", "bpe"])


@each
@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.text(), max_size=4))
def test_any_text_comes_back(tokenizer, texts):
    encoded = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    for text, ids in zip(texts, encoded, strict=True):
        assert ids.dtype == np.int32
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
        assert tokenizer.boundary not in ids


@each
@pytest.mark.parametrize(
    "text",
    ["<boundary>", "<|endoftext|> [UNK] </s>", "\x00\x1b\r\n", "e\u0301 \u2028 \U0001f600", "Ġa Ċ"],
)
def test_text_that_looks_special_comes_back(tokenizer, text):
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == text
    assert tokenizer.boundary not in ids


@each
def test_json_makes_the_same_tokenizer(tokenizer):
    again = from_json(tokenizer.to_json())
    assert (again.vocab_size, again.boundary) == (tokenizer.vocab_size, tokenizer.boundary)
    np.testing.assert_array_equal(again.token_bytes, tokenizer.token_bytes)
    for ours, theirs in zip(
        tokenizer.encode_batch(CORPUS), again.encode_batch(CORPUS), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


@each
def test_boundary_and_unused_ids_stand_for_no_bytes(tokenizer):
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes[tokenizer.boundary] == 0
    assert not tokenizer.token_bytes[tokenizer.boundary :].any()
    assert tokenizer.token_bytes[: tokenizer.boundary].all()
    assert tokenizer.decode([tokenizer.boundary, tokenizer.vocab_size - 1]) == ""
    assert tokenizer.token_text(tokenizer.boundary) == "\u2404"


def test_bytes_are_the_utf8_bytes():
    tokenizer = TOKENIZERS[0]
    assert tokenizer.encode_batch(["aé"])[0].tolist() == [0x61, 0xC3, 0xA9]
    assert (tokenizer.vocab_size, tokenizer.boundary) == (320, 256)
    assert [tokenizer.token_text(i) for i in (0x61, 0xC3)] == ["a", "\\xc3"]
    assert tokenizer.decode([0xC3, 0x61]) == "\ufffda"


def test_bpe_learns_and_is_deterministic():
    again = train_bpe(CORPUS, 300)
    assert again.to_json() == TOKENIZERS[1].to_json()
    (ids,) = again.encode_batch([CORPUS[0]])
    assert len(ids) < len(CORPUS[0]) / 2
    assert " the" in [again.token_text(int(i)) for i in ids]


def test_a_small_corpus_leaves_ids_unused():
    tokenizer = train_bpe(["ab ab ab"], 1024)
    assert tokenizer.boundary < 300
    assert tokenizer.vocab_size == len(tokenizer.token_bytes) == 1024


@pytest.mark.parametrize("size", [None, 0, 256])
def test_vocabulary_too_small_for_bytes(size):
    with pytest.raises(ConfigError, match=f"data.vocab_size={size}.*at least 257"):
        train_bpe(CORPUS, size)
    assert train_bpe(CORPUS, 257).boundary == 256


def test_unknown_tokenizer_names_the_nearest():
    with pytest.raises(ConfigError, match=r"'byte'.*'bytes'"):
        make_tokenizer("byte", None, [])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": "words"}', '{"kind": "bpe"}'])
def test_damaged_json_is_refused(text):
    with pytest.raises(DataError):
        from_json(text)


def test_model_larger_than_its_vocabulary_is_refused():
    model = json.dumps(TOKENIZERS[1].model)
    with pytest.raises(DataError, match="do not fit vocab_size=100"):
        bpe_tokenizer(model, 100)


def test_numbers_are_spelled_digit_by_digit():
    tokenizer = make_tokenizer("bpe", 300, ["year 1999, year 1999, year 1998"] * 20)
    ids = tokenizer.encode_batch(["in 1999 or 2001"])[0]
    assert tokenizer.decode(ids) == "in 1999 or 2001"
    spelled = [tokenizer.token_text(int(i)) for i in ids]
    assert [piece for piece in spelled if piece.isdigit()] == list("19992001")
