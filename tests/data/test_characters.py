"""The `characters` tokenizer."""

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from moe.data.tokenizers import character_tokenizer, from_json, make_tokenizer, train_characters
from moe.errors import ConfigError, DataError

CORPUS = ["příliš žluťoučký kůň", "úpěl ďábelské ódy", "\N{GRINNING FACE} a \u0301"]
TOKENIZER = make_tokenizer("characters", None, CORPUS)
KNOWN = sorted(set("".join(CORPUS)))


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.text(st.sampled_from(KNOWN)), max_size=4))
def test_known_characters_come_back(texts):
    encoded = TOKENIZER.encode_batch(texts)
    assert [TOKENIZER.decode(ids) for ids in encoded] == texts
    for text, ids in zip(texts, encoded, strict=True):
        assert ids.dtype == np.int32
        assert len(ids) == len(text)
        assert TOKENIZER.token_bytes[ids].sum() == len(text.encode())


def test_ids_are_in_order_of_code_points():
    assert TOKENIZER.encode_batch(["".join(KNOWN)])[0].tolist() == list(range(len(KNOWN)))
    assert TOKENIZER.unknown == len(KNOWN)
    assert TOKENIZER.boundary == len(KNOWN) + 1
    assert TOKENIZER.vocab_size == 64
    assert [TOKENIZER.token_text(i) for i in (0, TOKENIZER.boundary, 63)] == [
        " ",
        "\u2404",
        "\ufffd",
    ]


@pytest.mark.parametrize("other", ["Q", "\x00", "\ufffd", "\U0010ffff"])
def test_unknown_characters_show(other):
    (ids,) = TOKENIZER.encode_batch([f"k{other}a{other}"])
    assert (ids == TOKENIZER.unknown).tolist() == [False, True, False, True]
    assert TOKENIZER.decode(ids) == "k\ufffda\ufffd"
    assert TOKENIZER.decode([TOKENIZER.boundary, 63]) == ""
    assert not TOKENIZER.token_bytes[TOKENIZER.boundary :].any()


def test_half_a_surrogate_pair_is_unknown():
    (ids,) = TOKENIZER.encode_batch(["k" + chr(0xD800)])
    assert ids.tolist() == [KNOWN.index("k"), TOKENIZER.unknown]


def test_json_makes_the_same_tokenizer():
    again = from_json(TOKENIZER.to_json())
    assert again.to_json() == TOKENIZER.to_json()
    assert (again.vocab_size, again.boundary, again.unknown) == (64, len(KNOWN) + 1, len(KNOWN))
    texts = [*CORPUS, "Q"]
    pairs = zip(TOKENIZER.encode_batch(texts), again.encode_batch(texts), strict=True)
    for ours, theirs in pairs:
        np.testing.assert_array_equal(ours, theirs)


def test_of_too_many_the_most_frequent_are_kept():
    tokenizer = train_characters(["ddd", "cc b", "aa"], 5)  # three of them; a goes before c
    assert tokenizer.model == {"characters": "acd"}
    assert (tokenizer.unknown, tokenizer.boundary, tokenizer.vocab_size) == (3, 4, 64)
    assert tokenizer.decode(tokenizer.encode_batch(["abcd"])[0]) == "a\ufffdcd"


def test_rows_are_a_multiple_of_64():
    sizes = {n: character_tokenizer("".join(map(chr, range(300, 300 + n)))) for n in (62, 63)}
    assert [sizes[n].vocab_size for n in (62, 63)] == [64, 128]


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match=r"data\.vocab_size=2: characters need"):
        train_characters(CORPUS, 2)
    with pytest.raises(DataError, match="no text to take them from"):
        train_characters(["", ""], None)
    with pytest.raises(ConfigError, match=r"'character'.*'characters'"):
        make_tokenizer("character", None, [])
    for characters in ("", "ba", "aab"):
        with pytest.raises(DataError, match="no distinct characters in order"):
            character_tokenizer(characters)
    with pytest.raises(DataError, match="no saved tokenizer"):
        from_json('{"kind": "characters", "model": null}')
