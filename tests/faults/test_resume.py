"""Rows of the matrix where a run goes on under other conditions (11, 18, 20)."""

import itertools
import json
from pathlib import Path
import shutil

from ml_collections import ConfigDict
import pytest

from moe.data.open import make_data
from moe.training import history
from tests import entry
from tests.faults.harness import ROOT, Ended, Reference, steps_saved

TOLERANCE = 1e-5  # relative, of losses on another number of devices


def place(workdir: Path, step: int) -> dict:
    """Of a checkpoint, in the data."""
    return json.loads((workdir / "checkpoints" / str(step) / "data" / "metadata").read_text())


def run(reference: Reference, workdir: Path, *flags: str, **how) -> Ended:
    with reference.train(workdir, *flags, **how) as child:
        return child.finish()


def losses(workdir: Path) -> dict[int, float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["split"] == "train"]
    return {record["step"]: record["loss/total"] for record in records}


# ---- row 18: seed, data or code changed


def changed_code(folder: Path) -> dict[str, str]:
    """Variables of a child whose code takes the rows of a text one after another from the second on."""
    shutil.copytree(ROOT / "moe", folder / "moe", ignore=shutil.ignore_patterns("__pycache__"))
    order = folder / "moe/data/order.py"
    text = order.read_text()
    assert "self._first = first + block" in text
    order.write_text(text.replace("self._first = first + block", "self._first = 1 + first + block"))
    return {"PYTHONPATH": f"{folder}:{ROOT}"}


def test_row_18_other_seed_data_or_code_is_refused_or_allowed_by_name(
    reference: Reference, tmp_path: Path
):
    """All differences are named at once; allowed by name, the run goes on and its history says so."""
    workdir = reference.until(30, tmp_path / "run")
    other = tmp_path / "other"
    other.mkdir()
    entry.tiny_text(other)
    (other / "code9.txt").write_text("one file more\n" * 40)
    flags = [*entry.data_flags(other), "--config.seed=1", "--config.steps=31"]
    variables = changed_code(tmp_path / "changed")
    before = sorted(path for path in workdir.rglob("*") if path.is_file())
    refused = run(reference, workdir, *flags, variables=variables)
    assert refused.code == 4, refused.text
    for said in ("seed was 0 and is now 1", "fingerprint was '", "code was '", "SAVING"):
        assert (said in refused.text) == (said != "SAVING"), refused.text
    assert "--allow_change=fingerprint,seed," in refused.text
    assert sorted(path for path in workdir.rglob("*") if path.is_file()) == before
    assert steps_saved(workdir) == [10, 20, 30]

    named = refused.text.partition("--allow_change=")[2].split()[0].strip(".")
    allowed = run(reference, workdir, *flags, f"--allow_change={named}", variables=variables)
    assert allowed.code == 0, allowed.text
    then, now = place(workdir, 30), place(workdir, 31)
    assert now["next_row"] == then["next_row"] + 8
    event = [line for line in history.read(workdir) if line["event"] == "start"][-1]
    assert event["step"] == 30
    changes = event["changes"]["data"]
    assert set(named.split(",")) == set(changes)
    assert all(changes[key] == [then[key], now[key]] for key in changes)
    assert {"seed": [0, 1], "steps": [40, 31]}.items() <= event["changes"]["config"].items()


# ---- row 20: another batch size


def test_row_20_changed_batch_sizes_take_up_where_the_rows_end(
    reference: Reference, tmp_path: Path
):
    """8 to 16 on 8 devices, then 12 on 4: allowed without asking, recorded, each row once."""
    workdir = reference.until(10, tmp_path / "run")
    legs = [(8, 10, 8), (16, 12, 8), (12, 15, 4)]  # batch size, last step, devices
    for size, last, devices in legs[1:]:
        ended = run(
            reference,
            workdir,
            f"--config.data.batch_size={size}",
            f"--config.steps={last}",
            f"--cpu_devices={devices}",
        )
        assert ended.code == 0, ended.text
    ends = [place(workdir, last)["next_row"] for _, last, _ in legs]
    assert ends == [80, 80 + 2 * 16, 80 + 2 * 16 + 3 * 12]
    events = [line for line in history.read(workdir) if line["event"] == "start"]
    assert [event["changes"]["data"] for event in events[-2:]] == [
        {"batch_size": [8, 16]},
        {"batch_size": [16, 12]},
    ]
    assert [event["devices"] for event in events[-2:]] == [8, 4]
    assert rows_read(reference, workdir, legs) == rows_read(reference, workdir, [(1, ends[-1], 1)])


def rows_read(reference: Reference, workdir: Path, legs: list[tuple[int, int, int]]) -> list[bytes]:
    """What the legs of a run read, from the places that its checkpoints have."""
    section = {
        "name": "files",
        "files": {domain: f"{reference.folder}/{domain}*.txt" for domain in ("code", "prose")},
        "directory": f"{reference.folder}/made",
        "sequence_length": 32,
    }
    found, begin = [], 0
    for size, end, _ in legs:
        data = make_data(ConfigDict(section | {"batch_size": size}), seed=0)
        batches = data.train_batches(start_state=place(workdir, begin) if begin else None)
        taken = itertools.islice(batches, end - begin)
        found += [row.tobytes() for batch in taken for row in batch.tokens]
        batches.close()
        begin = end
    return found


# ---- row 11: other devices


@pytest.mark.parametrize("devices", [pytest.param(4, marks=pytest.mark.slow), 1])
def test_row_11_fewer_devices_go_on_with_the_same_state_and_rows(
    reference: Reference, tmp_path: Path, devices: int
):
    """The state is the saved one to the last bit; losses after are those of R within a tolerance."""
    workdir = reference.until(20, tmp_path / "run")
    flags = [f"--cpu_devices={devices}", f"--config.mesh.expert={devices}", "--config.steps=30"]
    ended = run(reference, workdir, *flags)
    assert ended.code == 0, ended.text
    # Every leaf was compared with its digest when it was read: nothing was put away or skipped.
    assert not (workdir / "quarantine").exists()
    assert history.read(workdir)[-1]["step"] == 20
    assert place(workdir, 30) == place(reference.workdir, 30)
    ours, theirs = losses(workdir), losses(reference.workdir)
    for step in range(21, 31):
        assert ours[step] == pytest.approx(theirs[step], rel=TOLERANCE), step
