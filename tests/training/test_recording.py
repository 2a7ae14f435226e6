"""The history of a run on real files, full disk included."""

import contextlib
import json
import math
from pathlib import Path
import resource
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event  # ty: ignore[missing-module-member]

from moe.training.recording import Recorder, read_records


def read_events(directory: Path) -> list[Event]:
    """TFRecord framing: length, its checksum, payload, its checksum."""
    events = []
    for path in sorted(directory.glob("*")):
        contents, offset = path.read_bytes(), 0
        while offset < len(contents):
            (length,) = struct.unpack_from("<Q", contents, offset)
            events.append(Event.FromString(contents[offset + 12 : offset + 12 + length]))
            offset += 16 + length
    return events


def steps(workdir: Path) -> list[tuple[int, str]]:
    return [(record["step"], record["split"]) for record in read_records(workdir)]


def test_each_record_is_one_line_of_strict_json(tmp_path):
    values = {
        "loss/total": 1.5,
        "loss/z": math.nan,
        "grad_norm": jnp.float32(2.0),
        "routing/load": np.array([[0.25, 0.75], [np.inf, 0.0]]),
        "routing/per_layer/entropy": [1.0, 2.0],
    }
    with Recorder(tmp_path) as recorder:
        recorder.write(1, "train", values)
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # there before the close
    assert len(lines) == 1
    assert json.loads(lines[0], parse_constant=pytest.fail) == {
        "step": 1,
        "split": "train",
        "loss/total": 1.5,
        "loss/z": None,
        "grad_norm": 2.0,
        "routing/load": [[0.25, 0.75], [None, 0.0]],
        "routing/per_layer/entropy": [1.0, 2.0],
    }


def test_scalars_reach_tensorboard_by_split(tmp_path):
    with Recorder(tmp_path) as recorder:
        recorder.write(1, "train", {"loss/total": 1.5, "routing/load": [0.5, 0.5]})
        recorder.write(2, "valid", {"bits_per_byte": 0.25})
    train = [event for event in read_events(tmp_path / "tensorboard/train") if event.summary.value]
    valid = [event for event in read_events(tmp_path / "tensorboard/valid") if event.summary.value]
    assert [(e.step, v.tag, v.simple_value) for e in train for v in e.summary.value] == [
        (1, "loss/total", 1.5)
    ]
    assert [(e.step, v.tag, v.simple_value) for e in valid for v in e.summary.value] == [
        (2, "bits_per_byte", 0.25)
    ]


