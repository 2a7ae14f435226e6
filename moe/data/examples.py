"""Examples of a prepared data set, encoded once, then mapped into memory.

Of each split there is one flat array a field (token ids of the input and of the target, pixels,
samples of sound) and where each example starts in it. A directory that exists is whole.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jaxtyping import Int, Shaped
import numpy as np
import tensorflow_datasets as tfds

from moe.data.cache import cache_key, check_directory, damaged, directory_in_one_go
from moe.data.checked import CheckedArray, check_indices, check_starts, read_row
from moe.data.features import Fields
from moe.data.sources.prepared import check_format, dataset_identity, split_slices
from moe.data.sources.shards import BadRecord, Shards
from moe.data.sources.types import DEFAULT_DOMAIN, Document, Source
from moe.data.tokenizers import Tokenizer
from moe.errors import DataError

_META = "meta.json"
Used = TypeVar("Used")


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a split: example i is `flat[starts[i]:starts[i + 1]]`, in its shape."""

    flat: CheckedArray | Shaped[np.ndarray, " T"]
    starts: Int[np.ndarray, " N"]  # one more than examples
    shape: tuple[int, ...] | None  # None: of any length

    def __getitem__(self, i: int) -> np.ndarray:
        part = self.flat[self.starts[i] : self.starts[i + 1]]
        return part if self.shape is None else part.reshape(self.shape)

    @property
    def lengths(self) -> Int[np.ndarray, " n"]:
        """How many numbers each example has."""
        return np.diff(self.starts)


@dataclasses.dataclass(frozen=True)
class ExampleSplit:
    """The examples of one split."""

    fields: dict[str, Field]  # input, and target and text where there is one
    domain: Int[np.ndarray, " n"]
    label: Int[np.ndarray, " n"]  # 0 where there are no classes
    skipped: int  # bad records that were left out

    def __len__(self) -> int:
        return len(self.domain)

    def text(self, i: int) -> str:
        """The target of an example, as it was written."""
        try:
            return bytes(self.fields["text"][i]).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"The text of example {i} is damaged: {error}.") from error


class ExampleStore(NamedTuple):
    """All examples. `fingerprint` hashes the encoded examples and the tokenizer."""

    fields: Fields
    domains: tuple[str, ...]
    splits: dict[str, ExampleSplit]
    fingerprint: str


class Records(NamedTuple):
    """A prepared data set, by split and number."""

    name: str
    identity: str
    features: Mapping[str, Any]
    info: Any  # of the builder
    splits: tuple[str, ...]
    read: (
        Any  # split -> its records, as iterable: mappings, and `BadRecord` where one cannot be read
    )


def open_records(path: Path) -> Records:
    """Opens a prepared data set.

    Raises:
        DataError: it has no random access, or no split `train`.
    """
    builder: Any = tfds.builder_from_directory(path)
    check_format(builder, path)
    names = tuple(builder.info.splits)
    slices = split_slices(names, path)
    extra = [name for name in names if name not in (*slices, *slices.values())]
    slices |= {name: name for name in extra}

    def read(split: str) -> Shards:
        return Shards(builder, slices[split])

    name = builder.info.full_name
    features = dict(builder.info.features)
    return Records(name, dataset_identity(path), features, builder.info, tuple(slices), read)


def texts_of(records: Records, fields: Fields, skip_bad: int = 0) -> Source:
    """All texts of a task as documents, for a tokenizer to learn from; arguments of `open_examples`."""
    names = [name for name in (fields.kind == "text" and fields.input, fields.target) if name]

    def texts(record: Mapping[str, Any], where: tuple[str, int]) -> list[str]:
        return [_text(record[name], name, *where) for name in names]

    def documents(split: str) -> Iterator[Document]:
        for found in _good(records, split, texts, skip_bad):
            yield from (Document(text, DEFAULT_DOMAIN) for text in found or ())

    return Source(records.name, f"{records.identity} {names}", documents)


def open_examples(
    records: Records, fields: Fields, directory: Path, tokenizer: Tokenizer, *, skip_bad: int = 0
) -> ExampleStore:
    """Opens the encoded examples, encoding them first where that has not been done.

    Args:
        records: of `open_records`.
        fields: what the task reads.
        directory: the data directory; examples are in `examples/<key>/` below it.
        tokenizer: of texts.
        skip_bad: how many bad records of a split may be left out, and are counted.

    Raises:
        DataError: a bad record beyond those, named by split and number.
    """
    key = cache_key("examples 2", records.identity, fields, tokenizer.to_json(), skip_bad)
    path = directory / "examples" / key
    if not path.is_dir():
        with directory_in_one_go(path) as temporary:
            _write(records, fields, tokenizer, temporary, skip_bad)
    sums = check_directory(path)
    try:
        return _open(path, fields, sums)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, repr(error)) from error


