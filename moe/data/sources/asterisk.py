"""Prompts of the Asterisk telephone exchange: the same names in every language, one WAV file each."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
import io
import itertools
import re
from typing import NamedTuple
import wave

from jaxtyping import Float64, Int16
import numpy as np

from moe.data.archives import Reader
from moe.data.packages import Package
from moe.errors import DataError

RATE = 8000  # Hz, of all recordings

_FILE = re.compile(r"usr/share/asterisk/sounds/[^/]+/(.+)\.wav")  # [^/]+ is the voice
_TONES = (
    *("beep", "beeperr", "ascending-2tone", "descending-2tone"),
    *("confbridge-join", "confbridge-leave", "tt-monkeys"),
)
_SILENCE = "silence/"  # seconds of it, with a little dither
_BLOCK = RATE // 20  # samples of which an envelope is the mean
_SHORTEST = 6  # blocks of a recording that can be told from another by its envelope
_ALIKE = 0.1  # nats between two envelopes: copies are below, other words above 0.15


class Voice(NamedTuple):
    """One speaker's recordings."""

    name: str
    language: str
    package: Package


def _core(language: str, digest: str, size: int) -> Voice:
    name = f"asterisk-core-sounds-{language}-wav"
    return Voice(language, language, Package("apt", name, "1.6.1-1", digest, size))


CORE = (
    _core("en", "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d", 18_272_864),
    _core("es", "9283a09a6d56fccdcc2bcfe86c48f0f844289cfbd46a3184d8785a6f7f569903", 23_767_256),
    _core("fr", "8d4e1bc32ed5ba7fbda40841ca1825ed20cc6232724a473c90f8bb0e53e6073e", 18_516_060),
    _core("it", "5a26638089e134b8ac39363fe249c5c93c50cd8bfdc9b2499ae61ec4a35e2fcb", 18_262_124),
    _core("ru", "ccbfaebfa450b7a9ddf644ae0f3d1e9017d5df7c0aebe816e946345589d38201", 18_788_860),
)
MENARDI = Voice(
    "it-menardi",
    "it",
    Package(
        "apt",
        "asterisk-prompt-it-menardi-wav",
        "1:1.4.22+mm20110907-3.1",
        "3094530d98f8758ac275572d59624c41f60969fef883f34f4886d144f3dfeb21",
        18_776_300,
    ),
)


def read_prompts(members: Mapping[str, Reader], package: str) -> dict[str, Int16[np.ndarray, " T"]]:
    """The recordings of a package by the name of their prompt (`digits/7`), in order of the names.

    Raises:
        DataError: no recordings, or one that is no WAV file of 16 bits, one channel and `RATE`.
    """
    files = {match[1]: name for name in members if (match := _FILE.fullmatch(name))}
    if not files:
        raise DataError(f"The package {package} has no WAV files of prompts.")
    return {prompt: read_wav(members[files[prompt]](), files[prompt]) for prompt in sorted(files)}


def read_wav(data: bytes, where: str) -> Int16[np.ndarray, " T"]:
    """The samples of a WAV file.

    Raises:
        DataError: it is none, is cut off, or is not of 16 bits, one channel and `RATE`.
    """
    try:
        with wave.open(io.BytesIO(data)) as file:
            found = (file.getframerate(), file.getnchannels(), 8 * file.getsampwidth())
            count, samples = file.getnframes(), file.readframes(file.getnframes())
    except (wave.Error, EOFError, RuntimeError) as error:  # the last of a chunk beyond the end
        raise DataError(
            f"{where} is no WAV file: {str(error) or 'it ends in its header'}."
        ) from error
    if found != (RATE, 1, 16):
        raise DataError(
            f"{where} has {found[0]} samples a second, channels: {found[1]}, bits: {found[2]}; "
            f"prompts have {RATE}, 1 and 16."
        )
    if len(samples) != 2 * count:
        raise DataError(f"{where} is cut off: {len(samples)} bytes of {2 * count}.")
    return np.frombuffer(samples, "<i2").astype(np.int16)


def without_speech(prompt: str, samples: Int16[np.ndarray, " T"]) -> str:
    """Why nobody speaks in a recording, "" where somebody does."""
    if prompt in _TONES:
        return "beeps, tones and the monkeys"
    if prompt.startswith(_SILENCE) or not samples.size or samples.min() == samples.max():
        return "empty or silent recordings"
    return ""


def same_recordings(voices: Iterable[Mapping[str, Int16[np.ndarray, " T"]]]) -> dict[str, str]:
    """Groups prompts of which some voice has one recording under two names: name -> group.

    `auth-thankyou` and `privacy-thankyou` are one in English, other prompts in other languages.
    The group is called by its first name.
    """
    group: dict[str, str] = {}
    for clips in voices:
        for prompt in clips:
            group.setdefault(prompt, prompt)
        for a, b in copies(clips):
            first, second = sorted((group[a], group[b]))
            group = {name: first if g == second else g for name, g in group.items()}
    return group


def copies(clips: Mapping[str, Int16[np.ndarray, " T"]]) -> Iterator[tuple[str, str]]:
    """Pairs of recordings of equal length, to 50 ms, whose loudness runs alike."""
    by_length: dict[int, list[tuple[str, np.ndarray]]] = defaultdict(list)
    for name, samples in clips.items():
        envelope = _envelope(samples)
        if len(envelope) >= _SHORTEST:
            by_length[len(envelope)].append((name, envelope))
    for same_length in by_length.values():
        for (a, one), (b, other) in itertools.combinations(same_length, 2):
            if np.abs(one - other).mean() < _ALIKE:
                yield a, b


def _envelope(samples: Int16[np.ndarray, " T"]) -> Float64[np.ndarray, " N"]:
    """The logarithm of the mean magnitude of each block, with a floor of a few steps."""
    blocks = samples[: samples.size // _BLOCK * _BLOCK].reshape(-1, _BLOCK)
    return np.log(4 + np.abs(blocks.astype(np.float64)).mean(axis=1))
