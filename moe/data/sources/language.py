"""What builders of text and of translations share: features, splits, decoding, counted omissions."""

import abc
from collections import Counter
from collections.abc import Iterable, Iterator
import hashlib
import logging
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from moe.data.sources.builder import PackageBuilder
from moe.data.sources.held_out import normalised
from moe.data.sources.pairs import Pair
from moe.data.sources.types import SPLITS, Document
from moe.errors import DataError


class SplitBuilder(PackageBuilder):
    """Builds from records of all splits at once; what is left out is counted and told.

    The counts are in the data set's metadata (`skipped`) and in the log.
    """

    VERSION = tfds.core.Version("1.0.0")
    FEATURES: ClassVar[tuple[str, ...]]  # names of the texts of an example

    @property
    def skipped(self) -> Counter[str]:
        """How many records were left out, by reason."""
        return self.__dict__.setdefault("_skipped", Counter())

    @abc.abstractmethod
    def examples(self) -> Iterator[tuple[str, str, dict[str, str]]]:
        """Yields (split, unique key, features) of every example of the data set."""

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=(type(self).__doc__ or "").strip(),
            features=tfds.features.FeaturesDict(
                {name: tfds.features.Text() for name in self.FEATURES}
            ),
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # `prepare` has fetched the packages
        parts: dict[str, list[tuple[str, dict[str, str]]]] = {split: [] for split in SPLITS}
        for split, key, features in self.examples():
            parts[split].append((key, features))
        for split, part in parts.items():
            if not part:
                raise DataError(
                    f"{self.name} has no examples for {split}: its packages are incomplete."
                )
        metadata: Any = self.info.metadata
        metadata["skipped"] = {reason: n for reason, n in self.skipped.items() if n}
        for reason, number in metadata["skipped"].items():
            logging.warning("%s: left out %d: %s", self.name, number, reason)
        return {split: self._generate_examples(part) for split, part in parts.items()}

    def _generate_examples(self, part: list[tuple[str, dict[str, str]]]):
        yield from part


class LanguageBuilder(SplitBuilder):
    """Builds documents: `text`, `domain` and `path`, the key that is held out together."""

    FEATURES = ("text", "domain", "path")

    @abc.abstractmethod
    def documents(self) -> Iterator[tuple[str, Document]]:
        """Yields (split, document); keys are unique within a domain."""

    def examples(self) -> Iterator[tuple[str, str, dict[str, str]]]:
        """Yields the documents."""
        for split, document in self.documents():
            features = {"text": document.text, "domain": document.domain, "path": document.key}
            yield split, f"{document.domain}/{document.key}", features


class PairBuilder(SplitBuilder):
    """Builds pairs: `source`, `target` and `domain`."""

    FEATURES = ("source", "target", "domain")

    @abc.abstractmethod
    def pairs(self) -> Iterator[tuple[str, Pair]]:
        """Yields (split, pair)."""

    def examples(self) -> Iterator[tuple[str, str, dict[str, str]]]:
        """Yields the pairs, numbered."""
        for number, (split, pair) in enumerate(self.pairs()):
            features = {"source": pair.source, "target": pair.target, "domain": pair.domain}
            yield split, f"{pair.domain}/{number:07}", features


def decode(data: bytes, where: str, encoding: str = "utf-8") -> str:
    """Decodes a record.

    Raises:
        DataError: it is not in the encoding; names `where` and the byte.
    """
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not {encoding.upper()} at byte {error.start} ({error.reason})."
        ) from error


def unique(documents: Iterable[Document], skipped: Counter[str], where: str) -> Iterator[Document]:
    """Yields documents of a text not met before; counts the others.

    Texts are compared by their `words`; a document whose side follows from the hash of them stays
    on it when others come or go.

    Args:
        documents: in order: the first of equal ones stays.
        skipped: counts what is left out.
        where: to name in errors.

    Raises:
        DataError: an empty text; names the document's number.
    """
    seen = set()
    for number, document in enumerate(documents, start=1):
        key = words(document.text)
        if not key:
            raise DataError(f"{where}: document {number} ({document.key!r}) has no text.")
        digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
        if digest in seen:
            skipped["texts met before"] += 1
            continue
        seen.add(digest)
        yield document


def words(text: str) -> str:
    """Returns what equal texts share: the words in lower case; of a text without words the text."""
    return normalised(text) or text.strip()
