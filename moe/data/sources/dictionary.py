"""The glosses of WordNet as a dictionary: entries in alphabetical order, a document a prefix."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
import re
from typing import NamedTuple

from moe.data.archives import Reader, require
from moe.data.sources.definitions import PACKAGES
from moe.data.sources.language import LanguageBuilder, decode, words
from moe.data.sources.types import Document, split_of
from moe.errors import DataError

__all__ = ["PACKAGES", "PREFIX", "Gloss", "WordnetDictionary", "group", "read_glosses"]

PREFIX = 3  # letters that the entries of a document share

_PARTS = ("noun", "verb", "adj", "adv")
_FOLDER = "usr/share/wordnet"
_MARKER = re.compile(r"\((?:a|p|ip)\)$")  # where an adjective may stand, wninput(5WN)


class Gloss(NamedTuple):
    """One set of synonyms."""

    part: str  # of speech
    lemmas: tuple[str, ...]
    definition: str  # with examples: `a small cut; "he made a nick"`


class WordnetDictionary(LanguageBuilder):
    """117,659 glosses of WordNet 3.0 as a dictionary: `lemma, lemma (noun): definition` a line.

    Entries are sorted; those whose first lemma begins with the same three letters are a document.
    A definition that several entries share stands once, so that none is on two sides. The sides are
    not those of `definitions`: a model that is trained on this has met definitions held out there.

    Licence: WordNet 3.0 licence (Princeton University; free to use, copy and modify with notice).
    """

    def documents(self) -> Iterator[tuple[str, Document]]:
        """Yields (split, all entries of a prefix)."""
        glosses = read_glosses(self.members(PACKAGES[0].name))
        for document in group(glosses, self.skipped):
            yield split_of(document.key), document


def read_glosses(members: Mapping[str, Reader]) -> Iterator[Gloss]:
    """Yields the glosses of all parts of speech, format wndb(5WN).

    Raises:
        DataError: a file is missing, or a line is damaged; names it.
    """
    for part in _PARTS:
        name = f"{_FOLDER}/data.{part}"
        lines = decode(require(members, name, PACKAGES[0].name), name).split("\n")
        for number, line in enumerate(lines, start=1):
            if line and not line.startswith(" "):  # the licence is indented
                yield _parse(line, part, f"{name}, line {number}")


def _parse(line: str, part: str, where: str) -> Gloss:
    fields, bar, definition = line.partition("|")
    parts = fields.split()
    try:
        count = int(parts[3], 16)
    except (IndexError, ValueError) as error:
        raise DataError(f"{where} is no record of WordNet: {line[:60]!r}.") from error
    lemmas = parts[4 : 4 + 2 * count : 2]
    if not bar or not definition.strip() or len(lemmas) < max(count, 1):
        raise DataError(f"{where} has no definition or too few lemmas: {line[:60]!r}.")
    plain = tuple(_MARKER.sub("", lemma).replace("_", " ") for lemma in lemmas)
    return Gloss(part, plain, definition.strip())


def group(glosses: Iterator[Gloss], skipped: Counter[str]) -> Iterator[Document]:
    """Yields the documents in alphabetical order; counts definitions met before."""
    entries = defaultdict(list)
    seen = set()
    for gloss in glosses:
        definition = words(gloss.definition.split('; "')[0])
        if definition in seen:
            skipped["definitions met before"] += 1
            continue
        seen.add(definition)
        entry = f"{', '.join(gloss.lemmas)} ({gloss.part}): {gloss.definition}"
        entries[_prefix(gloss.lemmas[0])].append((gloss.lemmas[0].casefold(), entry))
    for prefix in sorted(entries):
        text = "\n".join(entry for _, entry in sorted(entries[prefix]))
        yield Document(text, "dictionary", prefix)


def _prefix(lemma: str) -> str:
    """Returns the first letters and digits, `0` where there are none."""
    return "".join(filter(str.isalnum, lemma.casefold()))[:PREFIX] or "0"
