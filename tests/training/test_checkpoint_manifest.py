"""The list of a checkpoint's files: what it was written with, and what it tells of what changed."""

import hashlib
import json
from pathlib import Path

import pytest

from moe.errors import CheckpointError
from moe.training import manifest
from moe.training.record import sign
from tests.training.tiny_checkpoints import flip_byte, restore_small, save_steps

CONTENTS = {"a": b"one", "d/b": bytes(2**19 + 3), "d/e/c": b""}


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, content in CONTENTS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    manifest.write(tmp_path)
    return tmp_path


def write_as_before(folder: Path) -> None:
    """A manifest of format 1."""
    files = {
        name: {
            "bytes": status.st_size,
            "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
        }
        for name, status in manifest.walk(folder)
        if name != manifest.MANIFEST_FILE
    }
    content = json.dumps(sign({"format": 1, "files": files}))
    (folder / manifest.MANIFEST_FILE).write_text(content)


def test_the_format_names_the_checksum(folder):
    content = json.loads((folder / manifest.MANIFEST_FILE).read_bytes())
    assert content["format"] == 2
    # Of no bytes, by the reference implementation of XXH3.
    expected = {"bytes": 0, "xxh3_128": "99aa06d3014798d86001c324468d497f"}
    assert content["files"]["d/e/c"] == expected
    assert sorted(content["files"]) == sorted(CONTENTS)


@pytest.mark.parametrize("write", [manifest.write, write_as_before])
def test_any_changed_byte_or_size_is_named(folder, write):
    write(folder)
    assert manifest.difference(folder, thorough=True) is None
    for index in (0, 2**18, 2**19 + 2):  # of each buffer that is read at once
        flip_byte(folder / "d/b", index)
        assert manifest.difference(folder, thorough=False) is None
        told = manifest.difference(folder, thorough=True)
        assert told == "the bytes of d/b are not those that were written"
        flip_byte(folder / "d/b", index)
    (folder / "d/e/c").write_bytes(b"x")
    assert manifest.difference(folder, thorough=False) == "d/e/c has 1 bytes, not 0"
    (folder / "d/e/c").unlink()
    assert manifest.difference(folder, thorough=False) == "the file d/e/c is missing"
    (folder / "d/e/c").symlink_to("/dev/null")
    assert manifest.difference(folder, thorough=True) == "the file d/e/c is missing"


def test_a_manifest_that_lost_an_entry_is_damaged(folder):
    path = folder / manifest.MANIFEST_FILE
    content = json.loads(path.read_bytes())
    del content["files"]["a"]
    path.write_text(json.dumps(content))
    told = "manifest.json is damaged: its checksum is wrong"
    assert manifest.difference(folder, thorough=False) == told


def test_links_to_folders_are_not_followed(folder, tmp_path_factory):
    (folder / "circle").symlink_to(folder)
    assert manifest.extra(folder) == ["circle"]
    assert manifest.difference(folder, thorough=True) is None
    elsewhere = (folder / "d").rename(tmp_path_factory.mktemp("elsewhere") / "d")
    (folder / "d").symlink_to(elsewhere)
    assert manifest.difference(folder, thorough=True) == "the file d/b is missing"


def test_a_checkpoint_with_an_older_manifest_goes_on_and_is_still_checked(tmp_path):
    save_steps(tmp_path / "checkpoints", [1, 2])
    for step in "12":
        write_as_before(tmp_path / "checkpoints" / step)
    assert restore_small(tmp_path / "checkpoints").step == 2
    payload = max((tmp_path / "checkpoints/2").rglob("d/*"), key=lambda p: p.stat().st_size)
    flip_byte(payload, payload.stat().st_size // 2)
    assert restore_small(tmp_path / "checkpoints").step == 1
    assert "the bytes of" in (tmp_path / "quarantine/2-1/reason.txt").read_text()


def test_a_manifest_of_a_later_format_is_no_damage(tmp_path):
    save_steps(tmp_path / "checkpoints", [1, 2])
    path = tmp_path / "checkpoints/2" / manifest.MANIFEST_FILE
    content = {"format": 3, "files": json.loads(path.read_bytes())["files"]}
    path.write_text(json.dumps(sign(content)))
    with pytest.raises(CheckpointError, match=r"has format 3, and this program reads \[1, 2\]"):
        restore_small(tmp_path / "checkpoints")
    assert (tmp_path / "checkpoints/2").is_dir()
    assert not (tmp_path / "quarantine").exists()
