"""Fashion-MNIST from a Debian package: the four official files."""

from collections.abc import Mapping
import struct

from jaxtyping import UInt8
import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

from moe.data.archives import Reader, inflate, largest, require
from moe.data.packages import Package
from moe.data.sources.builder import PackageBuilder
from moe.errors import DataError

PACKAGES = (
    Package(
        "apt",
        "dataset-fashion-mnist",
        "0.0~git20200523.55506a9-1",
        "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        30_900_652,
    ),
)
CLASSES = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)

_FOLDER = "usr/share/datasets/fashion-mnist"
_VALID = 5_000  # pictures at the end of the official training part
_GZIP = 31  # of zlib's `wbits`: with the header and checksum of gzip
_UNSIGNED_BYTE = 0x08  # type code of idx


class FashionMnistImages(PackageBuilder):
    """Pictures of clothes in grey, 28x28, ten balanced classes (Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747).

    The official split of 60,000 and 10,000; `valid` is the last 5,000 of the first part, by index.
    Licence of the data: MIT, Zalando SE.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Fashion-MNIST: 28x28 grey pictures of clothes in ten classes.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(28, 28, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=list(CLASSES)),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # the archive is there
        images, labels = read_part(self.members(PACKAGES[0].name), "train")
        cut = len(images) - _VALID
        if cut <= 0:
            raise DataError(
                f"Fashion-MNIST train has {len(images)} pictures, of which the last {_VALID} are held "
                "out: it is not the official file."
            )
        test = read_part(self.members(PACKAGES[0].name), "t10k")
        return {
            "train": self._generate_examples(images[:cut], labels[:cut]),
            "valid": self._generate_examples(images[cut:], labels[cut:]),
            "test": self._generate_examples(*test),
        }

    def _generate_examples(
        self, images: UInt8[np.ndarray, "N H W"], labels: UInt8[np.ndarray, " N"]
    ):
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield index, {"image": Image.fromarray(image), "label": int(label)}


def read_part(
    members: Mapping[str, Reader], part: str
) -> tuple[UInt8[np.ndarray, "N H W"], UInt8[np.ndarray, " N"]]:
    """Pictures and labels of `train` or `t10k`.

    Raises:
        DataError: a file is missing, truncated or corrupt, pictures and labels are not one to one,
            or a label is outside the classes; names the record.
    """
    images = _read_idx(members, f"{_FOLDER}/{part}-images-idx3-ubyte.gz", dimensions=3)
    labels = _read_idx(members, f"{_FOLDER}/{part}-labels-idx1-ubyte.gz", dimensions=1)
    if len(images) != len(labels):
        raise DataError(f"Fashion-MNIST {part}: {len(images)} pictures but {len(labels)} labels.")
    outside = np.flatnonzero(labels >= len(CLASSES))
    if outside.size:
        raise DataError(
            f"Fashion-MNIST {part}, record {outside[0]}: label {labels[outside[0]]} is outside the "
            f"{len(CLASSES)} classes."
        )
    return images, labels


def _read_idx(
    members: Mapping[str, Reader], name: str, *, dimensions: int
) -> UInt8[np.ndarray, "..."]:
    """Reads unsigned bytes in idx: two zero bytes, type, dimensions, then big-endian sizes and data."""
    packed = require(members, name, PACKAGES[0].name)
    data, rest = inflate(packed, name, largest(len(packed)), wbits=_GZIP)
    if rest:
        raise DataError(f"{name} is damaged: {len(rest)} bytes follow its end.")
    start = 4 + 4 * dimensions
    if len(data) < start or data[:4] != bytes((0, 0, _UNSIGNED_BYTE, dimensions)):
        raise DataError(f"{name} is no idx file of unsigned bytes in {dimensions} dimensions.")
    shape = struct.unpack(f">{dimensions}I", data[4:start])
    if len(data) - start != np.prod(shape, dtype=np.int64):
        raise DataError(f"{name} holds {len(data) - start} bytes for shape {shape}.")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
