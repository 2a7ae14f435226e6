"""Which features of a prepared data set a task reads."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

from moe.config import nearest
from moe.errors import ConfigError

KINDS = ("text", "image", "audio")
# What each task reads where the config names nothing: (input, target), the first that is there.
_DEFAULTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "classify": (("image", "audio", "text", "sentence", "source"), ()),
    "seq2seq": (("source", "image"), ("target", "text")),
    "ctc": (("audio",), ("text", "target")),
    "match": (("image", "source"), ("text", "target")),
}
_TAKES = {  # kinds of the input
    "classify": KINDS,
    "seq2seq": ("text", "image"),
    "ctc": ("audio",),
    "match": ("text", "image"),
}


class Fields(NamedTuple):
    """Names of features, and what they hold."""

    input: str
    kind: str  # text, image or audio
    target: str | None  # text
    label: str | None
    classes: tuple[str, ...]
    domain: str | None


def find_fields(
    task: str,
    features: Mapping[str, Any],
    *,
    input_feature: str | None = None,
    target_feature: str | None = None,
    label_feature: str = "label",
) -> Fields:
    """Chooses the features of a task.

    Args:
        task: `classify`, `seq2seq`, `ctc` or `match`.
        features: of the data set, by name.
        input_feature: `data.input_feature`; None takes the usual one.
        target_feature: `data.target_feature`; None takes the usual one.
        label_feature: `data.label_feature`, of `classify`.

    Raises:
        ConfigError: a feature that the data set lacks, or of a kind that the task cannot read.
    """
    inputs, targets = _DEFAULTS[task]
    name = _pick("data.input_feature", input_feature, inputs, features)
    kind = kind_of(features[name])
    if kind not in _TAKES[task]:
        raise ConfigError(
            f"data.input_feature={name!r} is {kind or 'of another kind'}, and task.name={task!r} "
            f"reads {' or '.join(_TAKES[task])}. Choose another feature or task."
        )
    target = None
    if targets:
        target = _pick("data.target_feature", target_feature, targets, features)
        if kind_of(features[target]) != "text":
            raise ConfigError(f"data.target_feature={target!r} is no text; {_texts(features)}.")
    label, classes = None, ()
    if task == "classify":
        label = _pick("data.label_feature", label_feature, (), features)
        if not isinstance(features[label], tfds.features.ClassLabel):
            raise ConfigError(f"data.label_feature={label!r} is no ClassLabel of the data set.")
        classes = tuple(features[label].names)
    domain = "domain" if _is_domain(features.get("domain")) else None
    return Fields(name, kind, target, label, classes, domain)


def _pick(key: str, asked: str | None, usual: tuple[str, ...], features: Mapping[str, Any]) -> str:
    if asked is not None:
        if asked not in features:
            raise ConfigError(
                f"{key}={asked!r} is no feature of the data set; {nearest(asked, features)}."
            )
        return asked
    for name in usual:
        if name in features:
            return name
    raise ConfigError(
        f"{key}=None, and the data set has none of {', '.join(usual)}: it has "
        f"{', '.join(features)}. Name the feature."
    )


def kind_of(feature: Any) -> str:
    """`text`, `image`, `audio`, or "" for another feature of TFDS."""
    if isinstance(feature, tfds.features.Text):
        return "text"
    if isinstance(feature, tfds.features.Image):
        return "image"
    is_sound = isinstance(feature, tfds.features.Audio)
    if is_sound or (isinstance(feature, tfds.features.Tensor) and feature.shape == (None,)):
        return "audio"
    return ""


def _is_domain(feature: Any) -> bool:
    return isinstance(feature, tfds.features.Text | tfds.features.ClassLabel)


def _texts(features: Mapping[str, Any]) -> str:
    return "its texts are " + ", ".join(n for n, f in features.items() if kind_of(f) == "text")
