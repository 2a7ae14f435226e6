"""Name cloze: which name is missing in a sentence, given the sentences before it.

As in the Children's Book Test (Hill et al. 2016, arXiv:1511.02301): 20 sentences of a novel, then a
21st in which a name that they contain is replaced by XXXXX.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
import re
from typing import NamedTuple
import zlib

import tensorflow_datasets as tfds

from moe.data.archives import Reader
from moe.data.sources import novels
from moe.data.sources.builder import PackageBuilder
from moe.data.sources.types import SPLITS
from moe.errors import DataError

PACKAGES = novels.PACKAGES
BLANK = "XXXXX"
CONTEXT = 20  # sentences
FEWEST_CANDIDATES = 6  # different names in the context

# Capitals that name no one: titles, kinship, time, faith, peoples and tongues.
_NO_NAMES = frozenset(
    (
        "Miss Mrs Mister Sir Lady Lord Captain Colonel Admiral General Doctor Madam Mama Mamma Papa Esq "
        "Count Countess Baron Duke Viscount Viscountess Dowager Honourable Right Nurse King Queen "
        "Monday Tuesday Wednesday Thursday Friday Saturday Sunday January February March April "
        "May June July August September October November December Christmas Easter Michaelmas "
        "Midsummer God Heaven Providence Lordship Ladyship Gothic English French German Italian Irish Scotch "
        "Street Park House Hall Cottage Parsonage Vicarage Abbey Lodge Square Place Buildings Room "
        "Rooms Gardens Crescent Lane Farm Hill Great Upper Lower North South East West"
    ).split()
)
_FEWEST_MENTIONS = 3  # of a name in its novel, inside sentences
_LOWER_CASE = 0.1  # of a name's mentions may be in lower case, at most

_HEADING = re.compile(r"(?:volume|chapter)\s+(?:[ivxlc]+|\d+)\.?", re.IGNORECASE)
_TITLE = r"(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)"
_SENTENCE_END = re.compile(rf"(?:(?<=[.!?])|(?<=[.!?][\"')])){_TITLE}\s+")
_INSIDE = re.compile(r"(?:(?<=[a-z,;] )|(?<=\bMr\. )|(?<=\bMrs\. )|(?<=\bDr\. ))[A-Z][a-z]{2,}\b")
_LOWER = re.compile(r"\b[a-z]{3,}\b")
_CAPITALISED = re.compile(r"\b[A-Z][a-z]{2,}\b")


class Question(NamedTuple):
    """A question about one novel."""

    number: int  # of the sentence asked about, in its novel
    source: str  # the context a sentence a line, then the question
    answer: str
    candidates: tuple[str, ...]  # the names of the context, in order of first mention


class NameCloze(PackageBuilder):
    """Which name is missing, in the six novels of Jane Austen: Persuasion is test, Northanger Abbey valid.

    Source: 20 sentences, a line each, and the 21st with a name replaced wherever it stands in it.
    The context has the answer and at least 5 other names, joined by `|` in `candidates`. The domain
    is the novel. Names are words that their novel capitalises inside sentences at least 3 times
    and hardly ever writes in lower case; titles, days, months and the like are none. Every sentence
    that fits is asked about, so contexts overlap, never across novels.
    Licence of the data: the novels are in the public domain.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Sentences of a novel, one more with a missing name, and the name.",
            features=tfds.features.FeaturesDict(
                {
                    "source": tfds.features.Text(),
                    "target": tfds.features.Text(),
                    "domain": tfds.features.Text(),
                    "candidates": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # the archive is there
        parts = read_questions(self.members(PACKAGES[0].name))
        return {split: self._generate_examples(parts[split]) for split in SPLITS}

    def _generate_examples(self, parts: Mapping[str, list[Question]]):
        for novel, questions in parts.items():
            for number, source, answer, candidates in questions:
                features = {"source": source, "target": answer, "domain": novel}
                yield f"{novel}/{number:05}", {**features, "candidates": "|".join(candidates)}


def read_questions(members: Mapping[str, Reader]) -> dict[str, dict[str, list[Question]]]:
    """The questions about each novel, by split and novel.

    Raises:
        DataError: the novels cannot be read, or there is no question about one of them.
    """
    texts: dict[str, list[str]] = defaultdict(list)
    for chapter in novels.read_chapters(members):
        texts[chapter.novel].append(chapter.text)
    parts: dict[str, dict[str, list[Question]]] = {split: {} for split in SPLITS}
    for novel, chapters in texts.items():
        questions = [*make_questions("\n\n".join(chapters), novel)]
        if not questions:
            raise DataError(f"The novel {novel!r} has no sentence to ask about.")
        parts[novels.SPLIT_OF_NOVEL.get(novel, "train")][novel] = questions
    return parts


def make_questions(text: str, novel: str) -> Iterator[Question]:
    """Yields the questions about one novel, in its order.

    Args:
        text: of the whole novel, paragraphs between empty lines.
        novel: its name; which of several names is asked for follows from it and the sentence's number.
    """
    listed = [*sentences(text)]
    names = find_names(listed)
    mentions = [_mentions(sentence, names) for sentence in listed]
    for number in range(CONTEXT, len(listed)):
        candidates = dict.fromkeys(
            name for found in mentions[number - CONTEXT : number] for name in found
        )
        known = [name for name in mentions[number] if name in candidates]
        if not known or len(candidates) < FEWEST_CANDIDATES:
            continue
        answer = known[zlib.crc32(f"{novel} {number}".encode()) % len(known)]
        question = re.sub(rf"\b{answer}\b", BLANK, listed[number])
        source = "\n".join([*listed[number - CONTEXT : number], question])
        yield Question(number, source, answer, tuple(candidates))


def sentences(text: str) -> Iterator[str]:
    """Yields the sentences of a text without headings, each on one line."""
    for paragraph in re.split(r"\n\s*\n", text):
        joined = " ".join(paragraph.split())
        if joined and not _HEADING.fullmatch(joined):
            yield from _SENTENCE_END.split(joined)


def find_names(listed: Iterable[str]) -> frozenset[str]:
    """The names of a novel; see `NameCloze`."""
    inside: Counter[str] = Counter()
    lower: Counter[str] = Counter()
    for sentence in listed:
        inside.update(_INSIDE.findall(sentence))
        lower.update(_LOWER.findall(sentence))
    return frozenset(
        word
        for word, mentions in inside.items()
        if mentions >= _FEWEST_MENTIONS
        and lower[word.lower()] <= _LOWER_CASE * mentions
        and word not in _NO_NAMES
    )


def _mentions(sentence: str, names: frozenset[str]) -> tuple[str, ...]:
    """The names in a sentence, each once."""
    return tuple(dict.fromkeys(w for w in _CAPITALISED.findall(sentence) if w in names))
