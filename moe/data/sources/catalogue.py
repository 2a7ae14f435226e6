"""The data sets that this project can prepare: a name each, for `data.name` and the command line.

A row costs nothing until it is asked for: the module of a builder is imported only then.
"""

import importlib
from pathlib import Path
from typing import NamedTuple

import tensorflow_datasets as tfds
from tensorflow_datasets.core import naming

from moe.data.packages import Package
from moe.errors import ConfigError, did_you_mean


class Entry(NamedTuple):
    """A builder, or one config of it."""

    module: str
    class_name: str
    kind: str  # "language", "classification", "pairs", "ctc", "image-text"
    summary: str  # one line
    config: str | None = None  # of a builder with several

    @property
    def directory(self) -> Path:
        """Where TFDS keeps it, relative to the data directory and without the version."""
        return Path(naming.camelcase_to_snakecase(self.class_name), self.config or "")

    def load(self) -> type[tfds.core.DatasetBuilder]:
        """The builder class."""
        return getattr(importlib.import_module(self.module), self.class_name)

    def packages(self) -> tuple[Package, ...]:
        """What the config reads where it says so, otherwise all that the module reads."""
        configs = {config.name: config for config in self.load().BUILDER_CONFIGS or ()}
        own = getattr(configs.get(self.config), "packages", None)
        return importlib.import_module(self.module).PACKAGES if own is None else own


_SOURCES = "moe.data.sources"

CATALOGUE: dict[str, Entry] = {
    # Language.
    "novels": Entry(
        f"{_SOURCES}.novels",
        "AustenNovels",
        "language",
        "six novels of Jane Austen by chapter, 4 MB; whole novels held out",
    ),
    "scripture": Entry(
        f"{_SOURCES}.scripture",
        "ScriptureChapters",
        "language",
        "the Bible by chapter in English and Spanish, 4 MB each",
    ),
    "german": Entry(
        f"{_SOURCES}.fortunes",
        "FortuneTexts",
        "language",
        "German fortunes: sayings, jokes, recipes, 2.9 MB",
        "german",
    ),
    "chinese": Entry(
        f"{_SOURCES}.fortunes",
        "FortuneTexts",
        "language",
        "Chinese fortunes: sayings, poems, manuals, 2.1 MB",
        "chinese",
    ),
    "dictionary": Entry(
        f"{_SOURCES}.dictionary",
        "WordnetDictionary",
        "language",
        "the glosses of WordNet in alphabetical order, 12 MB",
    ),
    "news": Entry(
        f"{_SOURCES}.news",
        "BbcNews",
        "language",
        "articles of BBC News, 5 MB",
    ),
    "reviews": Entry(
        f"{_SOURCES}.reviews",
        "ImdbReviewTexts",
        "language",
        "film reviews of IMDB, 33 MB",
    ),
    # Classification.
    # Pairs.
    "verses_en_es": Entry(
        f"{_SOURCES}.verses",
        "VersesEnEs",
        "pairs",
        "verses of the Bible, English to Spanish; whole chapters held out",
    ),
    "interface_en_de": Entry(
        f"{_SOURCES}.interface",
        "InterfacePairs",
        "pairs",
        "interface and manual texts, English to German",
        "en_de",
    ),
    "interface_en_zh": Entry(
        f"{_SOURCES}.interface",
        "InterfacePairs",
        "pairs",
        "interface and manual texts, English to Chinese",
        "en_zh",
    ),
    # Images.
    "fashion_mnist": Entry(
        f"{_SOURCES}.fashion_mnist",
        "FashionMnistImages",
        "classification",
        "70,000 grey pictures of clothes, 28x28, 10 classes, official split",
    ),
    "mnist_digits": Entry(
        f"{_SOURCES}.mnist_digits",
        "MnistDigits",
        "classification",
        "10,000 grey pictures of handwritten digits, 28x28, 10 classes",
    ),
    # Speech.
    # Image and text.
    "emoji": Entry(
        f"{_SOURCES}.emoji",
        "EmojiNames",
        "image-text",
        "1,934 emoji, 32x32 in colour, with names in English, German, French and Chinese",
    ),
    # Long text.
}


def find_entry(name: str) -> Entry:
    """The row of a name.

    Raises:
        ConfigError: no such data set; names the nearest.
    """
    if name not in CATALOGUE:
        raise ConfigError(
            f"{name!r} is no data set that can be prepared here{did_you_mean(name, CATALOGUE)}; "
            f"there are {', '.join(CATALOGUE)}. What TFDS has prepared is read as "
            "data.name=tfds:NAME."
        )
    return CATALOGUE[name]
