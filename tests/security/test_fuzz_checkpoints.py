"""Checkpoints and converted ones whose JSON somebody changed, with checksums that hold.

A step loads bit for bit, or it is told in one paragraph, or it is in quarantine; nothing beside the
workdir is touched.
"""

import contextlib
import io
import json
from pathlib import Path
import shutil
import struct
from typing import Any

import pytest

from moe.errors import CheckpointError, UserError
from moe.training import conversion, inspection, manifest
from moe.training.checkpoint import Restored
from moe.training.keeping import SCORES_FILE, KeepRules
from moe.training.record import sha256, sign
from moe.training.step_folder import RECORD_FILE
from scripts import checkpoint as tool
from tests.security.fuzz import check, contents, json_files, some
from tests.training.tiny_checkpoints import (
    assert_same_bits,
    restore_small,
    save_steps,
    small_state,
)

STEP = 1


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    """A workdir with one checkpoint, scores, and a folder that it was converted to."""
    workdir = tmp_path_factory.mktemp("pristine") / "run"
    workdir.mkdir()
    save_steps(workdir / "checkpoints", [STEP])
    scores = json.dumps({str(STEP): {"bits_per_byte": 2.0}, "7": {"accuracy": 0.5}})
    (workdir / "checkpoints" / SCORES_FILE).write_text(scores)
    conversion.to_safetensors(workdir / "checkpoints", STEP, workdir / "out", everything=True)
    return workdir


def unsigned(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != "sha256"}


def signed(value: Any) -> Any:
    return sign(value) if isinstance(value, dict) else value


def changed_record(metadata: dict[str, Any], **parts: str) -> str:
    """The file of a record with other parts in it."""
    record = unsigned(metadata["custom_metadata"]) | parts
    return json.dumps(metadata | {"custom_metadata": sign(record)})


# What is changed -> its file in the step, and the part of it whose checksum is renewed.
PARTS = {
    "record": (RECORD_FILE, "custom_metadata"),
    "step": (RECORD_FILE, None),
    "manifest": (manifest.MANIFEST_FILE, ""),
    "data": ("data/metadata", None),
    "meta": ("meta/metadata", None),
    "tree": ("state/_METADATA", None),
    "scores": (f"../{SCORES_FILE}", None),
}


def strategy(path: Path, part: str | None):
    whole = json.loads(path.read_bytes())
    if part is None:
        return json_files(whole)
    if not part:
        return json_files(unsigned(whole), signed)
    original = unsigned(whole[part])
    return json_files(original, lambda value: whole | {part: signed(value)})


def renew(folder: Path, kind: str) -> None:
    """The checksums of a step, as if all that is in it had been saved so."""
    path = folder / RECORD_FILE
    if kind in ("data", "meta"):
        with contextlib.suppress(ValueError, RecursionError):
            found = sha256(json.loads((folder / kind / "metadata").read_bytes()))
            path.write_text(changed_record(json.loads(path.read_bytes()), **{kind: found}))
    if kind != "manifest":
        manifest.write(folder)


def told(action, *arguments: Any, **options: Any) -> Any:
    """What an action returns, or None where it says why not."""
    with contextlib.suppress(UserError), contextlib.redirect_stdout(io.StringIO()):
        return action(*arguments, **options)
    return None


def same(restored: Restored | None) -> None:
    if restored is not None:
        assert restored.step == STEP
        assert_same_bits(small_state(STEP), restored.state)
        assert isinstance(restored.data_state, dict)
        assert isinstance(restored.meta, dict)


def used(workdir: Path) -> None:
    """Everything that reads a checkpoint; last what may move it."""
    directory = workdir / "checkpoints"
    told(tool.show, workdir)
    for entry in inspection.entries(directory):
        inspection.flaws(directory / str(entry.step))
    told(inspection.prune, directory, KeepRules(), dry_run=True)
    told(conversion.to_safetensors, directory, STEP, workdir / "new", everything=True)
    same(told(restore_small, directory, read_only=True))
    same(told(restore_small, directory))
    assert len([*workdir.glob("checkpoints/[0-9]*"), *workdir.glob("quarantine/1-1")]) == 1


