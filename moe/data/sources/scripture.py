"""The Bible in English and Spanish, a document each chapter."""

from collections.abc import Iterator

from moe.data.packages import Package
from moe.data.sources import sword
from moe.data.sources.language import LanguageBuilder
from moe.data.sources.types import Document, split_of

PACKAGES = (
    Package(
        "apt",
        "sword-text-kjv",
        "14.3-1",
        sha256="9f463f28ce665f6f528fc723179722bced880a4c5485f7a41bf742838315de57",
        size=2800476,
    ),
    Package(
        "apt",
        "sword-text-sparv",
        "2.60-1",
        sha256="5c87f9b2bc97457e8a872f5bae7ea7ce59cb3de1dcee73e4d4740451863694cf",
        size=2722332,
    ),
)
DOMAINS = {"scripture_en": "sword-text-kjv", "scripture_es": "sword-text-sparv"}


class ScriptureChapters(LanguageBuilder):
    """The Bible by chapter: King James Version (1769) and Reina-Valera (1909), a verse each line.

    A chapter is on the same side in both languages. Verses that a translation lacks are left out.

    Licence: both texts are in the public domain (in the United Kingdom the Crown grants the right
    to print the King James Version).
    """

    def documents(self) -> Iterator[tuple[str, Document]]:
        """Yields (split, chapter)."""
        for domain, package in DOMAINS.items():
            for chapter in sword.read_chapters(self.members(package), package):
                verses = [verse for verse in chapter.verses if verse]
                self.skipped["verses missing"] += len(chapter.verses) - len(verses)
                text = "\n".join(verses)
                yield split_of(chapter.name), Document(text, domain, chapter.name)
