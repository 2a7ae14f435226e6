"""Texts of user interfaces and manuals with their translations: English to German and Chinese.

Interfaces are message catalogues of GNU gettext (`.mo`), manuals are Mallard pages (XML).
"""

from collections import Counter
from collections.abc import Iterator, Mapping
import re
import struct
from typing import NamedTuple
from xml.etree import ElementTree

from moe.data.archives import Reader
from moe.data.packages import Package
from moe.data.sources.builder import PackageConfig
from moe.data.sources.language import PairBuilder, decode, words
from moe.data.sources.pairs import Pair
from moe.data.sources.types import split_of
from moe.errors import DataError

_GERMAN = Package(
    "apt",
    "libreoffice-l10n-de",
    "4:7.4.7-1+deb12u14",
    sha256="aee22c8e3b3c0431f6e1b0bc66f757ba36c860e2651a05eb050fde4897f06548",
    size=861940,
)
_ZH_CN = Package(
    "apt",
    "libreoffice-l10n-zh-cn",
    "4:7.4.7-1+deb12u14",
    sha256="06b2800923811a11ddadc9e1e09ef8bda2a89ba118470403b2f6a897152e0809",
    size=834684,
)
_MANUALS = Package(
    "apt",
    "gnome-user-docs",
    "43.0-2",
    sha256="0d635a840747958ca84da778b40d341f1155603851f922c9a171f5a181d6a39f",
    size=8523220,
)
PACKAGES = (_GERMAN, _ZH_CN, _MANUALS)

_MAGIC = {0x950412DE: "<", 0xDE120495: ">"}  # byte order of a catalogue
_CONTEXT = "\x04"  # ends the context of a message
_CHINESE = re.compile(r"[\u4e00-\u9fff]")
_CHINESE_KEY = re.compile(r"\([A-Z0-9]\)(?=$|[.…:\uff1a\uff1f\u3002])")  # 添加(A)...
_HELP = "usr/share/help/"
_MALLARD = "{http://projectmallard.org/1.0/}"
_BLOCKS = ("p", "title", "desc")


class _Language(NamedTuple):
    package: Package
    folder: str  # of its manuals


_LANGUAGES = {"en_de": _Language(_GERMAN, "de"), "en_zh": _Language(_ZH_CN, "zh_CN")}


class InterfacePairs(PairBuilder):
    """Messages of LibreOffice and paragraphs of GNOME's manuals, from English; domains `en-de`, `en-zh`.

    About half of the messages are labels of fewer than four words. Marks of access keys are taken
    out. Each English text stands once, with its first translation. Splits by hash of the English
    words, so that `Open`, `Open...` and `open:` are on one side.

    Licences: LibreOffice MPL-2.0, parts Apache-2.0; gnome-user-docs CC-BY-SA-3.0.
    """

    BUILDER_CONFIGS = tuple(
        PackageConfig(name=name, packages=(language.package, _MANUALS))
        for name, language in _LANGUAGES.items()
    )

    def pairs(self) -> Iterator[tuple[str, Pair]]:
        """Yields (split, pair)."""
        name = self.builder_config.name
        language = _LANGUAGES[name]
        domain = name.replace("_", "-")
        found = merge(
            read_catalogues(self.members(language.package.name), self.skipped),
            read_manuals(self.members(_MANUALS.name), language.folder, self.skipped),
            skipped=self.skipped,
        )
        for source, target in found.items():
            yield split_of(words(source)), Pair(source, target, domain)


def merge(*sources: Iterator[tuple[str, str]], skipped: Counter[str]) -> dict[str, str]:
    """Joins pairs: the first translation of each English text; counts what is left out."""
    found: dict[str, str] = {}
    for source in sources:
        for text, translation in source:
            if not text or not translation:
                skipped["not translated or empty"] += 1
            elif text == translation:
                skipped["equal to their translation"] += 1
            elif text in found:
                skipped["English texts met before"] += 1
            else:
                found[text] = translation
    return found


