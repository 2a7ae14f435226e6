"""Checkpoints that were damaged on disk: rows 8, 9 and 10.

The many cases are on a `Checkpointer` with tiny states; one run of the real `train.py` a row shows
that it is wired.
"""

import os
from pathlib import Path
import random
import shutil

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from moe.errors import CheckpointError
from moe.training import inspection
from tests.faults.harness import STEPS, Reference, bits, digest, steps_saved
from tests.training.tiny_checkpoints import (
    META,
    assert_same_bits,
    files_of,
    flip_byte,
    restore_small,
    save_steps,
    small_state,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A workdir with steps 1 and 2; never changed."""
    workdir = tmp_path_factory.mktemp("saved")
    save_steps(workdir / "checkpoints", [1, 2])
    return workdir


@pytest.fixture
def workdir(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def put_back(workdir: Path, step: int) -> None:
    """Undoes a quarantine."""
    away = workdir / "quarantine" / f"{step}-1"
    (away / "reason.txt").unlink()
    away.rename(workdir / "checkpoints" / str(step))


def assert_fell_back(workdir: Path, case: str) -> None:
    """Step 2 is passed over for step 1, bit for bit, and lies in quarantine."""
    restored = restore_small(workdir / "checkpoints")
    assert restored.step == 1, case
    assert_same_bits(small_state(1), restored.state)
    assert restored.data_state == {"next_index": 1}, case
    assert (workdir / "quarantine" / "2-1" / "reason.txt").is_file(), case


def assert_never_wrong(workdir: Path, case: str) -> bool:
    """Whatever is restored is what was saved; returns whether step 2 was passed over."""
    restored = restore_small(workdir / "checkpoints")
    assert_same_bits(small_state(restored.step), restored.state)
    assert restored.data_state == {"next_index": restored.step}, case
    assert restored.meta == META, case
    assert (restored.step == 1) == (workdir / "quarantine" / "2-1").exists(), case
    return restored.step == 1


def test_row_08_truncated_checkpoint(workdir):
    """Each file of the newest step, cut to its half and to nothing."""
    folder = workdir / "checkpoints" / "2"
    names = [path.relative_to(folder) for path in files_of(folder)]
    assert len(names) > 15
    for name in names:
        intact = (folder / name).read_bytes()
        for size in (len(intact) // 2, 0):
            (folder / name).write_bytes(intact[:size])
            assert_fell_back(workdir, f"{name} cut to {size}")
            put_back(workdir, 2)
        (folder / name).write_bytes(intact)
    assert restore_small(workdir / "checkpoints").step == 2


def test_row_08_truncated_checkpoint_without_a_manifest(workdir):
    """As a kill right after the save leaves it: never a wrong value."""
    folder = workdir / "checkpoints" / "2"
    (folder / "manifest.json").unlink()
    without = shutil.copytree(folder, workdir / "copy")
    fell_back = 0
    for path in files_of(without):
        name = path.relative_to(without)
        intact = path.read_bytes()
        (folder / name).write_bytes(intact[: len(intact) // 2])
        if assert_never_wrong(workdir, str(name)):
            put_back(workdir, 2)
            fell_back += 1
        (folder / "manifest.json").unlink(missing_ok=True)
        (folder / name).write_bytes(intact)
    assert fell_back >= 8


def test_row_09_flipped_byte(workdir):
    """30 seeded flips of the payload: not one is loaded in silence; then of what describes it."""
    draws = random.Random(0)
    folder = workdir / "checkpoints" / "2"
    payload = [path for path in files_of(folder) if path.parent.name == "d"]
    weights = [path.stat().st_size for path in payload]
    found = 0
    for path in draws.choices(payload, weights, k=30):
        index, bit = draws.randrange(path.stat().st_size), draws.randrange(8)
        flip_byte(path, index, bit)
        case = f"bit {bit} of byte {index} of {path.relative_to(folder)}"
        if assert_never_wrong(workdir, case):
            put_back(workdir, 2)
            found += 1
        flip_byte(path, index, bit)
    assert found >= 27  # a few bytes are of no consequence, and then the state is the one saved
    assert restore_small(workdir / "checkpoints").step == 2


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "data/metadata", "meta/metadata"])
def test_row_09_flipped_byte_of_json(workdir, name):
    draws = random.Random(1)
    folder = workdir / "checkpoints" / "2"
    path = folder / name
    for index in draws.sample(range(path.stat().st_size), 6):
        bit = draws.randrange(7)
        flip_byte(path, index, bit)
        if assert_never_wrong(workdir, f"bit {bit} of byte {index} of {name}"):
            put_back(workdir, 2)
        flip_byte(path, index, bit)
    flip_byte(path, path.read_bytes().index(b":"), 0)
    assert_fell_back(workdir, name)


def empty(checkpoints: Path) -> None:
    (checkpoints / "5").mkdir()


def without_marker(checkpoints: Path) -> None:
    shutil.copytree(checkpoints / "2", checkpoints / "5")
    (checkpoints / "5" / "commit_success.txt").unlink()
    (checkpoints / "5" / "manifest.json").unlink()


def without_marker_of_an_item(checkpoints: Path) -> None:
    shutil.copytree(checkpoints / "2", checkpoints / "5")
    (checkpoints / "5" / "state" / "commit_success.txt").unlink()
    (checkpoints / "5" / "manifest.json").unlink()


def without_files(checkpoints: Path) -> None:
    shutil.copytree(checkpoints / "2", checkpoints / "5")
    shutil.rmtree(checkpoints / "5" / "state" / "d")


def without_an_item(checkpoints: Path) -> None:
    shutil.copytree(checkpoints / "2", checkpoints / "5")
    shutil.rmtree(checkpoints / "5" / "data")


def without_record(checkpoints: Path) -> None:
    shutil.copytree(checkpoints / "2", checkpoints / "5")
    (checkpoints / "5" / "_CHECKPOINT_METADATA").unlink()


def of_another_program(checkpoints: Path) -> None:
    with ocp.CheckpointManager(checkpoints) as manager:
        manager.save(5, args=ocp.args.StandardSave({"weights": jnp.ones(3)}))


def with_files_of_a_pickle(checkpoints: Path) -> None:
    (checkpoints / "5").mkdir()
    (checkpoints / "5" / "_CHECKPOINT_METADATA").write_bytes(b"\x80\x04\x95cos\nsystem\n.")


def half_written_inside(checkpoints: Path) -> None:
    shutil.copytree(checkpoints / "2", checkpoints / "5")
    (checkpoints / "5" / "state").rename(checkpoints / "5" / "state.orbax-checkpoint-tmp")


def a_file(checkpoints: Path) -> None:
    (checkpoints / "5").write_text("5")


def a_link(checkpoints: Path) -> None:
    (checkpoints / "5").symlink_to(checkpoints / "2")


@pytest.mark.parametrize(
    "make",
    [
        empty,
        without_marker,
        without_marker_of_an_item,
        without_files,
        without_an_item,
        without_record,
        of_another_program,
        with_files_of_a_pickle,
        half_written_inside,
        a_file,
        a_link,
    ],
)
def test_row_10_what_is_no_checkpoint_is_not_the_newest(workdir, make):
    make(workdir / "checkpoints")
    restored = restore_small(workdir / "checkpoints")
    assert restored.step == 2
    assert_same_bits(small_state(2), restored.state)
    assert steps_saved(workdir) == [1, 2]
    assert (workdir / "quarantine" / "5-1" / "reason.txt").is_file()


def test_row_10_leftovers_are_removed_and_strangers_left_alone(workdir):
    checkpoints = workdir / "checkpoints"
    shutil.copytree(checkpoints / "2", checkpoints / "5.orbax-checkpoint-tmp")
    (checkpoints / "1.removed").mkdir()
    for name in ("05", "notes", "5.old", "-5", "5.0"):
        (checkpoints / name).mkdir()
    assert restore_small(checkpoints).step == 2
    there = sorted(path.name for path in checkpoints.iterdir())
    assert there == ["-5", "05", "1", "2", "5.0", "5.old", "notes"]
    assert not (workdir / "quarantine").exists()


def test_row_10_extra_files_change_nothing_and_are_named_by_verify(workdir):
    """No file that is added is opened: one with a pickle in it runs no code."""
    folder = workdir / "checkpoints" / "2"
    evil = b"cos\nmkdir\n(S'" + os.fsencode(workdir / "executed") + b"'\ntR."
    planted = ["state/model.pkl", "state/d/x.npy", "checkpoint.pkl", "meta/object.npy"]
    for name in planted:
        (folder / name).write_bytes(evil)
    restored = restore_small(workdir / "checkpoints")
    assert restored.step == 2
    assert_same_bits(small_state(2), restored.state)
    assert sorted(inspection.flaws(folder)) == sorted(
        f"{name} is no file of this checkpoint" for name in planted
    )
    assert not (workdir / "executed").exists()


# ---- the same through train.py


def largest_payload(workdir: Path, step: int) -> Path:
    folder = workdir / "checkpoints" / str(step)
    return max(folder.rglob("d/*"), key=lambda path: path.stat().st_size)


def assert_like(reference: Reference, workdir: Path) -> None:
    assert bits(workdir) == reference.bits
    assert digest(workdir, STEPS) == reference.digest


def test_row_08_truncated_checkpoint_of_a_run(reference, tmp_path):
    workdir = reference.until(30, tmp_path / "run")
    path = largest_payload(workdir, 30)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with reference.train(workdir) as run:
        ended = run.finish()
    assert ended.code == 0, ended.text
    assert "Checkpoint 30" in ended.text
    assert (workdir / "quarantine" / "30-1" / "reason.txt").is_file()
    assert_like(reference, workdir)
    for step in steps_saved(workdir):
        (workdir / "checkpoints" / str(step) / "_CHECKPOINT_METADATA").write_text("{")
    with reference.train(workdir, "--config.steps=50") as run:
        ended = run.finish()
    assert ended.code == CheckpointError.exit_code, ended.text
    assert "None of the checkpoints" in ended.text
    assert "Traceback" not in ended.text


@pytest.mark.slow
def test_row_09_flipped_byte_of_a_run(reference, tmp_path):
    workdir = reference.until(30, tmp_path / "run")
    path = largest_payload(workdir, 30)
    flip_byte(path, path.stat().st_size // 2)
    with reference.train(workdir) as run:
        ended = run.finish()
    assert ended.code == 0, ended.text
    assert "the bytes of" in (workdir / "quarantine" / "30-1" / "reason.txt").read_text()
    assert_like(reference, workdir)


@pytest.mark.slow
def test_row_10_what_is_no_checkpoint_does_not_stop_a_run(reference, tmp_path):
    workdir = reference.until(30, tmp_path / "run")
    empty(workdir / "checkpoints")
    (workdir / "checkpoints" / "5").rename(workdir / "checkpoints" / "35")
    of_another_program(tmp_path / "other")
    (tmp_path / "other" / "5").rename(workdir / "checkpoints" / "37")
    (workdir / "checkpoints" / "40.orbax-checkpoint-tmp").mkdir()
    with reference.train(workdir) as run:
        ended = run.finish()
    assert ended.code == 0, ended.text
    assert sorted(p.name for p in (workdir / "quarantine").iterdir()) == ["35-1", "37-1"]
    assert_like(reference, workdir)
