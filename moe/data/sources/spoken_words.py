"""Which word is spoken: digits, letters and the radio alphabet, by the prompts of a telephone exchange."""

from collections.abc import Iterator, Mapping
import string
from typing import NamedTuple
import zlib

from jaxtyping import Int16
import numpy as np
import tensorflow_datasets as tfds

from moe.data.audio import audio_feature, rate_metadata
from moe.data.sources.asterisk import CORE, MENARDI, RATE, Voice, read_prompts, without_speech
from moe.data.sources.builder import PackageBuilder
from moe.data.sources.types import SPLITS
from moe.errors import DataError

VOICES = (*CORE, MENARDI)
PACKAGES = tuple(voice.package for voice in VOICES)
_DIGITS = tuple(f"digits-{digit}" for digit in string.digits)
_LETTERS = tuple(f"letters-{letter}" for letter in string.ascii_lowercase)
_PHONETIC = tuple(f"phonetic-{letter}" for letter in string.ascii_lowercase)
CLASSES = (*_DIGITS, *_LETTERS, *_PHONETIC)

# The other voices have an alphabet of their own there: Ancona, Bologna in Italian.
_RADIO = {"en": "phonetic", "es": "phonetic", "fr": "phonetic", MENARDI.name: "phonetic/ICAO"}
_PERCENT_VALID = 10


class Word(NamedTuple):
    """One recording."""

    label: str  # of `CLASSES`
    voice: Voice
    samples: Int16[np.ndarray, " T"]

    @property
    def split(self) -> str:
        """The second Italian voice is the test; a tenth of the others' clips, by hash, is valid."""
        if self.voice == MENARDI:
            return "test"
        place = zlib.crc32(f"{self.voice.name} {self.label}".encode()) % 100
        return "valid" if place < _PERCENT_VALID else "train"


class SpokenWords(PackageBuilder):
    """62 words, 320 recordings, 8 kHz: a very small set, for few-shot experiments.

    Each of six voices says a word once: digits 0 to 9 and letters a to z in five languages (English,
    Spanish, French, Russian, and Italian by two voices), and the radio alphabet (alpha, bravo) in
    the languages that have it (English, Spanish, French, one Italian voice). So a class has at
    most five training clips, and `digits-7` sounds different in each language: only the radio
    alphabet is (nearly) the same word everywhere.

    `test` is the second Italian voice, 62 clips: a new speaker of a language that was heard from
    another one, and for the radio alphabet a new speaker and accent. `valid` is a tenth of the
    other clips. One clip of `test` is 1.6 points of accuracy; guessing is right for 1.6 in a
    hundred. `domain` is digits, letters or phonetic; `voice` the language, or it-menardi.

    Licences of the recordings: CC-BY-SA-3.0 (English and Spanish: Allison Smith, French: June
    Wallack; it-menardi: made by Marco Menardi and Paola Dal Zot, http://www.voip.ammdomus.it),
    CC-BY-3.0 (Italian: Carlo Flora, Russian: Maxim Topal).
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Digits, letters and the radio alphabet by six voices, one held out.",
            features=tfds.features.FeaturesDict(
                {
                    "audio": audio_feature(),
                    "label": tfds.features.ClassLabel(names=list(CLASSES)),
                    "voice": tfds.features.Text(),
                    "domain": tfds.features.Text(),
                }
            ),
            metadata=rate_metadata(RATE),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # the archives are there
        words = [
            word
            for voice in VOICES
            for word in words_of(
                voice, read_prompts(self.members(voice.package.name), voice.package.name)
            )
        ]
        return {split: self._generate_examples(words, split) for split in SPLITS}

    def _generate_examples(self, words: list[Word], split: str):
        for word in words:
            if word.split == split:
                yield (
                    f"{word.label} {word.voice.name}",
                    {
                        "audio": word.samples,
                        "label": word.label,
                        "voice": word.voice.name,
                        "domain": word.label.partition("-")[0],
                    },
                )


def words_of(voice: Voice, clips: Mapping[str, Int16[np.ndarray, " T"]]) -> Iterator[Word]:
    """The words of one voice.

    Args:
        voice: who speaks.
        clips: all recordings of the voice, by prompt.

    Raises:
        DataError: one is missing, or nothing is to be heard in it.
    """
    for label in CLASSES:
        prompt = prompt_of(label, voice.name)
        if prompt is None:
            continue
        if prompt not in clips or without_speech(prompt, clips[prompt]):
            raise DataError(
                f"The package {voice.package.name} has no recording {prompt!r} with speech: it is "
                "another version than its reader was written against."
            )
        yield Word(label, voice, clips[prompt])


def prompt_of(label: str, voice: str) -> str | None:
    """The prompt by which a voice says a word, None where it says another one there."""
    kind, _, word = label.partition("-")
    if kind != "phonetic":
        return f"{kind}/{word}"
    return f"{_RADIO[voice]}/{word}_p" if voice in _RADIO else None
