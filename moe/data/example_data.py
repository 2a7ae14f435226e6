"""A data set of examples, each a row of its own: classification, translation, speech, matching."""

from collections.abc import Mapping, Sequence
import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from moe.data.audio import sample_rate
from moe.data.batches import RowData, mixing_weights
from moe.data.example_rows import ExampleRows, Layout, frame_shape, needed
from moe.data.examples import ExampleStore, Records, count, open_examples, texts_of
from moe.data.features import Fields, find_fields
from moe.data.images import num_patches
from moe.data.order import stack
from moe.data.store import cached_tokenizer
from moe.data.tokenizers import Tokenizer
from moe.data.types import Batch
from moe.errors import ConfigError, DataError


def example_data(
    records: Records,
    *,
    task: str,
    root: Path,
    batch_size: int,
    sequence_length: int,
    seed: int,
    prefix: bool = False,
    tokenizer: str = "bytes",
    vocab_size: int | None = None,
    weights: Mapping[str, int | float] | None = None,
    input_feature: str | None = None,
    target_feature: str | None = None,
    label_feature: str = "label",
    patch: int = 4,
    stride: int | None = None,
    sample_rate_wanted: int | None = None,
    mels: int = 40,
    too_long: str = "truncate",
    skip_bad: int = 0,
    corruption: str | None = None,
    saved_tokenizer: Tokenizer | None = None,
) -> "ExampleData":
    """Opens and encodes a prepared data set for a task.

    Args:
        records: the data set.
        task: `classify`, `seq2seq`, `ctc` or `match`.
        root: the data directory.
        batch_size: rows of the global batch.
        sequence_length: positions of a row.
        seed: of the order of rows in training, and of corruptions.
        prefix: whether all of a source sees all of it, of `seq2seq`.
        tokenizer: `bytes`, `bpe` or `characters`.
        vocab_size: of `bpe` and `characters`.
        weights: domain to weight in training. None: by size.
        input_feature: what is read; None takes the task's usual one.
        target_feature: what is predicted; None takes the task's usual one.
        label_feature: class of `classify`.
        patch: side of the patches of a picture, pixels.
        stride: between patches, pixels; None: `patch`.
        sample_rate_wanted: of sound; None takes that of the data set.
        mels: bands of log-mel frames.
        too_long: `truncate`, `skip` or `error`.
        skip_bad: bad records that may be left out of a split.
        corruption: `kind:severity`, of the inputs; see `moe.data.corrupt`.
        saved_tokenizer: overrides `tokenizer` and `vocab_size`.

    Raises:
        ConfigError: features or numbers that cannot work.
        DataError: records that cannot be read.
    """
    asked = {"input_feature": input_feature, "target_feature": target_feature}
    fields = find_fields(task, records.features, **asked, label_feature=label_feature)
    rate = _rate(records, fields, sample_rate_wanted)
    made = saved_tokenizer or cached_tokenizer(
        texts_of(records, fields, skip_bad), root, tokenizer, vocab_size
    )
    store = open_examples(records, fields, root, made, skip_bad=skip_bad)
    layout = Layout(
        task=task,
        fields=fields,
        tokenizer=made,
        length=sequence_length,
        patch=patch,
        stride=stride or patch,
        rate=rate,
        mels=mels,
        prefix=prefix,
        too_long=too_long,
        corruption=None if corruption is None else _corruption(corruption),
        seed=seed,
    )
    _check_length(store, layout)
    mix = mixing_weights(weights, count(store.splits["train"], store.domains))
    data = ExampleData(made, mix, batch_size, sequence_length, seed, store, layout)
    data.check_size(records.name)
    return data


def _corruption(text: str) -> tuple[str, float]:
    """`kind:severity` of `data.corrupt`."""
    kind, _, severity = text.partition(":")
    try:
        return kind, float(severity)
    except ValueError as error:
        raise ConfigError(
            f"data.corrupt={text!r} is not kind:severity with a number, as typos:0.1 is."
        ) from error


