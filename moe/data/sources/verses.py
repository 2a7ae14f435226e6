"""English verses of the Bible with their Spanish translation."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from moe.data.sources import sword
from moe.data.sources.language import PairBuilder, words
from moe.data.sources.pairs import Pair
from moe.data.sources.scripture import DOMAINS, PACKAGES
from moe.data.sources.types import split_of
from moe.errors import DataError

__all__ = ["PACKAGES", "VersesEnEs", "align", "without_trained"]

# Chapters that begin elsewhere in Reina-Valera: verse n there is not verse n of King James.
NUMBERED_OTHERWISE = frozenset("Num.13 Num.30 1Sam.24 Job.39 Job.40 Hos.12 Jonah.2".split())


class Verse(NamedTuple):
    """One verse in both languages."""

    chapter: str
    english: str
    spanish: str


class VersesEnEs(PairBuilder):
    """Verses of the Bible, English to Spanish (King James 1769, Reina-Valera 1909), `en-es`.

    Held out by whole chapter, as `scripture` is: neighbours share names and phrases. Left out are
    verses that one translation lacks, the seven chapters that are numbered otherwise in Spanish,
    and verses of valid and test that train or the other has word for word.

    Licence: public domain, see `scripture`.
    """

    def pairs(self) -> Iterator[tuple[str, Pair]]:
        """Yields (split, pair)."""
        english, spanish = (
            [*sword.read_chapters(self.members(package), package)] for package in DOMAINS.values()
        )
        verses = align(english, spanish, self.skipped)
        for split, verse in without_trained(verses, self.skipped):
            yield split, Pair(verse.english, verse.spanish, "en-es")


def align(
    english: Iterable[sword.Chapter], spanish: Iterable[sword.Chapter], skipped: Counter[str]
) -> Iterator[Verse]:
    """Yields the verses that both translations have under the same number.

    Raises:
        DataError: the chapters differ, or a chapter has another number of verses; both counts.
    """
    english, spanish = [*english], [*spanish]
    names = [[chapter.name for chapter in chapters] for chapters in (english, spanish)]
    if names[0] != names[1]:
        raise DataError(
            f"The translations have {len(names[0])} and {len(names[1])} chapters, and not the same: "
            "their verses cannot be paired."
        )
    for one, other in zip(english, spanish, strict=True):
        if len(one.verses) != len(other.verses):
            raise DataError(
                f"{one.name} has {len(one.verses)} verses in English and {len(other.verses)} in "
                "Spanish: they cannot be paired."
            )
        if one.name in NUMBERED_OTHERWISE:
            skipped["verses numbered otherwise"] += len(one.verses)
            continue
        for text, translation in zip(one.verses, other.verses, strict=True):
            if text and translation:
                yield Verse(one.name, text, translation)
            else:
                skipped["verses missing"] += 1


def without_trained(verses: Iterable[Verse], skipped: Counter[str]) -> Iterator[tuple[str, Verse]]:
    """Yields (split, verse) by chapter, without held-out verses that an earlier split has too."""
    verses = [*verses]
    seen: set[str] = set()
    for split in ("train", "valid", "test"):
        own = [verse for verse in verses if split_of(verse.chapter) == split]
        for verse in own:
            if {words(verse.english), words(verse.spanish)} & seen:
                skipped["held-out verses met before"] += 1
            else:
                yield split, verse
        seen.update(words(text) for verse in own for text in (verse.english, verse.spanish))
