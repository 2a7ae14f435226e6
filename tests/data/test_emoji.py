"""Pictures and names of emoji, with Pillow's own font of letters for the font of emoji."""

from collections import Counter
import json

import numpy as np
from PIL import ImageFont
import pytest
import tensorflow_datasets as tfds

from moe.data.sources import builder, emoji
from moe.errors import DataError

GLYPHS = {"41": "A", "42": "B", "41-FE0F": "A", "20": " ", "57": "WW"}  # one twice, one blank
FONT_FILE = "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"


def font() -> dict:
    data = ImageFont.load_default(20).font_bytes
    return {FONT_FILE: lambda: data}


def names(glyphs: dict = GLYPHS, **changes: str) -> dict:
    """Files of the four languages; `changes` replaces the text of one."""

    def text(language: str) -> bytes:
        records = [
            {"hexcode": code, "emoji": glyph, "label": f"{language} {code}"}
            | ({"group": 1} if glyph == "A" else {})
            for code, glyph in glyphs.items()
        ]
        return changes.get(language, json.dumps(records)).encode()

    return {
        f"package/{language}/data.json": lambda language=language: text(language)
        for language in emoji.LANGUAGES
    }


def test_pictures_are_drawn_and_what_is_missing_is_named():
    found, skipped = emoji.pictures(font(), names())
    assert [picture.hexcode for picture in found] == ["41", "42", "41-FE0F"]
    assert skipped == {"blank": ["20"], "several": ["57"]}
    one, other, copy = (picture.pixels for picture in found)
    assert one.shape == (32, 32, 3)
    assert one.dtype == np.uint8
    assert 0 < (one < 128).mean() < 0.5
    np.testing.assert_array_equal(one, copy)
    assert (one != other).any()
    assert found[0].names == {language: f"{language} 41" for language in emoji.LANGUAGES}
    assert [picture.group for picture in found] == ["people-body", "none", "people-body"]


def test_splits_are_by_pixels_alone():
    pictures = np.random.default_rng(0).integers(0, 256, (2000, 2, 2, 3)).astype(np.uint8)
    splits = [emoji.split_of(pixels) for pixels in pictures]
    share = {split: count / 2000 for split, count in Counter(splits).items()}
    assert share == pytest.approx({"train": 0.8, "valid": 0.1, "test": 0.1}, abs=0.03)
    copies = np.swapaxes(np.swapaxes(pictures, 1, 2).copy(), 1, 2)  # of other strides
    assert [emoji.split_of(pixels) for pixels in copies] == splits


def test_builder_writes_a_picture_once_for_each_language(tmp_path):
    made = emoji.EmojiNames(data_dir=tmp_path, file_format="array_record")
    letters = {f"{ord(c):X}": c for c in "ABCDEFGHIJKLMNOPRSTUVXYZ"}
    made.__dict__["_opened"] = {
        "fonts-noto-color-emoji": font(),
        "emojibase-data": names(GLYPHS | letters),
    }
    builder.write_quietly(made)
    read = tfds.builder_from_directory(made.data_path)
    assert list(read.info.metadata["skipped"].values()) == [1, 1]
    sides: dict[bytes, set] = {}
    languages: dict[str, set] = {}
    for split in ("train", "valid", "test"):
        for example in read.as_data_source(split):
            assert example["image"].shape == (32, 32, 3)
            code, language = (example[key].decode() for key in ("name", "domain"))
            assert example["text"].decode() == f"{language} {code}"
            sides.setdefault(example["image"].tobytes(), set()).add(split)
            languages.setdefault(code, set()).add(language)
    assert set(languages) == {"41-FE0F", *letters}
    assert all(found == set(emoji.LANGUAGES) for found in languages.values())
    assert all(len(found) == 1 for found in sides.values())
    assert len(sides) == len(letters)
    assert len({split for found in sides.values() for split in found}) == 3


@pytest.mark.parametrize(
    ("fonts", "files", "said"),
    [
        ({}, names(), "NotoColorEmoji"),
        ({FONT_FILE: lambda: b"no font"}, names(), "is no font that Pillow reads"),
        (font(), names(de="{"), "package/de/data.json is no JSON"),
        (font(), names(fr='[{"hexcode": "41", "emoji": "A"}]'), "record 0 of package/fr"),
        (font(), names(zh="[]"), "41 has no name in the language 'zh'"),
    ],
)
def test_damage_is_told(fonts, files, said):
    with pytest.raises(DataError, match=said):
        emoji.pictures(fonts, files)


def test_pillow_without_raqm_is_refused(monkeypatch):
    monkeypatch.setattr(emoji.features, "check", lambda name: name != "raqm")
    with pytest.raises(DataError, match="libraqm"):
        emoji.pictures(font(), names())
