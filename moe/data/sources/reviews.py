"""Film reviews as text; `imdb` has them with their opinions."""

from collections.abc import Iterator

from moe.data.sources.held_out import split_by_text
from moe.data.sources.language import LanguageBuilder, unique
from moe.data.sources.movie_reviews import PACKAGES, read_reviews
from moe.data.sources.types import Document

__all__ = ["PACKAGES", "ReviewTexts"]


class ReviewTexts(LanguageBuilder):
    """25,000 film reviews of IMDB (33 MB), a document each; repeated ones once.

    Sides are those of `imdb`: a model trained on `reviews` has seen no review that `imdb` holds out.

    Licence: the package `movie-reviews` is MIT, the reviews are their authors', a research set
    (A. Maas et al., Learning Word Vectors for Sentiment Analysis, ACL 2011).
    """

    def documents(self) -> Iterator[tuple[str, Document]]:
        """Yields (split, review)."""
        reviews = (
            Document(review.text, "reviews", f"{review.row:05}")
            for review in read_reviews(self.members(PACKAGES[0].name), "imdb")
        )
        for document in unique(reviews, self.skipped, PACKAGES[0].name):
            yield split_by_text(document.text), document
