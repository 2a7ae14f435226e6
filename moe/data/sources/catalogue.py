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
        "NewsTexts",
        "language",
        "articles of BBC News, 5 MB",
    ),
    "reviews": Entry(
        f"{_SOURCES}.reviews",
        "ReviewTexts",
        "language",
        "film reviews of IMDB, 33 MB",
    ),
    # Classification.
    "imdb": Entry(
        f"{_SOURCES}.movie_reviews",
        "Imdb",
        "classification",
        "25,000 film reviews of IMDB, negative or positive",
    ),
    "rotten_tomatoes": Entry(
        f"{_SOURCES}.movie_reviews",
        "RottenTomatoes",
        "classification",
        "8,530 sentences of film reviews, negative or positive",
    ),
    "bbc": Entry(
        f"{_SOURCES}.bbc",
        "Bbc",
        "classification",
        "2,122 articles of BBC News in five sections",
    ),
    # Pairs.
    "definitions": Entry(
        f"{_SOURCES}.definitions",
        "Definitions",
        "pairs",
        "117,659 definitions of WordNet and their words",
    ),
    "name_cloze": Entry(
        f"{_SOURCES}.name_cloze",
        "NameCloze",
        "pairs",
        "20 sentences of a novel and one more with a missing name; whole novels held out",
    ),
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
    "spoken_language": Entry(
        f"{_SOURCES}.spoken_language",
        "SpokenLanguage",
        "classification",
        "2,745 telephone prompts in five languages, which one is spoken",
    ),
    "spoken_words": Entry(
        f"{_SOURCES}.spoken_words",
        "SpokenWords",
        "classification",
        "320 recordings of 62 words: digits, letters, radio alphabet; a voice held out",
    ),
    "czech_speech": Entry(
        f"{_SOURCES}.czech_speech",
        "CzechSpeech",
        "ctc",
        "1,792 Czech utterances with transcripts, 102 minutes",
    ),
    # Image and text.
    "emoji": Entry(
        f"{_SOURCES}.emoji",
        "EmojiNames",
        "image-text",
        "1,934 emoji, 32x32 in colour, with names in English, German, French and Chinese",
    ),
    # Long text.
    "listops": Entry(
        f"{_SOURCES}.listops",
        "Listops",
        "classification",
        "values of nested expressions of 20 to 80 tokens, and of up to 160",
        "short",
    ),
    "listops_medium": Entry(
        f"{_SOURCES}.listops",
        "Listops",
        "classification",
        "values of nested expressions of 120 to 330 tokens, and of up to 660",
        "medium",
    ),
    "listops_lra": Entry(
        f"{_SOURCES}.listops",
        "Listops",
        "classification",
        "values of nested expressions of 500 to 2,000 tokens, and of up to 4,000",
        "lra",
    ),
    "needle": Entry(
        f"{_SOURCES}.needle",
        "Needle",
        "pairs",
        "a number hidden in 240 bytes of a novel, and in 2 and 4 times as many",
        "240",
    ),
    "needle_496": Entry(
        f"{_SOURCES}.needle",
        "Needle",
        "pairs",
        "a number hidden in 496 bytes of a novel, and in 2 and 4 times as many",
        "496",
    ),
    "needle_1008": Entry(
        f"{_SOURCES}.needle",
        "Needle",
        "pairs",
        "a number hidden in 1,008 bytes of a novel, and in 2 and 4 times as many",
        "1008",
    ),
    "needle_4080": Entry(
        f"{_SOURCES}.needle",
        "Needle",
        "pairs",
        "a number hidden in 4,080 bytes of a novel, and in 2 and 4 times as many",
        "4080",
    ),
    "needle_1008_of_4": Entry(
        f"{_SOURCES}.needle",
        "Needle",
        "pairs",
        "one of four numbers hidden in 1,008 bytes of a novel",
        "1008_of_4",
    ),
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
