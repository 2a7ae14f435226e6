"""Tiny data sets of examples, in memory."""

from unittest.mock import Mock

import numpy as np
import tensorflow_datasets as tfds

from moe.data.audio import audio_feature
from moe.data.examples import Records
from moe.data.sources.types import SPLITS

PAIRS = {
    "train": [("one", "uno"), ("two", "dos"), ("three and four", "tres y cuatro")],
    "valid": [("five", "cinco")],
    "test": [("six", "seis"), ("seven", "siete")],
}
RATE = 8000
COUNT = 4  # examples of a split of pictures or sounds


def records(features, rows, *, metadata=None, identity="0"):
    """A data set of these rows by split, each a dict."""
    info = Mock(spec=tfds.core.DatasetInfo, metadata=metadata, features=features)
    return Records("tiny", identity, features, info, tuple(rows), lambda split: iter(rows[split]))


def pairs(rows=None, **how):
    """Sources and targets, of two domains by their place."""
    features = {name: tfds.features.Text() for name in ("source", "target", "domain")}
    made = {
        split: [
            {"source": s.encode(), "target": t, "domain": ("even", "odd")[i % 2]}
            for i, (s, t) in enumerate(found)
        ]
        for split, found in (rows or PAIRS).items()
    }
    return records(features, made, **how)


def pictures(side=8, **changes):
    """Grey squares whose brightness is their class, and a name for each."""
    features = {
        "image": tfds.features.Image(shape=(side, side, 1)),
        "label": tfds.features.ClassLabel(names=["dark", "bright"]),
        "text": tfds.features.Text(),
    }
    row = {
        split: [
            {
                "image": np.full((side, side, 1), 200 * (i % 2) + i, np.uint8),
                "label": i % 2,
                "text": ("dark", "bright")[i % 2],
            }
            | changes
            for i in range(COUNT)
        ]
        for split in SPLITS
    }
    return records(features, row)


def sounds(seconds=0.2, text="abba"):
    """Noise with a text, at 8 kHz."""
    rng = np.random.default_rng(0)
    features = {
        "audio": audio_feature(),
        "text": tfds.features.Text(),
        "label": tfds.features.ClassLabel(names=["a", "b"]),
    }
    rows = {
        split: [
            {
                "audio": rng.integers(-999, 999, int(RATE * seconds)).astype(np.int16),
                "text": text,
                "label": i % 2,
            }
            for i in range(COUNT)
        ]
        for split in SPLITS
    }
    return records(features, rows, metadata={"sample_rate": {"audio": RATE}})
