"""Inputs made worse on purpose, to see how far a trained model holds.

What is drawn depends on the corruption, the seed and the example's number alone: every model and
every number of devices sees the same corrupted examples.
"""

from collections.abc import Callable
from typing import Any, NamedTuple
import zlib

from jaxtyping import Float32, Float64, Int16, UInt8
import numpy as np

from moe.errors import ConfigError, find_row

Samples = Int16[np.ndarray, " T"] | Float32[np.ndarray, " T"]


class Corruption(NamedTuple):
    """A row of `CORRUPTIONS`."""

    kind: str  # of the input: text, image or audio
    severity: str  # what the number means
    low: float
    high: float
    apply: Callable[[Any, float, np.random.Generator], Any]


def corrupt(kind: str, value: Any, *, severity: int | float, seed: int, index: int) -> Any:
    """Corrupts one example.

    Args:
        kind: a name of `CORRUPTIONS`.
        value: str, uint8 picture `[H W channels]`, or samples `[T]`, int16 or float32 in [-1, 1]; it
            is left as it is.
        severity: what the row says.
        seed: of the evaluation, not negative.
        index: number of the example in its split, not negative.

    Returns:
        The same type, and the same shape where it is an array.

    Raises:
        ConfigError: no such corruption, a severity outside its range, or one for other inputs.
    """
    row = find_row(CORRUPTIONS, "data.corrupt", kind, "no corruption")
    if not row.low <= severity <= row.high:
        raise ConfigError(
            f"Corruption {kind!r} with severity {severity}: it is {row.severity}, from {row.low:g} "
            f"to {row.high:g}."
        )
    if not _is_kind(value, row.kind):
        found = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value)
        raise ConfigError(f"Corruption {kind!r} is for {row.kind}, not for {found}.")
    draw = np.random.default_rng([seed, index, zlib.crc32(kind.encode())])
    return row.apply(value, float(severity), draw)


def _is_kind(value: Any, kind: str) -> bool:
    if kind == "text":
        return isinstance(value, str)
    dtypes, dimensions = ((np.uint8,), 3) if kind == "image" else ((np.int16, np.float32), 1)
    return isinstance(value, np.ndarray) and value.dtype in dtypes and value.ndim == dimensions


def _typos(text: str, rate: float, draw: np.random.Generator) -> str:
    """Swaps a character with the next, deletes or doubles it; something of the text always stays."""
    characters, made = list(text), []
    hits, kinds = draw.random(len(characters)) < rate, draw.integers(3, size=len(characters))
    for place, character in enumerate(characters):
        if not hits[place]:
            made.append(character)
        elif kinds[place] == 0 and place + 1 < len(characters):
            made.append(characters[place + 1])
            characters[place + 1] = character
        elif kinds[place] != 1:
            made += [character, character]
    return "".join(made) or text[:1]


def _shuffle_words(text: str, share: float, draw: np.random.Generator) -> str:
    """Exchanges a share of the words among their own places; runs of white space become a space."""
    words = text.split()
    places = draw.permutation(len(words))[: round(share * len(words))]
    moved = [words[place] for place in places]
    for place, word in zip(np.sort(places), moved, strict=True):
        words[place] = word
    return " ".join(words)


def _noise(
    image: UInt8[np.ndarray, "H W channels"], deviation: float, draw: np.random.Generator
) -> UInt8[np.ndarray, "H W channels"]:
    noisy = image + draw.normal(0, 255 * deviation, image.shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def _occlude(
    image: UInt8[np.ndarray, "H W channels"], side: float, draw: np.random.Generator
) -> UInt8[np.ndarray, "H W channels"]:
    """Blackens a rectangle of this share of height and width, anywhere inside the picture."""
    height, width = (round(side * n) for n in image.shape[:2])
    top = draw.integers(image.shape[0] - height + 1)
    left = draw.integers(image.shape[1] - width + 1)
    hidden = image.copy()
    hidden[top : top + height, left : left + width] = 0
    return hidden


def _white_noise(samples: Samples, decibels: float, draw: np.random.Generator) -> Samples:
    """Adds Gaussian noise of a power that is so far below that of the whole sound."""
    sound = samples.astype(np.float64)
    deviation = np.sqrt(np.square(sound).mean()) * 10 ** (-decibels / 20)
    return _clip(sound + draw.normal(0, deviation, sound.shape), samples.dtype)


def _gain(samples: Samples, decibels: float, draw: np.random.Generator) -> Samples:
    del draw  # the same for every example
    return _clip(samples * np.float64(10 ** (decibels / 20)), samples.dtype)


def _clip(sound: Float64[np.ndarray, " T"], dtype: np.dtype) -> Samples:
    """Cuts what is too loud for the type of samples, as a recorder does."""
    if dtype == np.int16:
        return np.clip(np.rint(sound), -32768, 32767).astype(np.int16)
    return np.clip(sound, -1, 1).astype(np.float32)


CORRUPTIONS: dict[str, Corruption] = {
    "typos": Corruption("text", "the share of characters changed", 0.0, 1.0, _typos),
    "shuffle_words": Corruption("text", "the share of words moved", 0.0, 1.0, _shuffle_words),
    "noise": Corruption("image", "the deviation as a share of full white", 0.0, 1.0, _noise),
    "occlude": Corruption("image", "the share of height and width hidden", 0.0, 1.0, _occlude),
    "white_noise": Corruption("audio", "signal to noise in dB", -40.0, 100.0, _white_noise),
    "gain": Corruption("audio", "decibels louder", -60.0, 60.0, _gain),
}
