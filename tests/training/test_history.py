import json
import os
from pathlib import Path
import resource

import pytest

from moe.errors import CheckpointError
from moe.training import history, workdir


def test_events_come_back_in_order(tmp_path):
    assert history.read(tmp_path) == []
    history.append(tmp_path, "start", step=0)
    history.append(tmp_path, "rewind", step=4, next_row=40, resume_row=80)
    assert history.read(tmp_path) == [
        {"event": "start", "step": 0},
        {"event": "rewind", "step": 4, "next_row": 40, "resume_row": 80},
    ]


def test_a_line_cut_anywhere_is_left_out_and_the_next_stands_alone(tmp_path):
    history.append(tmp_path, "start", step=0)
    path = tmp_path / history.HISTORY_FILE
    first = path.read_bytes()
    history.append(tmp_path, "start", text='a "brace" }\n\\', versions={"a": "1"}, more=[1, True])
    second = path.read_bytes()[len(first) :]
    for end in range(len(second) - 1):
        path.write_bytes(first + second[:end])
        assert history.read(tmp_path) == [{"event": "start", "step": 0}], second[:end]
        history.append(tmp_path, "note", step=1)
        assert [line["event"] for line in history.read(tmp_path)] == ["start", "note"]


def test_a_line_is_on_the_disk_and_so_is_the_name_of_a_new_file(tmp_path, monkeypatch):
    synced = []

    def fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append((path, path.read_text() if path.is_file() else None))

    monkeypatch.setattr(os, "fsync", fsync)
    path = tmp_path / history.HISTORY_FILE
    history.append(tmp_path, "start")
    assert synced == [(path, '{"event": "start"}\n'), (tmp_path, None)]
    history.append(tmp_path, "rewind")
    assert synced[2:] == [(path, '{"event": "start"}\n{"event": "rewind"}\n')]


def test_a_line_of_zeros_is_one_that_was_never_written(tmp_path):
    """Power that fails may leave room that a file has and nothing wrote."""
    history.append(tmp_path, "start")
    with (tmp_path / history.HISTORY_FILE).open("ab") as file:
        file.write(bytes(40))
    assert history.read(tmp_path) == [{"event": "start"}]
    history.append(tmp_path, "note")
    assert history.read(tmp_path) == [{"event": "start"}, {"event": "note"}]


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "{}",
        pytest.param("[" * 100_000, id="deep"),
        '{"event": 3}',
        "start",
        '{"event": "a" "step": 1}',
    ],
)
def test_a_line_that_is_no_event_is_refused(tmp_path, line):
    history.append(tmp_path, "start", step=0)
    path = tmp_path / history.HISTORY_FILE
    path.write_text(line + "\n" + path.read_text())
    with pytest.raises(CheckpointError, match="line 1 is no event"):
        history.read(tmp_path)


def test_a_full_disk_is_told_and_leaves_the_lines_before(tmp_path):
    history.append(tmp_path, "start", step=0)
    path = tmp_path / history.HISTORY_FILE
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            history.append(tmp_path, "start", step=1, text="x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    history.append(tmp_path, "start", step=2)
    assert [line["step"] for line in history.read(tmp_path)] == [0, 2]


def test_a_start_tells_what_differs_from_the_one_before(tmp_path):
    before = {"seed": 0, "data": {"name": "files", "batch_size": 8, "files": {"a": "x"}}, "old": 1}
    now = {"seed": 1, "data": {"name": "files", "batch_size": 8, "files": {"a": "y"}}, "t": (1, 2)}
    first = history.started(tmp_path, step=0, config=before, data_changes={})
    assert first["changes"] == {"data": {}, "config": {}}
    workdir.write_config(tmp_path, before)
    event = history.started(tmp_path, step=7, config=now, data_changes={"seed": [0, 1]})
    history.append(tmp_path, **event)
    (read,) = history.read(tmp_path)
    assert read == json.loads(json.dumps(event))
    assert read["changes"] == {
        "data": {"seed": [0, 1]},
        "config": {
            "seed": [0, 1],
            "data.files.a": ["x", "y"],
            "old": [1, None],
            "t": [None, [1, 2]],
        },
    }
    workdir.write_config(tmp_path, now)
    again = history.started(tmp_path, step=8, config=now, data_changes={})
    assert again["changes"]["config"] == {}  # a tuple is the list that JSON makes of it
    assert (read["event"], read["step"], read["devices"], read["processes"]) == ("start", 7, 8, 1)
    assert {"python", "jax", "grain"} <= read["versions"].keys()
