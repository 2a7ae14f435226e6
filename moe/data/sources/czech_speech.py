"""Czech speech with its words: the dubbed dialogue of the game Fish Fillets."""

from collections import Counter
from collections.abc import Iterator, Mapping
import importlib.util
import io
import math
import re
from typing import Any, NamedTuple
import zlib

from absl import logging
from jaxtyping import Int16
import numpy as np
from scipy.signal import resample_poly
import tensorflow_datasets as tfds

from moe.data.archives import Reader
from moe.data.audio import audio_feature, rate_metadata
from moe.data.packages import Package
from moe.data.sources.builder import PackageBuilder
from moe.data.sources.types import SPLITS
from moe.errors import DataError

_SCRIPTS = Package(
    "apt",
    "fillets-ng-data",
    "1.0.1-1.1",
    "25de89afd8b1adf7bcace8290248a6a22c89cd42300317e69000e162c032cf84",
    70_633_484,
)
_SOUNDS = Package(
    "apt",
    "fillets-ng-data-cs",
    "1.0.1-1.1",
    "3ecef99b9456f1c80c9625c6f2418642b52d58e7167a46bad7a412db17991b14",
    39_042_172,
)
PACKAGES = (_SCRIPTS, _SOUNDS)
RATE = 11_025  # Hz: half or a quarter of the recordings', and it keeps most of the sibilants

_SCRIPT = re.compile(r"usr/share/games/fillets-ng/script/([^/]+)/\w*dialogs_cs\.lua")
_SOUND = re.compile(r"usr/share/games/fillets-ng/sound/(?:share/)?([^/]+)/cs/([^/]+)\.ogg")
_STRING = r'"((?:[^"\\]|\\.)*)"'
_LINE = re.compile(
    rf"dialogId\(\s*{_STRING}\s*,\s*{_STRING}\s*,\s*{_STRING}\s*\)\s*dialogStr\(\s*{_STRING}\s*\)"
)
_IN_TURN = ("test", "valid", "train")
_SHARED = "share"  # the folder of scripts that several levels use
_VOICES = {"font_small": "small fish", "font_big": "big fish"}  # a font for each speaker
_SPELLED = re.compile(r"[a-záčďéěíňóřšťúůýž ]+")
_PUNCTUATION = re.compile(r"[\s.,?!:;\-'\"\N{RIGHT SINGLE QUOTATION MARK}\N{HORIZONTAL ELLIPSIS}]+")


class Line(NamedTuple):
    """What is said, as a script has it."""

    voice: str
    english: str
    czech: str


class Utterance(NamedTuple):
    """One recording, still encoded, with its words."""

    path: str  # level/name
    member: str  # of the archive of sounds
    line: Line
    text: str  # Czech in lower case without punctuation
    split: str


