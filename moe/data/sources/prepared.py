"""Any data set that TensorFlow Datasets has prepared, read without TensorFlow or a network.

Only array_record and parquet files have random access, so only those are read here. `valid` and
`test` are cut from the end of `train` where the data set has none of its own.
"""

from collections.abc import Iterator
import hashlib
from pathlib import Path

import tensorflow_datasets as tfds

from moe.config import nearest
from moe.data.sources.catalogue import find_entry
from moe.data.sources.shards import BadRecord, Shards
from moe.data.sources.types import DEFAULT_DOMAIN, SPLITS, Document, Request, Source
from moe.errors import DataError

_NAMES = {
    "train": ("train",),
    "valid": ("valid", "validation", "val", "dev"),
    "test": ("test",),
}


def prepared_source(request: Request) -> Source:
    """Opens the data set that `data.name=tfds:NAME` or `data.name=tfds:DIRECTORY` names.

    Raises:
        DataError: it is not prepared here, or not with random access, or has no such text feature.
    """
    return read_prepared(request.dataset, request.directory, request.text_feature)


def prepared_directory(name: str, directory: Path) -> Path | None:
    """Returns the directory of the newest prepared version of `name`, None if there is none.

    `name` is a TFDS name (`lm1b`, `lm1b/config`, `lm1b/config:1.1.0`) or a prepared directory.

    Raises:
        DataError: several configs are prepared, and the name does not say which.
    """
    base, _, version = name.partition(":")
    for root in (Path(name).expanduser(), directory / base / version):
        if (root / "dataset_info.json").is_file():
            return root
        found = [*root.glob("*/dataset_info.json"), *root.glob("*/*/dataset_info.json")]
        versions = [path.parent for path in found if _version(path.parent)]
        configs = sorted({path.parent.relative_to(root).as_posix() for path in versions})
        if len(configs) > 1:
            raise DataError(f"{name!r} is several data sets: {', '.join(configs)}. Name one.")
        if versions:
            return max(versions, key=_version)
    return None


def _version(path: Path) -> tuple[int, ...]:
    """Returns (1, 2, 3) of a directory `1.2.3`, () of any other (an unfinished one, say)."""
    parts = path.name.split(".")
    return tuple(map(int, parts)) if len(parts) == 3 and all(map(str.isdigit, parts)) else ()


def find_prepared(name: str, directory: Path) -> Path:
    """The directory of a prepared data set that `data.name` names.

    Args:
        name: of the catalogue, or `tfds:NAME` or `tfds:DIRECTORY`.
        directory: the data directory.

    Raises:
        ConfigError: no such name.
        DataError: it is not prepared; training never downloads.
    """
    kind, _, dataset = name.partition(":")
    if kind == "tfds":
        return _prepared_or_refused(dataset, directory)
    # With the directory in front, so that no folder of that name elsewhere is taken for it.
    path = prepared_directory(str(directory / find_entry(name).directory), directory)
    if path is None:
        raise DataError(
            f"The data set {name!r} is not prepared in {directory}, and training never downloads. "
            f"Prepare it once: python3 scripts/prepare_data.py {name} --data_dir={directory}"
        )
    return path


def _prepared_or_refused(name: str, directory: Path) -> Path:
    path = prepared_directory(name, directory)
    if path is None:
        raise DataError(
            f"The data set {name!r} is not prepared in {directory}, and training never downloads. "
            f"Prepare it once: tfds.builder({name!r}, data_dir={str(directory)!r}, "
            "file_format='array_record').download_and_prepare() (most data sets need "
            "tensorflow-cpu for this one step), or give a prepared directory as "
            "data.name=tfds:DIRECTORY."
        )
    return path


def read_prepared(name: str, directory: Path, text_feature: str) -> Source:
    """Opens a prepared data set as a text source; see `prepared_source`."""
    path = _prepared_or_refused(name, directory)
    return read_text(name, path, text_feature)


def read_text(name: str, path: Path, text_feature: str) -> Source:
    """Opens a prepared directory as a text source.

    Args:
        name: for messages.
        path: of `find_prepared`.
        text_feature: the feature that is read.

    Raises:
        DataError: it has no random access, or no such text feature.
    """
    builder = tfds.builder_from_directory(path)
    check_format(builder, path)
    _check_text(builder, path, text_feature)
    slices = split_slices(tuple(builder.info.splits), path)

    def documents(split: str) -> Iterator[Document]:
        return _documents(builder, slices[split], text_feature)

    return Source(name, dataset_identity(path), documents)


def check_format(builder, path: Path) -> None:
    """Raises DataError for a prepared data set without random access."""
    file_format = builder.info.file_format.value
    if file_format not in ("array_record", "parquet"):
        raise DataError(
            f"{path} was prepared as {file_format}, which has no random access. Prepare it again "
            "with file_format='array_record'."
        )


def _check_text(builder, path: Path, text_feature: str) -> None:
    features = builder.info.features
    texts = [key for key, value in features.items() if isinstance(value, tfds.features.Text)]
    if text_feature not in texts:
        raise DataError(
            f"{path} has no text feature {text_feature!r}: set data.text_feature; "
            f"{nearest(text_feature, texts)}."
        )


def split_slices(names: tuple[str, ...], path: Path) -> dict[str, str]:
    """Maps our splits to slices of the data set's own."""
    own = {split: next((name for name in _NAMES[split] if name in names), None) for split in SPLITS}
    if own["train"] is None:
        raise DataError(f"{path} has no split 'train', only {', '.join(names) or 'none at all'}.")
    missing = [split for split in SPLITS if own[split] is None]
    slices = {split: name for split, name in own.items() if name is not None}
    percent = 100
    for split in reversed(missing):  # 5% each, from the end of train
        slices[split] = f"train[{percent - 5}%:{percent}%]"
        percent -= 5
    if missing:
        slices["train"] = f"train[:{percent}%]"
    return slices


def dataset_identity(path: Path) -> str:
    """Hashes the data set's metadata and the sizes of its files, not gigabytes of records."""
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.suffix == ".json":
            digest.update(file.read_bytes())
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
    return digest.hexdigest()


def _documents(builder, split: str, text_feature: str) -> Iterator[Document]:
    features = dict(builder.info.features)
    keyed = isinstance(features.get("path"), tfds.features.Text)
    shards = Shards(builder, split)
    for number, example in enumerate(shards):
        if isinstance(example, BadRecord):
            raise DataError(example.why)
        where = shards.where(number)
        text = _as_text(example[text_feature], where)
        key = _as_text(example["path"], where) if keyed else ""
        yield Document(text, _domain(example, features.get("domain"), where), key)


def _as_text(value: bytes | str, where: str) -> str:
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 at byte {error.start}: {error.reason}.") from error


def _domain(example, feature, where: str) -> str:
    if isinstance(feature, tfds.features.ClassLabel):
        return feature.int2str(int(example["domain"]))
    if isinstance(feature, tfds.features.Text):
        return _as_text(example["domain"], where)
    return DEFAULT_DOMAIN