def _write(records: Records, fields: Fields, tokenizer: Tokenizer, path: Path, skip: int) -> None:
    domains: dict[str, int] = {}
    digest = hashlib.sha256(tokenizer.to_json().encode())
    meta: dict[str, Any] = {"splits": {}}
    for split in records.splits:

        def encode(record: Mapping[str, Any], where: tuple[str, int]) -> _Encoded:
            return _encoded(record, fields, tokenizer, records.features, where)

        made = _good(records, split, encode, skip)
        found = _write_split(made, path, split, domains, digest)
        if not found["examples"]:
            raise DataError(f"{records.name}: the split {split} has no example.")
        meta["splits"][split] = found
    meta["domains"] = list(domains)
    digest.update("\n".join(domains).encode())
    meta["fingerprint"] = digest.hexdigest()[:32]
    (path / _META).write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _good(
    records: Records, split: str, use: Callable[[Any, tuple[str, int]], Used], skip: int
) -> Iterator[Used | None]:
    """What `use` makes of each record of a split; None for a bad one that may be left out."""
    skipped, found = 0, records.read(split)
    for number, record in enumerate(found):
        try:
            if isinstance(record, BadRecord):
                raise DataError(record.why)
            yield use(record, (split, number))
        except DataError as error:
            skipped += 1
            if skipped > skip:
                file = f" It is {found.where(number)}." if isinstance(found, Shards) else ""
                allowed = f" data.skip_bad={skip} bad records of a split may be left out."
                raise DataError(f"{records.name}: {error}{file}{allowed}") from error
            yield None


def _write_split(
    made: Iterator["_Encoded | None"], path: Path, split: str, domains: dict[str, int], digest
) -> dict[str, Any]:
    """Writes the files of one split, and numbers the domains that it meets."""
    writers: dict[str, _Writer] = {}
    domain, label, skipped = [], [], 0
    with contextlib.ExitStack() as stack:
        for example in made:
            if example is None:
                skipped += 1
                continue
            for name, value in example.arrays.items():
                if name not in writers:
                    writer = _Writer(path / f"{split}.{name}", value.dtype)
                    writers[name] = stack.enter_context(contextlib.closing(writer))
                writers[name].add(value, example.fixed.get(name))
                digest.update(np.int64(len(value)).tobytes() + value.tobytes())
            domain.append(domains.setdefault(example.domain, len(domains)))
            label.append(example.label)
        kept = {name: writer.finish() for name, writer in writers.items()}
    for name, values in (("domain", domain), ("label", label)):
        digest.update(np.array(values, np.int32).tobytes())
        np.save(path / f"{split}.{name}.npy", np.array(values, np.int32))
    return {"fields": kept, "skipped": skipped, "examples": len(domain)}


class _Encoded(NamedTuple):
    arrays: dict[str, np.ndarray]  # flat
    fixed: dict[str, tuple[int, ...]]  # shapes of what has one
    domain: str
    label: int


class _Writer:
    """One field of one split, written as it comes."""

    def __init__(self, path: Path, dtype: np.dtype):
        self._path, self._dtype, self._file = path, dtype, path.open("wb")
        self._starts, self._shape = [0], None

    def add(self, value: np.ndarray, shape: tuple[int, ...] | None) -> None:
        if shape is not None and self._shape not in (None, shape):
            self._shape = ()  # of several sizes; refused where they are read
        elif self._shape != ():
            self._shape = shape
        self._file.write(value.tobytes())
        self._starts.append(self._starts[-1] + len(value))

    def close(self) -> None:
        self._file.close()

    def finish(self) -> dict[str, Any]:
        """Writes where each example starts, and tells what the file holds."""
        np.save(f"{self._path}.starts.npy", np.array(self._starts, np.int64))
        return {"dtype": self._dtype.name, "shape": self._shape}


