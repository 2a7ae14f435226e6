"""Sayings, jokes, recipes and poems of Debian's fortune files in German and Chinese.

A fortune file holds texts separated by lines of a single `%`.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
import re

from moe.data.archives import Reader
from moe.data.packages import Package
from moe.data.sources.builder import PackageConfig
from moe.data.sources.held_out import normalised
from moe.data.sources.language import LanguageBuilder, decode, unique, words
from moe.data.sources.types import Document, split_of
from moe.errors import DataError

_GERMAN = Package(
    "apt",
    "fortunes-de",
    "0.35-1",
    sha256="03fe7a7912935bd3d4e02e38d79ef32a289097f8718d4488c409595abce067a0",
    size=904952,
)
_CHINESE = Package(
    "apt",
    "fortunes-zh",
    "2.98",
    sha256="211c5ddee59d0ae74ce01cbfd02f7c8714740bae1835d5661eb2254edd739105",
    size=546072,
)
PACKAGES = (_GERMAN, _CHINESE)
FOLDERS = {"fortunes-de": "usr/share/games/fortunes/de", "fortunes-zh": "usr/share/games/fortunes"}

_NO_TEXT = (".dat", ".u8")  # index of offsets; link to the text
_SEPARATOR = re.compile(r"^%[ \t]*(?:\n|\Z)", re.MULTILINE)
_ATTRIBUTION = re.compile(r"^\s*--.*\Z", re.MULTILINE | re.DOTALL)
_COLOUR = re.compile(r"\x1b(?:\[[0-9;]*[A-Za-z])?")  # of terminals, ECMA-48


class FortuneTexts(LanguageBuilder):
    """Fortunes, a document each: German (18,650, 2.9 MB) or Chinese (5,660, 2.1 MB), by config.

    The Chinese ones are sayings, classical poems (simplified and traditional) and software manuals.
    Some are rude. Colours of terminals are taken out, repeated texts left out. Splits by hash of
    the words without the attribution, which differs where a saying is quoted twice.

    Licences: fortunes-de GPL-2 or later, fortunes-zh GPL-3 or later.
    """

    BUILDER_CONFIGS = (
        PackageConfig(name="german", packages=(_GERMAN,)),
        PackageConfig(name="chinese", packages=(_CHINESE,)),
    )

    def documents(self) -> Iterator[tuple[str, Document]]:
        """Yields (split, fortune)."""
        (package,) = self.builder_config.packages
        texts = read_fortunes(
            self.members(package.name), package.name, self.builder_config.name, self.skipped
        )
        for document in unique(texts, self.skipped, package.name):
            yield split_of(saying(document.text)), document


def saying(text: str) -> str:
    """Returns the words of a fortune without who said it; all of them if there are no others."""
    return normalised(_ATTRIBUTION.sub("", text)) or words(text)


def read_fortunes(
    members: Mapping[str, Reader], package: str, domain: str, skipped: Counter[str]
) -> Iterator[Document]:
    """Yields the fortunes of all files in sorted order; keys are file and number.

    Args:
        members: of the package's archive.
        package: a key of `FOLDERS`.
        domain: of the documents.
        skipped: counts empty fortunes: before the first and after the last separator that is normal.

    Raises:
        DataError: no files, or one that is not UTF-8.
    """
    folder = FOLDERS[package]
    names = [name for name in sorted(members) if name.rpartition("/")[0] == folder]
    names = [name for name in names if not name.endswith(_NO_TEXT)]
    if not names:
        raise DataError(f"The package {package} has no fortunes in {folder}.")
    for name in names:
        text = _COLOUR.sub("", decode(members[name](), f"{package}: {name}"))
        for number, fortune in enumerate(_SEPARATOR.split(text)):
            if fortune.strip():
                key = f"{name.rpartition('/')[2]}/{number:05}"
                yield Document(fortune.strip("\n").rstrip(), domain, key)
            else:
                skipped["empty fortunes"] += 1