def _rate(records: Records, fields: Fields, wanted: int | None) -> int:
    if fields.kind != "audio":
        return 0
    rate = sample_rate(records.info, fields.input)
    if wanted not in (None, rate):
        raise DataError(
            f"{records.name} has sound of {rate} samples a second, and data.sample_rate={wanted}. "
            "Prepare the data set at that rate, or set data.sample_rate=none to take what is there."
        )
    return rate


def _check_length(store: ExampleStore, layout: Layout) -> None:
    length, train = layout.length, store.splits["train"]
    if layout.fields.kind == "image":
        shape = train.fields["input"].shape
        assert shape is not None
        frames = num_patches(shape, layout.patch, layout.stride)
        least = frames if layout.task == "classify" else frames + 2
        if length < least or (layout.task == "classify" and length != frames):
            rule = "exactly" if layout.task == "classify" else "at least"
            raise ConfigError(
                f"data.sequence_length={length}: pictures of {shape} in patches of {layout.patch} "
                f"pixels, {layout.stride} apart, need {rule} {least} positions. Set "
                f"data.sequence_length={least}, or change data.patch."
            )
    if layout.too_long == "error" or layout.task == "ctc":
        for name, split in store.splits.items():
            sizes = needed(split, layout)
            over = np.flatnonzero(sizes > length)
            if len(over) and layout.too_long != "skip":
                raise DataError(
                    f"record {over[0]} of {name} and {len(over) - 1} others do not fit "
                    f"data.sequence_length={length} (or have more labels than positions). Make rows "
                    "longer, or set data.too_long=skip, which leaves them out and counts them."
                )


@dataclasses.dataclass(frozen=True)
class ExampleData(RowData):
    """Encoded examples, ready to be read."""

    kind: ClassVar[str] = "examples"

    store: ExampleStore = dataclasses.field(repr=False)
    layout: Layout = dataclasses.field(repr=False)

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains; `Batch.domain` indexes them."""
        return self.store.domains

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; `Batch.label` indexes them."""
        return self.store.fields.classes

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self.store.splits)

    @property
    def fingerprint(self) -> str:
        """Hash of all examples and of the tokenizer."""
        return self.store.fingerprint

    @property
    def frame_shape(self) -> tuple[int, int] | None:
        """`(N, F)` of the frames of a row; None for text."""
        return frame_shape(self.store.splits["train"], self.layout)

    def like(self) -> Batch:
        """A batch of one row, for the shapes of all others."""
        return stack([next(rows for rows in self.rows("train") if len(rows))[0]])

    def token_counts(self) -> np.ndarray:
        """How often each id occurs in train, `[V]`."""
        fields, size = self.store.splits["train"].fields, self.tokenizer.vocab_size
        names = [name for name in ("input", "target") if name in fields]
        if self.store.fields.kind != "text":
            names.remove("input")
        return sum(
            (np.bincount(fields[name].flat[:], minlength=size) for name in names),
            np.zeros(size, int),
        )

    def rows(self, split: str) -> list[ExampleRows]:
        """The rows of each domain: in training only those with a weight."""
        self.check_split(split)
        found = self.store.splits[split]
        return [
            ExampleRows(found, m, self.layout)
            for m, name in enumerate(self.domains)
            if name in self.weights or split != "train"
        ]

    def _identity(self) -> dict[str, Any]:
        too_long = (
            "skip" if self.layout.too_long == "skip" else "keep"
        )  # decides which rows there are
        return {**super()._identity(), "too_long": too_long}

    def references(self, split: str, index: Sequence[int] | np.ndarray) -> list[str]:
        """The targets of these examples, as they were written."""
        return [self.store.splits[split].text(int(i)) for i in index]

    def left_out(self, split: str) -> dict[str, int]:
        """Examples of a split that are cut, or left out: too long for a row, or bad records."""
        found = self.store.splits[split]
        over = 0
        if self.layout.fields.kind != "image" or self.layout.task != "classify":
            over = int((needed(found, self.layout) > self.layout.length).sum())
        skip = self.layout.too_long == "skip"
        return {"too_long": over if skip else 0, "cut": 0 if skip else over, "bad": found.skipped}
