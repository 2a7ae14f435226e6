"""Each guard of a stored step by itself: what one of them lets pass, no other sees."""

from collections.abc import Callable
import errno
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from moe.errors import CheckpointError
from moe.training import inspection, manifest, step_folder, stored
from moe.training.catalogue import Catalogue
from moe.training.keeping import KeepRules, Scores
from moe.training.record import FORMAT, added_entries, describe, first_difference, sign
from moe.training.store import Store
from tests.training.tiny_checkpoints import (
    assert_same_bits,
    copy_step,
    files_of,
    save_steps,
    sharding,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A step; never changed."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    save_steps(directory, [1])
    return directory / "1"


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"dtype": "int32"}, "params/w is float32, not int32"),
        ({"shape": [32, 128]}, r"params/w has the shape [64, 64], not [32, 128]"),
        ({"digest": 7}, "the digest of params/w is not the one that was saved"),
    ],
)
def test_bits_of_another_type_or_shape_are_another_leaf(saved, changed, told):
    """The digest is of the bits in their order: it is the same for both."""
    record = step_folder.read_record(saved)
    assert record is not None
    leaf = record["leaves"]["params/w"]
    assert stored.leaf_flaw(saved, "params/w", leaf) is None
    assert stored.leaf_flaw(saved, "params/w", {**leaf, **changed}) == told


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy of the step without a manifest, as a kill after the save leaves it."""
    copy = copy_step(saved, tmp_path / "checkpoints" / "1")
    (copy / manifest.MANIFEST_FILE).unlink()
    return copy


def change_record(folder: Path, change: Callable[[dict], dict]) -> None:
    path = folder / step_folder.RECORD_FILE
    content = json.loads(path.read_bytes())
    path.write_text(json.dumps({**content, "custom_metadata": change(content["custom_metadata"])}))


@pytest.mark.parametrize("item", ["data", "meta"])
def test_json_that_reads_and_is_not_what_was_saved_is_told_by_its_item(folder, item):
    assert stored.full_flaw(folder) is None
    (folder / item / "metadata").write_text('{"next_index": 2}')
    assert stored.full_flaw(folder) == f"the contents of {item} are not those that were saved"


def test_a_record_that_was_changed_is_none(folder):
    """Metrics are in no digest of a leaf, and decide which steps are deleted."""
    change_record(folder, lambda record: {**record, "metrics": {"bits_per_byte": 0.0}})
    assert step_folder.read_record(folder) is None
    assert step_folder.flaw(folder) == (
        "it has no intact record of its leaves in _CHECKPOINT_METADATA"
    )


def test_leaves_of_a_later_format_are_not_vouched_for(folder):
    def later(record: dict) -> dict:
        rest = {name: value for name, value in record.items() if name != "sha256"}
        return sign({**rest, "format": FORMAT + 1})

    change_record(folder, later)
    told = "it has no intact record of a format that is read here"
    assert list(stored.content_flaws(folder)) == [told]
    entry = inspection.entries(folder.parent)[0]
    assert entry.flaw == "it is of a format that is not read here"


def test_a_record_behind_a_link_is_not_read(folder, tmp_path):
    path = folder / step_folder.RECORD_FILE
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert step_folder.read_record(folder) is None
    (tmp_path / "link").symlink_to(folder)
    assert step_folder.read_record(tmp_path / "link") is None
    assert step_folder.flaw(tmp_path / "link") == "it is a link"


def test_what_has_a_leftover_in_its_name_is_not_one(tmp_path):
    names = ["notes-5.removed", "5.removed.old", "x5.orbax-checkpoint-tmp", "5.orbax"]
    for name in [*names, "5.removed", "6.orbax-checkpoint-tmp-17"]:
        (tmp_path / name).mkdir()
    (tmp_path / "7.removed").write_text("a file")
    step_folder.clean(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "7.removed"])


def test_a_save_without_its_folder_is_no_save(tmp_path):
    store = Store(tmp_path, read_only=False)
    with pytest.raises(OSError, match="the finished directory is missing"):
        store.wait(1)
    store.close()


def test_a_step_goes_away_whole_or_not_at_all(folder, monkeypatch):
    def refused(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(step_folder.shutil, "rmtree", refused)
        with pytest.raises(PermissionError):
            step_folder.remove(folder)
    assert step_folder.steps_in(folder.parent) == []  # what is left of it is no step
    again = copy_step(folder.with_name("1.removed"), folder)
    step_folder.remove(again)
    assert list(folder.parent.iterdir()) == []


def test_a_name_that_a_broken_link_holds_is_taken(folder, tmp_path):
    (tmp_path / "quarantine").mkdir()
    (tmp_path / "quarantine/1-1").symlink_to(tmp_path / "nowhere")
    moved = step_folder.move_away(folder, tmp_path / "quarantine", "a reason")
    assert moved == tmp_path / "quarantine/1-2"
    assert (moved / "reason.txt").read_text() == "a reason\n"
    assert files_of(moved / "state")


def test_scores_are_written_by_one_process_and_forgotten_with_their_step(tmp_path):
    Scores(tmp_path, writes=False).add(1, {"loss": 1.0}, [1])
    assert list(tmp_path.iterdir()) == []
    scores = Scores(tmp_path, writes=True)
    for step in (1, 2, 3):
        scores.add(step, {"loss": float(step)}, range(1, step + 1))
    scores.forget([3])
    scores.add(2, {"loss": float("inf"), "accuracy": 0.5}, [2])  # 1 is there no more
    again = Scores(tmp_path, writes=True)
    assert [again.of(step) for step in (1, 2, 3)] == [{}, {"loss": 2.0, "accuracy": 0.5}, {}]


def test_what_may_not_be_read_is_no_damage(folder, monkeypatch):
    def refused(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    catalogue = Catalogue(folder.parent, KeepRules(), writes=True, follows=False)
    with pytest.raises(CheckpointError, match="Mend the cause and start again"):
        catalogue.check_is_damage(1, PermissionError("cannot be opened"))
    monkeypatch.setattr(Path, "is_dir", refused)
    with pytest.raises(CheckpointError, match=r"cannot be read: .* Give this user the right"):
        catalogue.flaw(1, thorough=False)


def test_a_part_of_an_entry_is_never_left_out():
    state = {"params": {"w": jnp.ones(2), "v": jnp.ones(3)}, "optimizer": {"m": jnp.ones(2)}}
    leaves = describe(state)
    part = {"params": {"w": jnp.ones(2)}}
    assert first_difference(leaves, {"params": state["params"]}, partial=True) is None
    told = "params/v is float32[3] in the checkpoint and absent here"
    assert first_difference(leaves, part, partial=True) == told
    told = "optimizer/m is float32[2] in the checkpoint and absent here"
    assert first_difference(leaves, {"params": state["params"]}, partial=False) == told


def test_entries_that_a_format_lacks_are_added_and_no_others():
    one = {"count": jnp.int32(1)}
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(1)), one)
    old: dict = {"format": 1, "leaves": {"params/w": {}}}
    added = added_entries(old, {"guard": like}, {"guard": one})
    assert_same_bits({"guard": one}, added)
    assert added_entries({**old, "format": 2}, {"guard": like}, {"guard": one}) == {}
    stored_too = {"format": 1, "leaves": {"guard/count": {}}}
    assert added_entries(stored_too, {"guard": like}, {"guard": one}) == {}
    assert added_entries(old, {"guard": like, "rest": like}, {"rest": one}) == {}
    with pytest.raises(TypeError, match="guard has not the leaves of abstract_state"):
        added_entries(old, {"guard": like}, {"guard": {"count": jnp.float32(1)}})