@some(3, 300)
@pytest.mark.parametrize("kind", PARTS)
def test_a_step_that_was_changed(pristine, tmp_path, kind, examples):
    name, part = PARTS[kind]
    workdir, around = tmp_path / "around" / "run", tmp_path / "around"
    around.mkdir()
    (around / "mine").write_text("mine")
    before = contents(around)

    def holds(data):
        shutil.copytree(pristine, workdir)
        try:
            folder = workdir / "checkpoints" / str(STEP)
            (folder / name).write_bytes(data)
            renew(folder, kind)
            used(workdir)
        finally:
            shutil.rmtree(workdir)
        assert contents(around) == before

    check(examples, holds, strategy(pristine / "checkpoints" / str(STEP) / name, part))


def header_of(data: bytes) -> Any:
    """Of safetensors: names, types, shapes and places of the arrays."""
    (size,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + size])


def with_header(data: bytes, header: bytes) -> bytes:
    (size,) = struct.unpack_from("<Q", data)
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def read_arrays(data: bytes):
    """As `json_files`: other headers before the same numbers."""
    return json_files(header_of(data)).map(lambda header: with_header(data, header))


def read_record(data: bytes):
    return json_files(unsigned(json.loads(data)), signed)


CONVERTED = {conversion.RECORD_FILE: read_record, conversion.ARRAYS_FILE: read_arrays}


@some(6, 600)
@pytest.mark.parametrize("name", CONVERTED)
def test_a_converted_checkpoint_that_was_changed(pristine, tmp_path, name, examples):
    """What comes of it is the checkpoint that was converted, or an error and nothing."""
    source, target, around = tmp_path / "a" / "out", tmp_path / "a" / "run", tmp_path / "a"
    shutil.copytree(pristine / "out", source)
    path = source / name

    def holds(data):
        path.write_bytes(data)
        before = contents(around)
        try:
            tool.FLAGS.to = str(target)
            told(tool.convert, source)
            if target.exists():
                whole(target)
                shutil.rmtree(target)
        finally:
            shutil.rmtree(target, ignore_errors=True)
        assert contents(around) == before

    tool.FLAGS.mark_as_parsed()
    check(examples, holds, CONVERTED[name](path.read_bytes()))


def whole(workdir: Path) -> None:
    """A checkpoint with every leaf of the one that was converted, under a number that is found."""
    directory = workdir / "checkpoints"
    (entry,) = inspection.entries(directory)
    assert not inspection.flaws(directory / str(entry.step))
    restored = restore_small(directory)
    assert restored is not None
    assert_same_bits(small_state(STEP), restored.state)
    assert isinstance(restored.data_state, dict)
    assert isinstance(restored.meta, dict)


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E8M0", "U32"])
def test_arrays_of_other_types(pristine, tmp_path, kind):
    """Types that the library knows and NumPy lacks, and one that fits no leaf."""
    shutil.copytree(pristine / "out", tmp_path / "out")
    path = tmp_path / "out" / conversion.ARRAYS_FILE
    data = path.read_bytes()
    header = header_of(data)
    size = {"U32": 4}.get(kind, 1)
    header["params.w"] |= {"dtype": kind, "shape": [64 * 64 * 4 // size]}
    path.write_bytes(with_header(data, json.dumps(header).encode()))
    with pytest.raises(CheckpointError, match=r"params\.w|params/w|no converted checkpoint"):
        conversion.from_safetensors(tmp_path / "out", tmp_path / "checkpoints")


def test_a_key_of_other_numbers(pristine, tmp_path):
    shutil.copytree(pristine / "out", tmp_path / "out")
    path = tmp_path / "out" / conversion.RECORD_FILE
    record = unsigned(json.loads(path.read_bytes()))
    record["leaves"]["params/w"]["dtype"] = "key<fry>"
    path.write_text(json.dumps(sign(record)))
    with pytest.raises(CheckpointError, match="params/w is no key<fry>"):
        conversion.from_safetensors(tmp_path / "out", tmp_path / "checkpoints")


def test_a_tree_without_one_of_its_leaves(pristine, tmp_path):
    """Nothing is dropped in silence."""
    shutil.copytree(pristine / "out", tmp_path / "out")
    path = tmp_path / "out" / conversion.RECORD_FILE
    record = unsigned(json.loads(path.read_bytes()))
    record["tree"] = record["tree"][:1]
    path.write_text(json.dumps(sign(record)))
    with pytest.raises(CheckpointError, match="not that of its leaves"):
        conversion.from_safetensors(tmp_path / "out", tmp_path / "checkpoints")
