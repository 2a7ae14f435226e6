"""Which language is spoken: prompts of a telephone exchange, the same in five languages."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from absl import logging
from jaxtyping import Int16
import numpy as np
import tensorflow_datasets as tfds

from moe.data.audio import audio_feature, rate_metadata
from moe.data.sources.asterisk import CORE, RATE, read_prompts, same_recordings, without_speech
from moe.data.sources.builder import PackageBuilder
from moe.data.sources.held_out import split_by_text
from moe.data.sources.types import SPLITS

PACKAGES = tuple(voice.package for voice in CORE)
CLASSES = tuple(voice.language for voice in CORE)


class Clip(NamedTuple):
    """One recording."""

    prompt: str
    language: str
    samples: Int16[np.ndarray, " T"]
    split: str


class SpokenLanguage(PackageBuilder):
    """2,745 recordings in English, Spanish, French, Italian and Russian, 125 minutes at 8 kHz.

    From a fifth of a second (one letter) to a minute and a half (instructions). Whole prompts are
    held out, 80/10/10 by hash: what is said in a test clip is in no language's training clips, nor
    is a prompt that some language answers with the same recording. Each language has one speaker
    and one studio (English and Spanish share the speaker), so a model may tell speakers and
    microphones: accuracy here says little about other voices. `domain` is the kind of prompt:
    digits, letters, phonetic, or sentences.

    Licences of the recordings: CC-BY-SA-3.0 (English and Spanish: Allison Smith, French: June
    Wallack), CC-BY-3.0 (Italian: Carlo Flora, Russian: Maxim Topal).
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Telephone prompts in five languages, whole prompts held out.",
            features=tfds.features.FeaturesDict(
                {
                    "audio": audio_feature(),
                    "label": tfds.features.ClassLabel(names=list(CLASSES)),
                    "prompt": tfds.features.Text(),
                    "domain": tfds.features.Text(),
                }
            ),
            metadata=rate_metadata(RATE),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # the archives are there
        recordings = {
            voice.language: read_prompts(self.members(voice.package.name), voice.package.name)
            for voice in CORE
        }
        clips, skipped = split_clips(recordings)
        metadata: Any = self.info.metadata
        metadata["skipped"] = dict(skipped)
        logging.warning("%s: left out %s", self.name, dict(skipped))
        return {split: self._generate_examples(clips, split) for split in SPLITS}

    def _generate_examples(self, clips: list[Clip], split: str):
        for clip in clips:
            if clip.split == split:
                yield (
                    f"{clip.prompt} {clip.language}",
                    {
                        "audio": clip.samples,
                        "label": clip.language,
                        "prompt": clip.prompt,
                        "domain": kind_of(clip.prompt),
                    },
                )


def split_clips(
    recordings: Mapping[str, Mapping[str, Int16[np.ndarray, " T"]]],
) -> tuple[list[Clip], Counter[str]]:
    """Gives every recording with speech its split, by prompt.

    Args:
        recordings: language -> prompt -> samples.

    Returns:
        Clips in order of prompt and language, and how many were left out by reason.
    """
    skipped: Counter[str] = Counter()
    spoken: dict[str, dict[str, Int16[np.ndarray, " T"]]] = {}
    for language, clips in recordings.items():
        reasons = {prompt: without_speech(prompt, samples) for prompt, samples in clips.items()}
        skipped.update(reason for reason in reasons.values() if reason)
        spoken[language] = {p: samples for p, samples in clips.items() if not reasons[p]}
    groups = same_recordings(spoken.values())
    made = [
        Clip(prompt, language, samples, split_by_text(groups[prompt]))
        for language, clips in spoken.items()
        for prompt, samples in clips.items()
    ]
    return sorted(made, key=lambda clip: clip[:2]), skipped


def kind_of(prompt: str) -> str:
    """The kind of a prompt by its folder: digits, letters, phonetic, or sentences."""
    folder = prompt.partition("/")[0]
    return folder if folder in ("digits", "letters", "phonetic") else "sentences"
