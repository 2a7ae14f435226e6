"""Text to token ids and back: bytes, byte-level BPE, and characters.

All hold one extra token, the document boundary, which no text can produce: documents start with
it and end by predicting it. `decode(encode(text)) == text` for any text; of characters, for any
text of known ones.
"""

import collections
from collections.abc import Callable, Iterable, Sequence
import dataclasses
import json
from typing import Any

from jaxtyping import Int
import numpy as np
import tokenizers as hf

from moe.config import nearest
from moe.errors import ConfigError, DataError

_BYTES = 256
# Tokenizers that are learned from text, and the rules of it: another text for other rules.
LEARNED = {"bpe": "bpe, single digits", "characters": "characters"}
_LARGEST = 1 << 24  # tokens of a saved vocabulary
_LANES = 64  # small vocabularies are padded to a multiple, for sharding and matrix units
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # what an unknown character is decoded to


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer. Make it with `make_tokenizer` or `from_json`."""

    kind: str  # bytes, bpe or characters
    vocab_size: int  # rows of the embedding: ids are less than this, and some may be unused
    boundary: int  # the token between documents
    spelling: tuple[bytes, ...]  # the bytes of each id in use, the boundary left out
    encode_batch: Callable[[list[str]], list[np.ndarray]]  # int32 ids of each text, no boundaries
    model: dict[str, Any] | None  # of bpe: the library's JSON; of characters: which they are
    unknown: int | None = None  # of characters: the id of all that the training text lacks

    @property
    def token_bytes(self) -> Int[np.ndarray, " V"]:
        """UTF-8 bytes each token stands for, int32; 0 for the boundary and unused ids.

        Bits per byte: the nats of all targets, over the bytes of all targets, over ln 2.
        """
        sizes = np.zeros(self.vocab_size, np.int32)
        sizes[: len(self.spelling)] = [len(spelling) for spelling in self.spelling]
        return sizes

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of ids; boundary and unused ids are left out, broken UTF-8 replaced."""
        used = (self.spelling[int(i)] for i in ids if int(i) < len(self.spelling))
        return b"".join(used).decode("utf-8", errors="replace")

    def token_text(self, token: int) -> str:
        """Returns one token for display: part of a character as hex, the boundary as a symbol."""
        if token == self.boundary:
            return "\N{SYMBOL FOR END OF TRANSMISSION}"
        if token >= len(self.spelling):
            return "\N{REPLACEMENT CHARACTER}"
        return self.spelling[token].decode("utf-8", errors="backslashreplace")

    def to_json(self) -> str:
        """Returns everything `from_json` needs to make the same tokenizer."""
        return json.dumps({"kind": self.kind, "vocab_size": self.vocab_size, "model": self.model})


def byte_tokenizer() -> Tokenizer:
    """UTF-8 bytes: ids 0 to 255, the boundary 256, padded to 320."""

    def encode_batch(texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32) for text in texts]

    return Tokenizer(
        kind="bytes",
        vocab_size=-(-(_BYTES + 1) // _LANES) * _LANES,
        boundary=_BYTES,
        spelling=tuple(bytes([i]) for i in range(_BYTES)),
        encode_batch=encode_batch,
        model=None,
    )


def bpe_tokenizer(model: str, vocab_size: int) -> Tokenizer:
    """Byte-level byte-pair encoding (Sennrich 2016; on bytes, as GPT-2), by `tokenizers`.

    The boundary follows the learned tokens and is unknown to the library, so no text can spell it.

    Args:
        model: the library's tokenizer as JSON.
        vocab_size: rows of the embedding; ids beyond the boundary are unused.

    Raises:
        DataError: vocab_size does not hold the learned tokens and the boundary, or the JSON is not of
            byte-level BPE.
    """
    try:
        library = hf.Tokenizer.from_str(model)
    except Exception as error:  # the library raises nothing more special
        raise DataError(
            f"This is no tokenizer of the library: {model[:80]!r} ({error})."
        ) from error
    tokens = sorted(library.get_vocab().items(), key=lambda item: item[1])
    if vocab_size <= len(tokens):
        raise DataError(f"{len(tokens)} tokens and a boundary do not fit vocab_size={vocab_size}.")
    byte = {char: i for i, char in enumerate(_byte_characters())}
    ids = [i for _, i in tokens]
    strange = {char for token, _ in tokens for char in token} - byte.keys()
    if strange or ids != list(range(len(ids))):
        raise DataError(
            f"This BPE is not of bytes: its tokens hold {sorted(strange)[:8]}, or their {len(ids)} ids are "
            "not the first ones."
        )

    def encode_batch(texts: list[str]) -> list[np.ndarray]:
        encoded = library.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(one.ids, np.int32) for one in encoded]

    return Tokenizer(
        kind="bpe",
        vocab_size=vocab_size,
        boundary=len(tokens),
        spelling=tuple(bytes(byte[char] for char in token) for token, _ in tokens),
        encode_batch=encode_batch,
        model=json.loads(library.to_str()),
    )