class CzechSpeech(PackageBuilder):
    """1,792 acted utterances, 102 minutes at 11.025 kHz, with exact transcripts.

    Two main speakers, the small and the big fish, and many short parts (`domain`). `text` is the
    transcript in lower case, letters and spaces only; `original` has its punctuation, `english`
    what the translators started from. Levels of the game are documents: 80/10/10 by utterances,
    levels in order of their hash; an utterance whose words came up in an earlier level goes where
    those went. Left out and counted:
    recordings without a line in the scripts, and lines with figures, symbols or Cyrillic letters.
    The recordings are stereo or mono Ogg Vorbis of 22.05 or 44.1 kHz; channels are averaged.

    Licence of the data: GPL-2 (ALTAR interactive and the Fish Fillets NG team).
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Czech game dialogue: sound, transcript and English source.",
            features=tfds.features.FeaturesDict(
                {
                    "audio": audio_feature(),
                    **{
                        name: tfds.features.Text()
                        for name in ("text", "original", "english", "domain", "path")
                    },
                }
            ),
            metadata=rate_metadata(RATE),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # the archives are there
        check_decoder()
        sounds = self.members(_SOUNDS.name)
        found, skipped = utterances(read_scripts(self.members(_SCRIPTS.name)), sounds)
        metadata: Any = self.info.metadata
        metadata["skipped"] = dict(skipped)
        logging.warning("%s: left out %s", self.name, dict(skipped))
        return {split: self._generate_examples(found, sounds, split) for split in SPLITS}

    def _generate_examples(self, found: list[Utterance], sounds: Mapping[str, Reader], split: str):
        for one in found:
            if one.split == split:
                yield (
                    one.path,
                    {
                        "audio": read_ogg(sounds[one.member](), one.member),
                        "text": one.text,
                        "original": one.line.czech,
                        "english": one.line.english,
                        "domain": one.line.voice,
                        "path": one.path,
                    },
                )


def read_scripts(members: Mapping[str, Reader]) -> dict[tuple[str, str], Line]:
    """The lines of dialogue by level and name of the recording; empty ones are left out.

    Raises:
        DataError: there are none, or a script is not UTF-8.
    """
    lines = {}
    for member in sorted(members):
        if match := _SCRIPT.fullmatch(member):
            for name, line in _lines(members[member](), member):
                lines[match[1], name] = line
    if not lines:
        raise DataError(f"The package {_SCRIPTS.name} has no Czech dialogue in its scripts.")
    return lines


def _lines(data: bytes, member: str) -> Iterator[tuple[str, Line]]:
    try:
        script = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{member} is not UTF-8 at byte {error.start}: {error.reason}.") from error
    for match in _LINE.finditer(script):
        name, font, english, czech = (re.sub(r"\\(.)", r"\1", part) for part in match.groups())
        if czech.strip():
            yield name, Line(_VOICES.get(font, "others"), english, czech.strip())


def spoken(czech: str) -> str | None:
    """A line as it is said: words in lower case, one space between; None with figures or symbols."""
    text = _PUNCTUATION.sub(" ", czech.lower()).strip()
    return text if _SPELLED.fullmatch(text) else None


def utterances(
    lines: Mapping[tuple[str, str], Line], sounds: Mapping[str, Reader]
) -> tuple[list[Utterance], Counter[str]]:
    """Joins recordings and lines, and gives each its split.

    Returns:
        Utterances in order of level and name, and how many recordings were left out by reason.
    """
    joined: list[tuple[str, str, Line, str]] = []
    skipped: Counter[str] = Counter()
    matches = (match for member in sounds if (match := _SOUND.fullmatch(member)))
    for level, name, member in sorted((match[1], match[2], match[0]) for match in matches):
        line = lines.get((level, name)) or lines.get((_SHARED, name))
        text = None if line is None else spoken(line.czech)
        if line is None:
            skipped["recordings without a line in the scripts"] += 1
        elif text is None:
            skipped["lines with figures, symbols or other letters"] += 1
        else:
            joined.append((f"{level}/{name}", member, line, text))
    if not joined:
        raise DataError(f"The package {_SOUNDS.name} has no recordings of lines in the scripts.")
    first: dict[str, str] = {}  # level where the words came up
    levels = [first.setdefault(text, path.partition("/")[0]) for path, _, _, text in joined]
    splits = split_levels(Counter(levels))
    return [Utterance(*j, splits[level]) for j, level in zip(joined, levels, strict=True)], skipped


def split_levels(sizes: Mapping[str, int]) -> dict[str, str]:
    """Gives test, then valid, the next levels until each has a tenth of all; train has the rest.

    There are too few levels, of too many sizes, to leave the shares to a hash of each.

    Args:
        sizes: utterances of each level.
    """
    total, before, splits = sum(sizes.values()), 0, {}
    for level in sorted(sizes, key=lambda level: (zlib.crc32(level.encode()), level)):
        splits[level] = _IN_TURN[min(10 * before // total, 2)]
        before += sizes[level]
    return splits


def check_decoder() -> None:
    """Asks for the library that reads Ogg Vorbis.

    Raises:
        DataError: it is not installed.
    """
    if importlib.util.find_spec("soundfile") is None:
        raise DataError(
            "The recordings are Ogg Vorbis, which the Python package soundfile reads, and it is not "
            "installed: python3 -m pip install 'soundfile>=0.13', or this project with its extra: "
            "python3 -m pip install -e '.[data]'. Training from prepared data does not need it."
        )


def read_ogg(data: bytes, where: str) -> Int16[np.ndarray, " T"]:
    """Decodes one recording, averages its channels and resamples it to `RATE`.

    Raises:
        DataError: it is damaged, empty or silent.
    """
    import soundfile  # only here: prepared data is read without it

    try:
        sound, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise DataError(f"{where} is no sound that can be decoded: {error}") from error
    if not sound.size or np.abs(sound).max() == 0:
        raise DataError(f"{where} is empty or silent.")
    common = math.gcd(rate, RATE)
    made = resample_poly(sound.mean(axis=1), RATE // common, rate // common)
    return np.clip(np.rint(32768 * made), -32768, 32767).astype(np.int16)
