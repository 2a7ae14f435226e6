"""The user's own files of pairs as a data set: `data.name=pairs`."""

from collections.abc import Iterator
import json
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from moe.data.examples import Records
from moe.data.sources.pairs import Pair, read_pairs, split_of_pair
from moe.data.sources.types import SPLITS
from moe.errors import ConfigError, DataError


def pair_records(files: Any) -> Records:
    """Opens `data.files`: one .tsv or .jsonl file, or two aligned text files with a comma between.

    Args:
        files: `data.files`.

    Raises:
        ConfigError: no text.
        DataError: files that are missing or hold something else; names file and line.
    """
    if not isinstance(files, str):
        raise ConfigError(
            f"data.name=pairs needs data.files, and it is {files!r}: give 'pairs.tsv', 'pairs.jsonl' "
            "(an object of source and target a line), or 'source.txt,target.txt'."
        )
    paths = [Path(part.strip()).expanduser() for part in files.split(",")]
    pairs = list(read_pairs(paths))
    by_split: dict[str, list[Pair]] = {split: [] for split in SPLITS}
    for pair in pairs:
        by_split[split_of_pair(pair)].append(pair)
    empty = [split for split, found in by_split.items() if not found]
    if empty:
        raise DataError(
            f"data.files={files!r} has {len(pairs)} pairs, of which none is held out for "
            f"{' and '.join(empty)}: give at least a few hundred."
        )

    def read(split: str) -> Iterator[dict[str, Any]]:
        return (pair._asdict() for pair in by_split[split])

    features = {name: tfds.features.Text() for name in Pair._fields}
    found = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return Records("pairs", json.dumps(found), features, None, SPLITS, read)