def test_rewind_leaves_each_step_once(tmp_path):
    with Recorder(tmp_path) as recorder:
        for step in (1, 2, 3, 4):
            recorder.write(step, "train", {"loss/total": float(step)})
        recorder.write(4, "valid", {"bits_per_byte": 2.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "split": "tr')  # killed in the middle of a line
    assert steps(tmp_path)[-1] == (4, "valid")
    with Recorder(tmp_path) as recorder:
        recorder.rewind(2)
        assert steps(tmp_path) == [(1, "train"), (2, "train")]
        recorder.write(3, "train", {"loss/total": 3.0})
    assert steps(tmp_path) == [(1, "train"), (2, "train"), (3, "train")]
    starts = [event.step for event in read_events(tmp_path / "tensorboard/train")]
    assert starts.count(3) == 3  # before the rewind, the mark that hides it, and after
    with Recorder(tmp_path) as recorder:
        recorder.rewind(0)
    assert steps(tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_rewind_that_drops_nothing_leaves_the_file_alone(tmp_path):
    with Recorder(tmp_path) as recorder:
        recorder.write(1, "train", {"loss/total": 1.0})
        before = (tmp_path / "metrics.jsonl").stat()
        recorder.rewind(1)
    assert (tmp_path / "metrics.jsonl").stat().st_ino == before.st_ino


def test_other_processes_write_nothing(tmp_path):
    with Recorder(tmp_path, primary=False) as recorder:
        recorder.rewind(0)
        recorder.write(1, "train", {"loss/total": 1.0})
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def full_disk(size: int):
    """No file may grow past `size` bytes: the write is cut short, the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_warns_once_and_leaves_no_half_line(tmp_path, caplog):
    with Recorder(tmp_path) as recorder:
        recorder.write(1, "train", {"loss/total": 1.0})
        with full_disk((tmp_path / "metrics.jsonl").stat().st_size + 10):
            recorder.write(2, "train", {"loss/total": 2.0})
            recorder.write(3, "train", {"loss/total": 3.0})
        assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1
        recorder.write(4, "train", {"loss/total": 4.0})
    assert steps(tmp_path) == [(1, "train"), (4, "train")]
    assert [r.message for r in caplog.records if "Metrics cannot be written" in r.message][1:] == []
    assert "Training goes on" in caplog.text


def test_a_full_disk_leaves_no_half_event(tmp_path):
    with Recorder(tmp_path) as recorder:
        recorder.write(1, "train", {"loss/total": 1.0})
        (file,) = (tmp_path / "tensorboard/train").iterdir()
        metrics = (tmp_path / "metrics.jsonl").stat().st_size
        whole = file.stat().st_size
        with full_disk(whole + 20):  # room for a length, and not for what it is of
            assert metrics + 100 > whole + 20, "the history is cut as well"
            recorder.write(2, "train", {"loss/total": 2.0})
        assert file.stat().st_size == whole
        recorder.write(3, "train", {"loss/total": 3.0})
    events = read_events(tmp_path / "tensorboard/train")
    assert [e.step for e in events if e.summary.value] == [1, 3]


def test_a_file_of_events_that_did_not_fit_at_first_has_its_beginning(tmp_path):
    (tmp_path / "tensorboard/train").mkdir(parents=True)
    with Recorder(tmp_path) as recorder:
        recorder.rewind(0)
        with full_disk(80):  # room for a line of the history
            recorder.write(1, "train", {"loss/total": 1.0})
        recorder.write(2, "train", {"loss/total": 2.0})
    assert steps(tmp_path) == [(1, "train"), (2, "train")]
    events = read_events(tmp_path / "tensorboard/train")
    assert events[0].file_version == "brain.Event:2"
    assert [event.step for event in events] == [0, 1, 2]


def test_a_history_that_cannot_be_rewound_stays_and_is_told(tmp_path, caplog):
    with Recorder(tmp_path) as recorder:
        for step in (1, 2, 3):
            recorder.write(step, "train", {"loss/total": 1.0})
        with full_disk(20):
            recorder.rewind(2)
    assert [step for step, _ in steps(tmp_path)] == [1, 2, 3]
    assert "Training goes on" in caplog.text


def test_files_of_events_are_in_the_order_of_runs_whatever_the_clock_says(tmp_path, monkeypatch):
    folder = tmp_path / "tensorboard/train"
    folder.mkdir(parents=True)
    (folder / "events.out.tfevents.1763812345.host.17").write_bytes(b"")  # by its second
    for step, now in ((1, 2e9), (2, 1e9)):
        monkeypatch.setattr("time.time", lambda now=now: now)
        with Recorder(tmp_path) as recorder:
            recorder.rewind(step - 1)
            recorder.write(step, "train", {"loss/total": 1.0})
    assert [path.name for path in sorted(folder.iterdir())][1:] == [
        "events.out.tfevents.1763812346.moe",
        "events.out.tfevents.1763812347.moe",
    ]
    events = read_events(folder)
    assert [event.file_version for event in events if event.file_version] == ["brain.Event:2"] * 2
    assert [event.step for event in events if event.summary.value] == [1, 2]


def test_a_directory_that_cannot_be_written_does_not_stop_training(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("a file where a directory should be")
    with Recorder(tmp_path) as recorder:
        recorder.write(1, "train", {"loss/total": 1.0})
    assert steps(tmp_path) == [(1, "train")]
    assert "Training goes on" in caplog.text
