"""Definition to word: the glosses of WordNet 3.0, from a Debian package."""

from collections.abc import Iterable, Iterator, Mapping
import re
from typing import NamedTuple

import tensorflow_datasets as tfds

from moe.data.archives import Reader, require
from moe.data.packages import Package
from moe.data.sources.builder import PackageBuilder
from moe.data.sources.held_out import normalised
from moe.data.sources.language import decode
from moe.data.sources.types import split_of
from moe.errors import DataError

PACKAGES = (
    Package(
        "apt",
        "wordnet-base",
        "1:3.0-37",
        "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
        6_467_132,
    ),
)
PARTS_OF_SPEECH = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}  # by file

_FOLDER = "usr/share/wordnet"
_LICENCE = b"  "  # its lines begin so, lines of data with a number
_FIELDS_BEFORE_WORD = 4  # offset, file of the lexicographer, type, count of words in hexadecimal
_EXAMPLES = re.compile(r'[;:]\s*"')  # where the examples of use begin
_MARKER = re.compile(r"\((?:a|p|ip)\)$")  # where an adjective may stand


class Definition(NamedTuple):
    """One sense: a set of synonyms with its definition."""

    key: str  # noun/00217499
    text: str
    word: str  # the first of the synonyms
    part_of_speech: str


class Definitions(PackageBuilder):
    """117,659 definitions of WordNet 3.0 with the first word of their set (Fellbaum 1998).

    Split by the hash of the definition: 90% train, 5% valid, 5% test, so that definitions that are
    the same but for case and punctuation share a side. A word has as many definitions as senses: it
    may occur on both sides with different ones. `test_new_words` is the part of `test` whose words
    are the target of no definition in train, whatever the case. A definition may hold its own word
    (`weakly interacting massive particle`): that is the dictionary's, and stays.
    Licence of the data: WordNet 3.0, free for any use with its notice. Copyright 2006 by Princeton
    University.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Definitions of WordNet 3.0 and their words.",
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
        parts = split_definitions(read_definitions(self.members(PACKAGES[0].name)))
        return {split: self._generate_examples(part) for split, part in parts.items()}

    def _generate_examples(self, definitions: list[Definition]):
        for key, text, word, part_of_speech in definitions:
            yield key, {"source": text, "target": word, "domain": part_of_speech}


def split_definitions(definitions: Iterable[Definition]) -> dict[str, list[Definition]]:
    """Returns `train`, `valid`, `test` and, of the last, `test_new_words`."""
    parts: dict[str, list[Definition]] = {"train": [], "valid": [], "test": []}
    for definition in definitions:
        parts[split_of(normalised(definition.text))].append(definition)
    known = {definition.word.casefold() for definition in parts["train"]}
    new = [definition for definition in parts["test"] if definition.word.casefold() not in known]
    return {**parts, "test_new_words": new}


def read_definitions(members: Mapping[str, Reader]) -> Iterator[Definition]:
    """Yields the definitions by part of speech, in the order of the files.

    Raises:
        DataError: a file is missing, or a line of it is no set of synonyms with a definition.
    """
    for file, part_of_speech in PARTS_OF_SPEECH.items():
        name = f"{_FOLDER}/data.{file}"
        lines = require(members, name, PACKAGES[0].name).splitlines()
        for number, line in enumerate(lines, start=1):
            if not line.startswith(_LICENCE):
                yield _parse(line, f"{name}, line {number}", part_of_speech)


def _parse(line: bytes, where: str, part_of_speech: str) -> Definition:
    """Reads a line of WordNet's `data` files (wndb(5WN)): fields, `|`, definition and examples."""
    head, bar, gloss = decode(line, where).partition("|")
    fields = head.split()
    if not bar or len(fields) <= _FIELDS_BEFORE_WORD:
        raise DataError(
            f"{where} is no set of synonyms with a definition; it starts {line[:60]!r}."
        )
    text = _EXAMPLES.split(gloss, maxsplit=1)[0].strip(" ;:")
    word = _MARKER.sub("", fields[_FIELDS_BEFORE_WORD]).replace("_", " ")
    if not text or not word:
        raise DataError(f"{where}: the {'word' if text else 'definition'} is empty.")
    return Definition(f"{part_of_speech}/{fields[0]}", text, word, part_of_speech)