def _byte_characters() -> list[str]:
    """Returns the printable character that byte-level BPE writes for each byte.

    Printable Latin-1 stands for itself; the other bytes, in order, for U+0100 and on (GPT-2).
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [i for i in range(_BYTES) if i not in own]
    table = {i: chr(i) for i in own} | {i: chr(_BYTES + n) for n, i in enumerate(others)}
    return [table[i] for i in range(_BYTES)]


def train_bpe(texts: Iterable[str], vocab_size: int | None) -> Tokenizer:
    """Learns merges from texts. The same texts give the same tokenizer.

    Args:
        texts: the training split, and nothing else.
        vocab_size: tokens, the boundary included. A small corpus may learn fewer: the rest is
            unused.

    Raises:
        ConfigError: vocab_size does not hold the bytes and the boundary.
    """
    if vocab_size is None or vocab_size < _BYTES + 1:
        raise ConfigError(
            f"data.vocab_size={vocab_size}: byte-level BPE needs {_BYTES} bytes and the boundary, "
            f"so at least {_BYTES + 1}. A common choice for a few megabytes is 4096."
        )
    library = hf.Tokenizer(hf.models.BPE())
    # Digits are never merged, as in LLaMA (arXiv:2302.13971): a number is spelled, not learned whole.
    library.pre_tokenizer = hf.pre_tokenizers.Sequence(
        [
            hf.pre_tokenizers.Digits(individual_digits=True),
            hf.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=_byte_characters(),
        special_tokens=[],
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    return bpe_tokenizer(library.to_str(), vocab_size)


def character_tokenizer(characters: str) -> Tokenizer:
    """One id for each of the characters, then the unknown character, then the boundary.

    Rows of the embedding are padded to a multiple of 64. An unknown character counts as the three
    bytes of U+FFFD, which it is decoded to.

    Args:
        characters: distinct, in the order of their code points.

    Raises:
        DataError: they are not.
    """
    codes = _code_points(characters)
    if not len(codes) or (np.diff(codes) <= 0).any():
        raise DataError(f"These are no distinct characters in order: {characters[:80]!r}.")
    unknown = len(codes)

    def encode_batch(texts: list[str]) -> list[np.ndarray]:
        return [encode(_code_points(text)) for text in texts]

    def encode(text: np.ndarray) -> np.ndarray:
        places = np.minimum(np.searchsorted(codes, text), unknown - 1)
        return np.where(codes[places] == text, places, unknown).astype(np.int32)

    return Tokenizer(
        kind="characters",
        vocab_size=-(-(unknown + 2) // _LANES) * _LANES,
        boundary=unknown + 1,
        spelling=tuple(char.encode("utf-8", "surrogatepass") for char in characters + _UNKNOWN),
        encode_batch=encode_batch,
        model={"characters": characters},
        unknown=unknown,
    )


def _code_points(text: str) -> Int[np.ndarray, " N"]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.int64)


def train_characters(texts: Iterable[str], vocab_size: int | None) -> Tokenizer:
    """Takes the characters of texts; of too many the most frequent, equal ones by code point.

    Args:
        texts: the training split, and nothing else.
        vocab_size: most ids, the unknown character and the boundary included; None takes them all.

    Raises:
        ConfigError: vocab_size has no place for a character.
        DataError: the texts are empty.
    """
    if vocab_size is not None and vocab_size < 3:
        raise ConfigError(
            f"data.vocab_size={vocab_size}: characters need an id each, one for the unknown "
            "character and one for the boundary. None takes all characters of the training text."
        )
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        counts.update(text)
    if not counts:
        raise DataError(
            "data.tokenizer=characters: the training split has no text to take them from."
        )
    kept = sorted(counts, key=lambda char: (-counts[char], char))
    return character_tokenizer(
        "".join(sorted(kept[: None if vocab_size is None else vocab_size - 2]))
    )


_KINDS: dict[str, Callable[[Iterable[str], int | None], Tokenizer]] = {
    "bytes": lambda texts, vocab_size: byte_tokenizer(),
    "bpe": train_bpe,
    "characters": train_characters,
}


def make_tokenizer(kind: str, vocab_size: int | None, texts: Iterable[str]) -> Tokenizer:
    """Makes the tokenizer that `data.tokenizer` names; `bytes` reads neither size nor texts.

    Raises:
        ConfigError: no such tokenizer, or a vocabulary too small for it.
        DataError: no text to learn from.
    """
    if kind not in _KINDS:
        raise ConfigError(f"data.tokenizer={kind!r} is none; {nearest(kind, _KINDS)}.")
    return _KINDS[kind](texts, vocab_size)


def _size(given: Any) -> int:
    """A vocabulary that an embedding can have rows for."""
    if type(given) is not int or not 0 < given <= _LARGEST:
        raise ValueError(f"vocab_size={given!r} is no whole number of 1 to {_LARGEST}")
    return given


def from_json(text: str | bytes) -> Tokenizer:
    """Makes the tokenizer that `Tokenizer.to_json` wrote.

    Raises:
        DataError: the text is something else.
    """
    try:
        record = json.loads(text)
        if record["kind"] == "bytes":
            return byte_tokenizer()
        if record["kind"] == "bpe":
            return bpe_tokenizer(json.dumps(record["model"]), _size(record["vocab_size"]))
        if record["kind"] == "characters":
            return character_tokenizer(record["model"]["characters"])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"This is no saved tokenizer: {text[:80]!r} ({error!r}).") from error
    raise DataError(f"A saved tokenizer of kind {record['kind']!r}, which this version lacks.")
