"""Pictures of emoji with their names in four languages: image and text for captioning and matching.

The pictures are drawn from the colour font in memory; nothing is installed.
"""

from collections.abc import Iterator, Mapping
import io
import json
from typing import Any, NamedTuple
import zlib

from absl import logging
from jaxtyping import UInt8
import numpy as np
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError, features
import tensorflow_datasets as tfds

from moe.data.archives import Reader, require
from moe.data.packages import Package
from moe.data.sources.builder import PackageBuilder
from moe.errors import DataError

LANGUAGES = ("en", "de", "fr", "zh")
SIDE = 32  # pixels of a picture
GROUPS = (  # the order of the Unicode emoji keyboard, `meta/groups.json`
    *("smileys-emotion", "people-body", "component", "animals-nature", "food-drink"),
    *("travel-places", "activities", "objects", "symbols", "flags"),
)
NO_GROUP = "none"  # letters of which flags are made

_FONT, _NAMES = "fonts-noto-color-emoji", "emojibase-data"
_FONT_FILE = "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
_PIXELS = 109  # the one size of the font's bitmaps
_CANVAS = (136, 128)  # width and height of one of them

PACKAGES = (
    Package(
        "apt",
        _FONT,
        "2.042-0+deb12u1",
        "a5ab0f69c7938423862320d9aca5dd187b3fd879d6a9a57dd52e17c3fa8d2751",
        9_893_872,
    ),
    Package(
        "npm",
        _NAMES,
        "17.0.0",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
        6_711_091,
    ),
)

_REASONS = {
    "blank": "emoji that the font has no picture of",
    "several": "emoji that the font draws as several",
}

Members = Mapping[str, Reader]


class Picture(NamedTuple):
    """One emoji.

    Attributes:
        hexcode: its code points.
        pixels: colours on white.
        names: language -> name.
        group: one of `GROUPS` or `NO_GROUP`.
    """

    hexcode: str
    pixels: UInt8[np.ndarray, "H W 3"]
    names: dict[str, str]
    group: str


class EmojiNames(PackageBuilder):
    """1,934 emoji in 32 x 32 colours with their English, German, French and Chinese names.

    Features: `image` uint8 (32, 32, 3), `text` the name, `domain` the language, `name` the code
    points, `group`. An example is one picture in one language. Splits are 80, 10 and 10% by the
    CRC-32 of the pixels, so that a picture, its copies and all its names lie on one side. Variants
    of skin tone are nearly the same picture and left out; so are emoji that the font lacks (blank,
    or drawn as several glyphs), which are counted in the log and in the data set's metadata.

    Licences: font SIL Open Font License 1.1 (noto-emoji, Google), names MIT (emojibase-data, Miles
    Johnson; from Unicode CLDR, Unicode License).
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        texts = dict.fromkeys(("text", "domain", "name"), tfds.features.Text())
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIDE, SIDE, 3), encoding_format="png"),
                    "group": tfds.features.ClassLabel(names=[*GROUPS, NO_GROUP]),
                    **texts,
                }
            ),
            supervised_keys=("image", "text"),
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict]]]:
        del dl_manager
        found, left_out = pictures(self.members(_FONT), self.members(_NAMES))
        skipped = {_REASONS[reason]: len(codes) for reason, codes in left_out.items() if codes}
        self.info.metadata["skipped"] = skipped
        logging.warning("%s: %d pictures; left out %s", self.name, len(found), skipped)
        return {
            split: self._generate_examples(found, split) for split in ("train", "valid", "test")
        }

    def _generate_examples(
        self, found: list[Picture], split: str
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for picture in found:
            if split_of(picture.pixels) != split:
                continue
            image = Image.fromarray(picture.pixels)
            for language, name in picture.names.items():
                yield (
                    f"{picture.hexcode}-{language}",
                    {
                        "image": image,
                        "text": name,
                        "domain": language,
                        "name": picture.hexcode,
                        "group": picture.group,
                    },
                )


def split_of(pixels: UInt8[np.ndarray, "H W 3"]) -> str:
    """The split of a picture, by its pixels alone: 80% train, 10% valid, 10% test."""
    tenth = zlib.crc32(pixels.tobytes()) % 10
    return {8: "valid", 9: "test"}.get(tenth, "train")


def pictures(font: Members, names: Members) -> tuple[list[Picture], dict[str, list[str]]]:
    """Draws every emoji of the English list, in its order.

    Args:
        font: of `fonts-noto-color-emoji`.
        names: of `emojibase-data`.

    Returns:
        The pictures, and the code points of those left out by reason: `blank` (the font has no
        picture) and `several` (drawn as a row of other emoji).

    Raises:
        DataError: Pillow cannot join code points, the font or a list cannot be read, or a language
            lacks a name; tells which.
    """
    drawing = _font(font)
    records = {language: _records(names, language) for language in LANGUAGES}
    found, skipped = [], {"blank": [], "several": []}
    for hexcode, record in records["en"].items():
        pixels, missing = _draw(drawing, record["emoji"])
        if pixels is None:
            skipped[missing].append(hexcode)
            continue
        group = record.get("group")
        found.append(
            Picture(
                hexcode,
                pixels,
                {language: _name(records[language], hexcode, language) for language in LANGUAGES},
                NO_GROUP if group is None else GROUPS[group],
            )
        )
    return found, skipped


def _font(members: Members) -> ImageFont.FreeTypeFont:
    if not features.check("raqm"):
        raise DataError(
            "Drawing emoji needs a Pillow with libraqm, which joins code points to one picture; "
            "this one has none. Pillow's wheels bring it: python3 -m pip install --force-reinstall "
            "--only-binary :all: pillow."
        )
    try:
        return ImageFont.truetype(io.BytesIO(require(members, _FONT_FILE, _FONT)), _PIXELS)
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{_FONT}: {_FONT_FILE} is no font that Pillow reads: {error}.") from error


def _records(members: Members, language: str) -> dict[str, dict[str, Any]]:
    """Records of one language by code points."""
    name = f"package/{language}/data.json"
    try:
        listed = json.loads(require(members, name, _NAMES))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is of the first kind
        raise DataError(f"{_NAMES}: {name} is no JSON: {error}.") from error
    if not isinstance(listed, list):
        raise DataError(f"{_NAMES}: {name} is no list of records.")
    for number, record in enumerate(listed):
        if not _is_whole(record):
            raise DataError(
                f"{_NAMES}: record {number} of {name} lacks a hexcode, an emoji or a label, or is of no "
                f"group: {record}."
            )
    return {record["hexcode"]: record for record in listed}


def _is_whole(record: Any) -> bool:
    if not isinstance(record, dict) or record.get("group") not in (None, *range(len(GROUPS))):
        return False
    texts = [record.get(key) for key in ("hexcode", "emoji", "label")]
    return all(text and isinstance(text, str) for text in texts)


def _name(records: Mapping[str, Mapping[str, Any]], hexcode: str, language: str) -> str:
    if hexcode not in records:
        raise DataError(f"{_NAMES}: the emoji {hexcode} has no name in the language {language!r}.")
    return records[hexcode]["label"]


def _draw(font: ImageFont.FreeTypeFont, text: str) -> tuple[UInt8[np.ndarray, "H W 3"] | None, str]:
    """The picture of one emoji, or None and the reason."""
    if font.getlength(text) > _CANVAS[0]:
        return None, "several"
    canvas = Image.new("RGB", _CANVAS, "white")
    ImageDraw.Draw(canvas).text((0, 0), text, fill="black", font=font, embedded_color=True)
    pixels = np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    return (None, "blank") if pixels.min() == 255 else (pixels, "")