def read_catalogues(
    members: Mapping[str, Reader], skipped: Counter[str]
) -> Iterator[tuple[str, str]]:
    """Yields (English, translation) of all catalogues in sorted order, marks of access keys removed.

    Of messages with plural forms the first form is taken.

    Raises:
        DataError: no catalogue, or a damaged one.
    """
    names = [name for name in sorted(members) if name.endswith(".mo")]
    if not names:
        raise DataError("The package has no message catalogues (.mo).")
    for name in names:
        for message, translation in read_catalogue(members[name](), name):
            if not message:
                skipped["headers of catalogues"] += 1
                continue
            text = message.rpartition(_CONTEXT)[2].partition("\0")[0]
            yield without_access_key(text), without_access_key(translation.partition("\0")[0])


def read_catalogue(data: bytes, name: str) -> Iterator[tuple[str, str]]:
    """Yields the messages of a `.mo` file (GNU gettext manual, section 10.3).

    Raises:
        DataError: it is truncated, no catalogue, or not UTF-8; names the message's number.
    """
    try:
        order = _MAGIC.get(struct.unpack_from("<I", data)[0])
        if order is None:
            raise DataError(f"{name} is no message catalogue; it starts {data[:4]!r}.")
        count, originals, translations = struct.unpack_from(f"{order}III", data, 8)
        for number in range(count):
            where = f"{name}, message {number + 1} of {count}"
            texts = []
            for table in (originals, translations):
                size, start = struct.unpack_from(f"{order}II", data, table + 8 * number)
                if start + size > len(data):
                    raise DataError(f"{where} ends beyond the file, which is truncated.")
                texts.append(decode(data[start : start + size], where))
            yield texts[0], texts[1]
    except struct.error as error:
        raise DataError(f"{name} is truncated: {error}.") from error


def without_access_key(text: str) -> str:
    """Removes the mark of an access key: `~Open`, `E_xit`, `打开(~O)`, `打开(O)...`."""
    for mark in "~_":
        if text.count(mark) == 1:  # with more of them it is a name such as snake_case_name
            text = re.sub(rf"{mark}(?=\w)", "", text)
    if _CHINESE.search(text):
        text = _CHINESE_KEY.sub("", text)
    return text.strip()


def read_manuals(
    members: Mapping[str, Reader], folder: str, skipped: Counter[str]
) -> Iterator[tuple[str, str]]:
    """Yields (English, translation) of the paragraphs of pages that have the same elements.

    Args:
        members: of the package's archive.
        folder: of the language.
        skipped: counts pages that are not translated or have other elements.

    Raises:
        DataError: no pages, or one that is no XML.
    """
    english = [name for name in sorted(members) if re.match(rf"{_HELP}C/.*\.page$", name)]
    if not english:
        raise DataError(f"The package has no pages in {_HELP}C.")
    for name in english:
        other = name.replace(f"{_HELP}C/", f"{_HELP}{folder}/", 1)
        if other not in members:
            skipped["pages not translated"] += 1
            continue
        one, two = (_paragraphs(members[page](), page) for page in (name, other))
        if [tag for tag, _ in one] != [tag for tag, _ in two]:
            skipped["pages with other elements"] += 1
            continue
        yield from (
            (text, translation) for (_, text), (_, translation) in zip(one, two, strict=True)
        )


def _paragraphs(data: bytes, name: str) -> list[tuple[str, str]]:
    try:
        return [*_walk(ElementTree.fromstring(data))]
    except ElementTree.ParseError as error:  # entities that grow, too: expat stops at 100 times
        raise DataError(f"{name} is no XML: {error}.") from error
    except RecursionError as error:
        raise DataError(f"{name} is nested deeper than any page is.") from error


def _walk(element: ElementTree.Element) -> Iterator[tuple[str, str]]:
    """Yields (tag, text) of blocks of text; of a page's metadata only its description."""
    for child in element:
        tag = child.tag.replace(_MALLARD, "") if isinstance(child.tag, str) else ""
        if tag in _BLOCKS:
            yield tag, " ".join("".join(child.itertext()).split())
        elif tag == "info":
            for found in child.findall(f"{_MALLARD}desc"):
                yield "desc", " ".join("".join(found.itertext()).split())
        else:
            yield from _walk(child)
