"""Prepared data sets as columns in memory."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tensorflow_datasets as tfds

from moe.data.audio import sample_rate
from moe.data.sources import SOURCES, open_source
from moe.data.sources.prepared import find_prepared
from moe.data.sources.types import SPLITS, Request

_CHUNK = 1024  # examples read at once

Columns = dict[str, list[Any]]  # feature -> its value of each example; texts and domains are str


class Data(Protocol):
    """A data set by splits."""

    name: str

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        ...

    def columns(self, split: str) -> Columns:
        """All examples of a split, in their order."""
        ...

    def rate(self, feature: str) -> int:
        """Samples a second of an audio feature."""
        ...


class Prepared:
    """What scripts/prepare_data.py has written.

    Args:
        name: of the catalogue, or `tfds:NAME`.
        directory: of all data sets.

    Raises:
        ConfigError: no such name.
        DataError: it is not prepared there.
    """

    def __init__(self, name: str, directory: Path):
        self.name = name
        self._builder: Any = tfds.builder_from_directory(find_prepared(name, directory))
        self._read: dict[str, Columns] = {}

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self._builder.info.splits)

    def columns(self, split: str) -> Columns:
        """All examples of a split, in their order; read once."""
        if split not in self._read:
            self._read[split] = self._columns(split)
        return self._read[split]

    def rate(self, feature: str) -> int:
        """Samples a second of an audio feature.

        Raises:
            DataError: the data set does not say.
        """
        return sample_rate(self._builder.info, feature)

    def _columns(self, split: str) -> Columns:
        if split not in self.splits:
            return {key: [] for key in self._builder.info.features}
        source = self._builder.as_data_source(split)
        rows: list[dict[str, Any]] = []
        for start in range(0, len(source), _CHUNK):
            rows += source.__getitems__(range(start, min(start + _CHUNK, len(source))))
        names = dict(self._builder.info.features).get("domain")
        if isinstance(names, tfds.features.ClassLabel):
            rows = [row | {"domain": names.int2str(int(row["domain"]))} for row in rows]
        return {key: [_plain(row[key]) for row in rows] for key in self._builder.info.features}


class Texts:
    """A text source that needs no preparation by hand, such as `stdlib`, with `text` and `domain`."""

    splits = SPLITS

    def __init__(self, name: str, directory: Path):
        self.name = name
        self._source = open_source(name, Request("", directory, None, "text"))

    def columns(self, split: str) -> Columns:
        """All documents of a split, in their order."""
        found = list(self._source.documents(split))
        return {"text": [one.text for one in found], "domain": [one.domain for one in found]}

    def rate(self, feature: str) -> int:
        """Texts have no samples."""
        raise KeyError(feature)


def open_data(name: str, directory: Path) -> Data:
    """A data set of the catalogue, or a source of texts.

    Raises:
        ConfigError: no such name.
        DataError: it is not prepared there.
    """
    return Texts(name, directory) if name in SOURCES else Prepared(name, directory)


def _plain(value: Any) -> Any:
    """Bytes as text, lists of texts too; everything else as it is."""
    if isinstance(value, np.ndarray) and value.dtype == object:
        return [_plain(one) for one in value]
    return value.decode() if isinstance(value, bytes) else value
