"""Needle retrieval: a number hidden in a text and asked for at its end, made here from novels.

The needle is a sentence, `The secret number of amber-17 is 482913.`, put between two words of a
passage; the source ends with the question, the target is the number. Passages of train, valid and
test are of different novels.
"""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import random
from typing import Any, NamedTuple

from jaxtyping import Int64
import numpy as np
import tensorflow_datasets as tfds

from moe.data.archives import Reader
from moe.data.sources import novels
from moe.data.sources.builder import PackageBuilder, PackageConfig
from moe.data.sources.types import SPLITS
from moe.errors import DataError

PACKAGES = novels.PACKAGES
QUARTERS = 4

_KEYS = ("amber", "cobalt", "crimson", "indigo", "ivory", "jade", "ochre", "silver")
_NUMBERS = 100  # of each key: amber-0 to amber-99
_SECRETS = 10**6
_TIMES = {"train": 1, "valid": 1, "test": 1, "test_2x": 2, "test_4x": 4}  # length, by split


@dataclasses.dataclass(eq=False)
class NeedleConfig(PackageConfig):
    """Lengths and numbers of examples."""

    size: int = 240  # bytes of the source, at most; a word of the passage may be missing to it
    needles: int = 1  # sentences of the same form with other keys; one is asked for
    train: int = 50_000  # examples
    held_out: int = 1_000  # examples of each other split


class Needle(PackageBuilder):
    """A number to find in a passage of a novel, by the bytes of the passage.

    The configs are named for the bytes of the source; source, target of 6 digits and 3 boundaries
    fit a row of 256, 512, 1,024 or 4,096 bytes. `1008_of_4` hides four needles and asks for one. `test_2x`
    and `test_4x` have sources two and four times as long. The domain is the quarter of the passage
    that the needle is in, all equally frequent. Test passages are from Persuasion, valid ones from Northanger
    Abbey. No word of a passage has a digit, so the answer occurs exactly once. An example is a
    function of config, split and index, and of the novels.
    Licence of the data: the novels are in the public domain.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = (
        NeedleConfig(name="240"),
        NeedleConfig(name="496", size=496),
        NeedleConfig(name="1008", size=1_008, train=30_000),
        NeedleConfig(name="1008_of_4", size=1_008, needles=4, train=30_000),
        NeedleConfig(name="4080", size=4_080, train=20_000),
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="A number hidden in a passage of a novel, and the question for it.",
            features=tfds.features.FeaturesDict(
                {
                    "source": tfds.features.Text(),
                    "target": tfds.features.Text(),
                    "domain": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # the archive is there
        haystacks = read_haystacks(self.members(PACKAGES[0].name))
        return {
            split: self._generate_examples(haystacks[split.partition("_")[0]], split)
            for split in _TIMES
        }

    def _generate_examples(self, haystack: "Haystack", split: str) -> Iterator[tuple[int, dict]]:
        config: Any = self.builder_config
        for index in range(config.train if split == "train" else config.held_out):
            yield index, make_example(config, haystack, split, index)._asdict()


class Haystack(NamedTuple):
    """Words to hide needles among."""

    words: tuple[str, ...]
    ends: Int64[np.ndarray, " n+1"]  # bytes of the first i words, a space after each


class Example(NamedTuple):
    """A passage with its question, the answer, and where the needle is."""

    source: str
    target: str
    domain: str  # quarter 1 (the beginning) to quarter 4


def read_haystacks(members: Mapping[str, Reader]) -> dict[str, Haystack]:
    """The words of the novels of each split."""
    words: dict[str, list[str]] = {split: [] for split in SPLITS}
    for chapter in novels.read_chapters(members):
        words[novels.SPLIT_OF_NOVEL.get(chapter.novel, "train")] += chapter.text.split()
    return {split: make_haystack(part) for split, part in words.items()}


def make_haystack(words: Iterable[str]) -> Haystack:
    """Makes a haystack of the words that have no digit."""
    kept = tuple(word for word in words if not any(map(str.isdecimal, word)))
    sizes = [0, *(len(word.encode("utf-8")) + 1 for word in kept)]
    return Haystack(kept, np.cumsum(sizes, dtype=np.int64))


def make_example(config: NeedleConfig, haystack: Haystack, split: str, index: int) -> Example:
    """Makes the example of a number: index modulo 4 is the quarter that its needle is in, from 0.

    Raises:
        DataError: the haystack has too few words for a passage of this size.
    """
    rng = random.Random(f"needle {config.name} {split} {index}")  # seeds from a string by SHA-512
    numbers = rng.sample(range(len(_KEYS) * _NUMBERS), config.needles)
    keys = [f"{_KEYS[number // _NUMBERS]}-{number % _NUMBERS}" for number in numbers]
    secrets = [f"{secret:06}" for secret in rng.sample(range(_SECRETS), config.needles)]
    needles = [
        f"The secret number of {key} is {secret}."
        for key, secret in zip(keys, secrets, strict=True)
    ]
    question = f"\nQ: What is the secret number of {keys[0]}?\nA:"
    others = len(question) + sum(len(needle) + 1 for needle in needles)
    # A space follows every word and every needle but the last: hence the 1.
    passage = _draw_words(haystack, config.size * _TIMES[split] + 1 - others, rng)
    quarter = index % QUARTERS
    bounds = [-(-len(passage) * i // QUARTERS) for i in (quarter, quarter + 1)]
    places = [rng.randrange(*bounds), *(rng.randrange(len(passage)) for _ in needles[1:])]
    for place, needle in sorted(zip(places, needles, strict=True), reverse=True):
        passage.insert(place, needle)
    return Example(" ".join(passage) + question, secrets[0], f"quarter {quarter + 1}")


def _draw_words(haystack: Haystack, size: int, rng: random.Random) -> list[str]:
    """Draws as many words in a row as fit into `size` bytes, a space after each."""
    if size > haystack.ends[-1]:
        raise DataError(
            f"The novels of this split have {haystack.ends[-1]} bytes, too few for a passage of {size}."
        )
    last = int(np.searchsorted(haystack.ends, haystack.ends[-1] - max(size, 0)))
    start = rng.randrange(last + 1)
    end = int(np.searchsorted(haystack.ends, haystack.ends[start] + size, side="right")) - 1
    if end - start < QUARTERS:
        raise DataError(
            f"A passage of {size} bytes has {end - start} words, fewer than {QUARTERS}."
        )
    return [*haystack.words[start:end]]