def _encoded(
    record: Mapping[str, Any],
    fields: Fields,
    tokenizer: Tokenizer,
    features: Mapping[str, Any],
    where: tuple[str, int],
) -> _Encoded:
    arrays, fixed = {}, {}
    value = record[fields.input]
    if fields.kind == "text":
        arrays["input"] = _ids(_text(value, fields.input, *where), tokenizer)
    else:
        value = np.asarray(value)
        wanted = features[fields.input].shape
        fits = len(value.shape) == len(wanted)
        fits = fits and all(w in (None, n) for w, n in zip(wanted, value.shape, strict=True))
        if not fits or not value.size:
            raise DataError(
                f"{fields.input} of {_at(*where)} has the shape {value.shape}, and must have "
                f"{wanted}."
            )
        arrays["input"] = value.reshape(-1)
        fixed = {"input": value.shape} if fields.kind == "image" else {}
    if fields.target is not None:
        text = _text(record[fields.target], fields.target, *where)
        arrays["target"] = _ids(text, tokenizer)
        arrays["text"] = np.frombuffer(text.encode("utf-8"), np.uint8)
    label = 0 if fields.label is None else int(record[fields.label])
    if fields.label is not None and not 0 <= label < len(fields.classes):
        raise DataError(
            f"{fields.label} of {_at(*where)} is {label}, and there are {len(fields.classes)} "
            "classes."
        )
    return _Encoded(arrays, fixed, _domain(record, fields, features, where), label)


def _domain(
    record: Mapping[str, Any],
    fields: Fields,
    features: Mapping[str, Any],
    where: tuple[str, int],
) -> str:
    if fields.domain is None:
        return DEFAULT_DOMAIN
    feature, value = features[fields.domain], record[fields.domain]
    if isinstance(feature, tfds.features.ClassLabel):
        return feature.int2str(int(value))
    return _text(value, fields.domain, *where)


def _ids(text: str, tokenizer: Tokenizer) -> np.ndarray:
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    return tokenizer.encode_batch([text])[0].astype(dtype)


def _text(value: bytes | str, name: str, split: str, number: int) -> str:
    try:
        text = value.decode("utf-8") if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} of {_at(split, number)} is not UTF-8 at byte {error.start}: {error.reason}."
        ) from error
    if not text:
        raise DataError(f"{name} of {_at(split, number)} is empty.")
    return text


def _at(split: str, number: int) -> str:
    return f"record {number} of {split}"


def _open(path: Path, fields: Fields, sums: Mapping[str, list[int]]) -> ExampleStore:
    meta = json.loads((path / _META).read_text(encoding="utf-8"))
    splits = {name: _open_split(path, name, found, sums) for name, found in meta["splits"].items()}
    domains = tuple(meta["domains"])
    for name, split in splits.items():
        _check_split(name, split, len(domains), max(1, len(fields.classes)))
    if len(set(domains)) < len(domains):
        raise ValueError(f"the domains {domains} are not all different")
    return ExampleStore(fields, domains, splits, meta["fingerprint"])


def _check_split(name: str, split: ExampleSplit, domains: int, classes: int) -> None:
    """Raises ValueError unless the files of a split agree; their checksums can be renewed."""
    check_indices(f"{name}.domain.npy", split.domain, domains)
    check_indices(f"{name}.label.npy", split.label, classes)
    if len(split.label) != len(split) or type(split.skipped) is not int:
        raise ValueError(f"{name} has {len(split.label)} labels for {len(split)} examples")
    for key, field in split.fields.items():
        check_starts(f"{name}.{key}.starts.npy", field.starts, len(split), len(field.flat))


def _open_split(
    path: Path, split: str, meta: Mapping[str, Any], sums: Mapping[str, list[int]]
) -> ExampleSplit:
    fields = {}
    for name, kept in meta["fields"].items():
        starts = read_row(path / f"{split}.{name}.starts.npy", np.int64)
        file = f"{split}.{name}"
        flat = CheckedArray(path / file, np.dtype(kept["dtype"]), sums[file])
        shape = None if kept["shape"] is None else tuple(kept["shape"])
        if shape == ():
            raise DataError(
                f"The pictures of {split} have several sizes: resize them to one when you prepare "
                "the data set."
            )
        if shape is not None and not _fits(shape, np.diff(starts)):
            raise ValueError(f"{split}.{name} has no examples of the shape {shape}")
        fields[name] = Field(flat, starts, shape)
    domain, label = (
        read_row(path / f"{split}.{part}.npy", np.int32) for part in ("domain", "label")
    )
    return ExampleSplit(fields, domain, label, meta["skipped"])


def _fits(shape: tuple[Any, ...], lengths: np.ndarray) -> bool:
    """Whether examples of these lengths have this shape."""
    whole = all(type(n) is int and n > 0 for n in shape)
    return whole and bool((lengths == math.prod(shape)).all())


def count(split: ExampleSplit, domains: Iterable[str]) -> dict[str, int]:
    """Examples by domain."""
    return {name: int((split.domain == m).sum()) for m, name in enumerate(domains)}
