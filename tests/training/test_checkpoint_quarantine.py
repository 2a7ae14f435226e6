"""What is not whole is put aside and never loaded; what is of another model is never put aside."""

import json
import logging

import jax.numpy as jnp
import pytest

from moe.errors import CheckpointError
from moe.training import manifest
from moe.training.checkpoint import Checkpointer
from moe.training.record import FORMAT, sign
from tests.training.tiny_checkpoints import (
    DATA,
    META,
    abstract,
    assert_same_bits,
    copy_step,
    flip_byte,
    restore_small,
    save_steps,
    small_state,
)


@pytest.fixture
def run(tmp_path):
    save_steps(tmp_path / "checkpoints", [1, 2, 3])
    return tmp_path


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def payload(step_folder):
    return max(step_folder.rglob("d/*"), key=lambda path: path.stat().st_size)


def damage(step_folder) -> None:
    path = payload(step_folder)
    flip_byte(path, path.stat().st_size // 2)


def test_nothing_there_is_a_fresh_start(tmp_path):
    assert restore_small(tmp_path / "checkpoints") is None
    assert names(tmp_path) == ["checkpoints"]


def test_a_damaged_step_goes_to_quarantine_with_one_warning(run, caplog):
    damage(run / "checkpoints" / "3")
    with caplog.at_level(logging.WARNING):
        restored = restore_small(run / "checkpoints")
    assert restored.step == 2
    assert restored.data_state == {"next_index": 2}
    assert_same_bits(small_state(2), restored.state)
    assert len(caplog.records) == 1
    assert "Checkpoint 3" in caplog.text
    assert "the bytes of state/ocdbt.process_0/d/" in caplog.text
    assert names(run / "checkpoints") == ["1", "2"]
    reason = (run / "quarantine" / "3-1" / "reason.txt").read_text()
    assert "are not those that were written" in reason


def test_a_step_number_is_put_aside_as_often_as_it_is_bad(run):
    for n in (1, 2):
        damage(run / "checkpoints" / "3")
        with Checkpointer(run / "checkpoints", keep_latest=3) as checkpoints:
            target = abstract(small_state(0), devices=1)
            assert checkpoints.restore_newest(target, fresh={}).step == 2
            assert checkpoints.latest_step() == 2
            assert checkpoints.save(3, small_state(3), DATA, META)
        assert names(run / "quarantine") == ["3-1", "3-2"][:n]
    assert restore_small(run / "checkpoints").step == 3


def test_all_damaged_is_an_error_and_never_a_fresh_start(run):
    for step in "123":
        damage(run / "checkpoints" / step)
    with pytest.raises(CheckpointError, match=r"None of the checkpoints \[1, 2, 3\]") as caught:
        restore_small(run / "checkpoints")
    assert caught.value.exit_code == 4
    assert names(run / "quarantine") == ["1-1", "2-1", "3-1"]


def test_reading_moves_nothing_and_falls_through_with_a_warning(run, caplog):
    damage(run / "checkpoints" / "3")
    (run / "checkpoints" / "2" / manifest.MANIFEST_FILE).unlink()  # as after a kill
    damage(run / "checkpoints" / "2")
    with Checkpointer(run / "checkpoints", read_only=True) as checkpoints:
        with caplog.at_level(logging.WARNING):
            assert checkpoints.resolve("latest") == 1
        assert [record.getMessage()[:12] for record in caplog.records] == [
            "Checkpoint 3",
            "Checkpoint 2",
        ]
        assert checkpoints.resolve(3) == 3  # asked for by number, it is named when it is loaded
        with pytest.raises(CheckpointError, match=r"Checkpoint 3 .* is damaged: the digest of"):
            checkpoints.restore(3, abstract(small_state(0), devices=1))
    assert restore_small(run / "checkpoints", read_only=True).step == 1
    assert names(run) == ["checkpoints"]
    assert names(run / "checkpoints") == ["1", "2", "3"]


def test_another_model_is_an_error_and_stays_where_it_is(run):
    with Checkpointer(run / "checkpoints", keep_latest=9) as checkpoints:
        checkpoints.save(4, {"params": {"w": jnp.zeros(5)}}, DATA, META)
    with pytest.raises(CheckpointError, match=r"Checkpoint 4 .* of another model: key is absent"):
        restore_small(run / "checkpoints")
    assert names(run / "checkpoints") == ["1", "2", "3", "4"]
    assert names(run) == ["checkpoints"]


def test_a_later_format_is_an_error_and_stays_where_it_is(run):
    path = run / "checkpoints" / "3" / "_CHECKPOINT_METADATA"
    content = json.loads(path.read_text())
    record = {key: value for key, value in content["custom_metadata"].items() if key != "sha256"}
    content["custom_metadata"] = sign({**record, "format": FORMAT + 1})
    path.write_text(json.dumps(content))
    manifest.write(path.parent)
    with pytest.raises(CheckpointError, match=rf"has format {FORMAT + 1}, and this program reads"):
        restore_small(run / "checkpoints")
    with Checkpointer(run / "checkpoints", keep_latest=1) as checkpoints:
        checkpoints.save(9, small_state(9), DATA, META)
    assert names(run / "checkpoints") == ["3", "9"]  # what is not understood is not deleted


def test_a_quarantine_that_cannot_be_made_is_told(run):
    (run / "quarantine").write_text("a file")
    damage(run / "checkpoints" / "3")
    with pytest.raises(CheckpointError, match=r"Checkpoint 3 .* could not be: .*File exists"):
        restore_small(run / "checkpoints")
    assert names(run / "checkpoints") == ["1", "2", "3"]


def test_a_quarantine_that_is_a_link_is_not_followed(run):
    (run / "elsewhere").mkdir()
    (run / "quarantine").symlink_to(run / "elsewhere")
    damage(run / "checkpoints" / "3")
    with pytest.raises(CheckpointError, match="is a link, and nothing is moved through a link"):
        restore_small(run / "checkpoints")
    assert names(run / "elsewhere") == []


def test_links_are_moved_as_links_and_never_opened(run):
    outside = copy_step(run / "checkpoints" / "3", run / "outside")
    before = names(outside)
    (run / "checkpoints" / "7").symlink_to(outside)
    (run / "checkpoints" / "8.orbax-checkpoint-tmp").symlink_to(outside)
    (run / "checkpoints" / "9.removed").symlink_to(outside)
    with Checkpointer(run / "checkpoints", keep_latest=1) as checkpoints:
        target = abstract(small_state(0), devices=1)
        assert checkpoints.restore_newest(target, fresh={}).step == 3
        checkpoints.save(4, small_state(4), DATA, META)
    assert names(outside) == before
    assert (run / "quarantine" / "7-1" / "7").is_symlink()
    assert "it is a link" in (run / "quarantine" / "7-1" / "reason.txt").read_text()
    assert names(run / "checkpoints") == ["4", "8.orbax-checkpoint-tmp", "9.removed"]


def test_a_file_that_cannot_be_read_for_want_of_memory_is_no_damage(run, monkeypatch):
    with Checkpointer(run / "checkpoints") as checkpoints:

        def too_small(*args, **kwargs):
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")

        monkeypatch.setattr(checkpoints._store, "load", too_small)
        with pytest.raises(Exception, match="memory is too small") as caught:
            checkpoints.restore_newest(abstract(small_state(0), devices=1), fresh={})
        assert caught.value.exit_code == 6

        def broken(*args, **kwargs):
            raise ValueError("a fault of the program")

        monkeypatch.setattr(checkpoints._store, "load", broken)
        with pytest.raises(CheckpointError, match="files are as they were written, so it stays"):
            checkpoints.restore_newest(abstract(small_state(0), devices=1), fresh={})
    assert names(run) == ["checkpoints"]


def test_what_came_after_a_step_is_put_aside_and_trained_again(run):
    with Checkpointer(run / "checkpoints", keep_latest=3) as checkpoints:
        checkpoints.rate(3, {"bits_per_byte": 1.0})
        checkpoints.rate(1, {"bits_per_byte": 2.0})
        checkpoints.retire_after(1)
        checkpoints.retire_after(1)
        assert checkpoints.all_steps() == [1]
        assert checkpoints.best_step() == 1
        scores = json.loads((run / "checkpoints" / "scores.json").read_text())
        assert scores == {"1": {"bits_per_byte": 2.0}}
        assert checkpoints.save(2, small_state(20), DATA, META)
        checkpoints.retire_after(1)
    assert names(run / "superseded") == ["2-1", "2-2", "3-1"]
    assert names(run / "checkpoints") == ["1", "scores.json"]


def test_an_evaluation_after_the_save_decides_what_stays(tmp_path):
    directory = tmp_path / "checkpoints"
    with Checkpointer(directory, keep_latest=1, keep_best=1) as checkpoints:
        checkpoints.save(1, small_state(1), DATA, META, {"bits_per_byte": 3.0})
        checkpoints.save(2, small_state(2), DATA, META)
        checkpoints.rate(2, {"bits_per_byte": 1.0, "accuracy": float("nan"), "load": [1.0]})
        checkpoints.save(3, small_state(3), DATA, META, {"bits_per_byte": 2.0})
        assert checkpoints.all_steps() == [2, 3]
        with pytest.raises(CheckpointError, match=r"no checkpoint 1 .* it has steps \[2, 3\]"):
            checkpoints.rate(1, {"bits_per_byte": 0.0})
    assert json.loads((directory / "scores.json").read_text()) == {"2": {"bits_per_byte": 1.0}}
    with Checkpointer(directory, read_only=True) as checkpoints:
        assert checkpoints.resolve("best") == 2
        with pytest.raises(CheckpointError, match="nothing is rated there"):
            checkpoints.rate(2, {"bits_per_byte": 0.0})
    (directory / "scores.json").write_text("{")
    with Checkpointer(directory, keep_latest=2) as checkpoints:
        assert checkpoints.best_step() == 3  # told without the scores, and told so in a warning


def test_a_kill_between_save_and_manifest_is_made_good_at_the_next_start(run):
    path = run / "checkpoints" / "3" / manifest.MANIFEST_FILE
    path.unlink()
    assert restore_small(run / "checkpoints").step == 3
    assert manifest.difference(path.parent, thorough=True) is None
    assert path.exists()


def test_a_manifest_lists_every_file(run):
    folder = run / "checkpoints" / "3"
    found = manifest.read(folder)
    there = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert found is not None
    assert set(found[1]) == there - {manifest.MANIFEST_FILE}
