"""Rows of one example each: where its tokens and frames stand, and which targets count.

With `b` the tokenizer's boundary, a row of

    classify   is  b t1 ... tn                            or frames
    seq2seq    is  b s1 ... sn b t1 ... tm                or frames b t1 ... tm
    ctc        is  frames; targets[:U] are the labels, scored there
    match      is  b s1 ... sn, then b t1 ... tm          or frames, then b t1 ... tm

Of `seq2seq`, the second boundary predicts t1 and tm predicts the boundary: those targets are scored.
The two parts of `match` are segments 1 and 2, which do not see each other.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Float, Int
import numpy as np

from moe.data.audio import alignment_frames, log_mel, num_frames, read_pcm
from moe.data.corrupt import corrupt
from moe.data.examples import ExampleSplit
from moe.data.features import Fields
from moe.data.images import num_patches, patches
from moe.data.pack import Row
from moe.data.tokenizers import Tokenizer
from moe.data.types import FRAMES, STEM_STRIDE, TEXT


class Layout(NamedTuple):
    """How examples become rows."""

    task: str
    fields: Fields
    tokenizer: Tokenizer
    length: int  # S
    patch: int = 1  # side of a patch of a picture, pixels
    stride: int = 1  # between patches, pixels
    rate: int = 0  # of sound, samples a second
    mels: int = 0
    prefix: bool = False  # whether all of a source sees all of it
    too_long: str = "truncate"  # or skip: examples that a row does not hold
    corruption: tuple[str, float] | None = None  # of inputs: kind and severity
    seed: int = 0  # of corruptions


class ExampleRows:
    """The rows of one domain of one split, by random access."""

    def __init__(self, split: ExampleSplit, domain: int, layout: Layout):
        own = np.flatnonzero(split.domain == domain)
        if layout.too_long == "skip":
            own = own[needed(split, layout)[own] <= layout.length]
        self._split, self._own, self._layout = split, own, layout
        self._make = _MAKERS[layout.task]

    def __len__(self) -> int:
        return len(self._own)

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        i = int(self._own[index])
        row = self._make(self._split, i, self._layout)
        return row._replace(domain=np.int32(self._split.domain[i]), index=np.int32(i))


def needed(split: ExampleSplit, layout: Layout) -> Int[np.ndarray, " n"]:
    """Positions that each example takes; more than fit any row where CTC cannot align it."""
    size = np.zeros(len(split), np.int64)
    sizes = split.fields["input"].lengths
    if layout.fields.kind == "text":
        size = size + sizes + 1
    elif layout.fields.kind == "image":
        size = size + _patch_count(split, layout)
    else:
        size = size + -(-num_frames(sizes, rate=layout.rate) // STEM_STRIDE)
    if layout.task == "ctc":
        target = split.fields["target"]
        labels = np.array([alignment_frames(target[i]) for i in range(len(split))])
        return np.where(labels > size, np.iinfo(np.int64).max, size)
    if layout.task in ("seq2seq", "match"):
        size = size + split.fields["target"].lengths + 1
    return size


def frame_shape(split: ExampleSplit, layout: Layout) -> tuple[int, int] | None:
    """`(N, F)` of the frames of a row; None for text."""
    if layout.fields.kind == "text":
        return None
    if layout.fields.kind == "audio":
        return layout.length * STEM_STRIDE, layout.mels
    return patches(_image(split, 0), layout.patch, layout.stride).shape


def _patch_count(split: ExampleSplit, layout: Layout) -> int:
    shape = split.fields["input"].shape
    assert shape is not None
    return num_patches(shape, layout.patch, layout.stride)


def _image(split: ExampleSplit, i: int) -> np.ndarray:
    return np.asarray(split.fields["input"][i])


def _classify(split: ExampleSplit, i: int, layout: Layout) -> Row:
    label = np.int32(split.label[i])
    if layout.fields.kind == "text":
        part = _with_boundary(_source(split, i, layout), layout)[: layout.length]
        return _laid_out([part], layout)._replace(label=label)
    return _of_frames(split, i, layout)._replace(label=label)


def _ctc(split: ExampleSplit, i: int, layout: Layout) -> Row:
    labels = split.fields["target"][i][: layout.length]
    scored = np.arange(layout.length) < len(labels)
    row = _of_frames(split, i, layout)
    return row._replace(targets=_padded(labels, layout.length), scored=scored)


def _of_frames(split: ExampleSplit, i: int, layout: Layout) -> Row:
    """A row of frames alone."""
    frames, positions = _frames(split, i, layout)
    row = _laid_out([np.zeros(positions, np.int32)], layout)
    return row._replace(frames=frames, modality=_modality(positions, layout))


def _seq2seq(split: ExampleSplit, i: int, layout: Layout) -> Row:
    target = _with_boundary(split.fields["target"][i], layout)
    frames, modality = None, None
    if layout.fields.kind == "text":
        target = target[: layout.length - 1]
        source = _source(split, i, layout)
        room = layout.length - 1 - len(target)
        source = _with_boundary(
            source[max(0, len(source) - room) :], layout
        )  # questions stand last
    else:
        frames, positions = _frames(split, i, layout)
        source, modality = np.zeros(positions, np.int32), _modality(positions, layout)
        target = target[: layout.length - positions]
    row = _laid_out([np.concatenate([source, target])], layout)
    n, m = len(source), len(target)
    following = np.concatenate([target[1:], [layout.tokenizer.boundary]])
    at = np.arange(layout.length)
    targets = np.zeros(layout.length, np.int32)
    targets[: n - 1], targets[n - 1 : n + m - 1], targets[n + m - 1] = (
        source[1:],
        target,
        following[-1],
    )
    return row._replace(
        targets=targets,
        scored=(at >= n) & (at < n + m),
        prefix=(at <= n) if layout.prefix else None,
        frames=frames,
        modality=modality,
    )


def _match(split: ExampleSplit, i: int, layout: Layout) -> Row:
    target = _with_boundary(split.fields["target"][i], layout)
    if layout.fields.kind == "text":
        source = _with_boundary(_source(split, i, layout), layout)
        source = source[: max(1, layout.length - min(len(target), layout.length // 2))]
        return _laid_out([source, target[: layout.length - len(source)]], layout)
    frames, positions = _frames(split, i, layout)
    parts = [np.zeros(positions, np.int32), target[: layout.length - positions]]
    modality = _modality(positions, layout)
    return _laid_out(parts, layout)._replace(frames=frames, modality=modality)


_MAKERS: dict[str, Callable[[ExampleSplit, int, Layout], Row]] = {
    "classify": _classify,
    "seq2seq": _seq2seq,
    "ctc": _ctc,
    "match": _match,
}


def _laid_out(parts: list[np.ndarray], layout: Layout) -> Row:
    """The parts one after another as segments 1, 2, ...; no targets."""
    length, sizes = layout.length, [len(part) for part in parts]
    segments = np.repeat(np.arange(1, len(parts) + 1), sizes)
    positions = np.concatenate([np.arange(size) for size in sizes])
    tokens = _padded(np.concatenate(parts), length)
    valid = np.arange(length) < sum(sizes)
    none = np.zeros(length, np.int32)
    return Row(
        tokens, none, _padded(segments, length), _padded(positions, length), valid, np.int32(0)
    )


def _with_boundary(ids: np.ndarray, layout: Layout) -> np.ndarray:
    return np.concatenate([[layout.tokenizer.boundary], ids]).astype(np.int32)


def _padded(values: np.ndarray, length: int) -> Int[np.ndarray, " S"]:
    out = np.zeros(length, np.int32)
    out[: len(values)] = values
    return out


def _modality(frames: int, layout: Layout) -> Int[np.ndarray, " S"]:
    return np.where(np.arange(layout.length) < frames, FRAMES, TEXT).astype(np.int32)


def _source(split: ExampleSplit, i: int, layout: Layout) -> np.ndarray:
    ids = split.fields["input"][i]
    if layout.corruption is None:
        return ids
    text = _corrupted(layout.tokenizer.decode(ids), i, layout)
    return layout.tokenizer.encode_batch([text])[0]


def _frames(split: ExampleSplit, i: int, layout: Layout) -> tuple[Float[np.ndarray, "N F"], int]:
    """Frames of one example, padded to those of a row, and the positions that they take."""
    if layout.fields.kind == "image":
        made = patches(_corrupted(_image(split, i), i, layout), layout.patch, layout.stride)
        return made, len(made)
    sound = _corrupted(np.asarray(split.fields["input"][i]), i, layout)
    pcm = read_pcm(sound, rate=layout.rate, expected=layout.rate, where=f"example {i}")
    made = log_mel(pcm, rate=layout.rate, mels=layout.mels, normalise=True)
    made = made[: layout.length * STEM_STRIDE]
    frames = np.zeros((layout.length * STEM_STRIDE, layout.mels), np.float32)
    frames[: len(made)] = made
    return frames, -(-len(made) // STEM_STRIDE)


def _corrupted(value, i: int, layout: Layout):
    if layout.corruption is None:
        return value
    kind, severity = layout.corruption
    return corrupt(kind, value, severity=severity, seed=layout.seed, index=i)
