"""Rows 12 and 13: numbers that are not finite, and losses that spike."""

import json
from pathlib import Path
import signal

import numpy as np
import pytest

from moe.training.stored import read_leaf
from tests.faults.harness import STEPS, Reference, bits, digest, steps_saved

BATCH = 8
NO_EVALUATION = [f"--config.evaluation.every={STEPS}"]
# Eight losses are enough to see that those of wrong targets are others. One evaluation, at the end.
SPIKES = [*NO_EVALUATION, "--config.guards.window=8", "--config.guards.skip_batches=5"]
WRONG = "wrong_targets@20-22"  # of these batches, whenever they are read


def learned(workdir: Path, step: int) -> dict[str, int]:
    """Digests of what a skipped step leaves as it is."""
    found = digest(workdir, step)
    assert {name.partition("/")[0] for name in found} == {
        *("step", "params", "router", "optimizer", "guard"),
    }
    return {n: d for n, d in found.items() if n.partition("/")[0] not in ("step", "guard")}


def skipped(workdir: Path) -> dict[int, int]:
    """How many steps had been skipped after each step."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: r["guards/skipped"] for r in lines if r["split"] == "train"}


def rewinds(workdir: Path) -> list[dict]:
    lines = map(json.loads, (workdir / "history.jsonl").read_text().splitlines())
    return [event for event in lines if event["event"] == "rewind"]


def test_row_12_infinite_gradients(reference: Reference, tmp_path: Path):
    """The last of nine steps is skipped; those before are those of R."""
    workdir = tmp_path / "run"
    flags = [*NO_EVALUATION, "--config.steps=9", "--config.checkpoint.every=8"]
    with reference.train(workdir, *flags, faults=["inf_grad@9"]) as child:
        ended = child.finish()
    assert ended.code == 0, ended.text
    assert learned(workdir, 9) == learned(workdir, 8)
    assert digest(workdir, 9)["guard/skipped"] != digest(workdir, 8)["guard/skipped"]
    assert skipped(workdir) == {step: int(step == 9) for step in range(1, 10)}
    found = bits(workdir)
    assert {n: found[n] for n in range(1, 9)} == {n: reference.bits[n] for n in range(1, 9)}


def test_row_12_nan_without_end(reference: Reference, tmp_path: Path):
    """Ten in a row end the run; nothing that is not finite was saved, and the run can go on."""
    workdir = tmp_path / "run"
    flags = ["--config.checkpoint.every=3", "--config.checkpoint.keep_latest=2", *NO_EVALUATION]
    with reference.train(workdir, *flags, faults=["nan_loss@9-99"]) as child:
        ended = child.finish()
    assert ended.code == 5, ended.text
    assert "not finite in 10 steps in a row (guards.bad_steps=10)" in ended.text
    assert "Checkpoint 15 is kept" in ended.text
    assert "Traceback" not in ended.text
    assert steps_saved(workdir) == [12, 15], "not 18, the step that was too many"
    for step in steps_saved(workdir):
        for name in digest(workdir, step):
            if not name.startswith("step"):
                leaf = read_leaf(workdir / "checkpoints" / str(step), name)
                assert np.isfinite(leaf).all(), (step, name)
    assert learned(workdir, 15) == learned(workdir, 12)
    lines = (workdir / "metrics.jsonl").read_text()
    assert "NaN" not in lines
    assert skipped(workdir)[18] == 10


@pytest.mark.slow
def test_row_13_a_spike_is_skipped(reference: Reference, tmp_path: Path):
    workdir = tmp_path / "run"
    every = ["--config.checkpoint.every=1", "--config.checkpoint.keep_latest=3"]
    flags = [*every, *SPIKES, "--config.steps=21"]
    with reference.train(workdir, *flags, faults=["wrong_targets@20"]) as child:
        ended = child.finish()
    assert ended.code == 0, ended.text
    assert learned(workdir, 20) == learned(workdir, 19)
    assert learned(workdir, 21) != learned(workdir, 20)
    assert skipped(workdir) == {step: int(step >= 20) for step in range(1, 22)}
    assert rewinds(workdir) == []


@pytest.mark.slow
def test_row_13_spikes_in_a_row_are_left_behind(reference: Reference, tmp_path: Path):
    """Back to step 10 and past the batches; a kill right after changes no bit of what follows."""
    workdir, killed = tmp_path / "run", tmp_path / "killed"
    with reference.train(workdir, *SPIKES, faults=[WRONG]) as child:
        ended = child.finish()
    assert ended.code == 0, ended.text
    assert "back to step 10" in ended.text
    event = {"event": "rewind", "step": 10, "next_row": 10 * BATCH, "resume_row": (19 + 5) * BATCH}
    assert rewinds(workdir) == [event]
    assert [path.name for path in (workdir / "superseded").iterdir()] == ["20-1"]
    assert steps_saved(workdir) == [10, 20, 30, 40]
    assert list(bits(workdir)) == list(range(1, STEPS + 1))
    assert set(skipped(workdir).values()) == {0}, "the steps that were skipped are no more"
    found = bits(workdir)
    assert {n: found[n] for n in range(1, 11)} == {n: reference.bits[n] for n in range(1, 11)}

    with reference.train(killed, *SPIKES, faults=[WRONG]) as child:
        child.wait_for("warning: the loss spiked")
        child.signal(signal.SIGKILL)
        child.finish()
    assert rewinds(killed) == [event]
    with reference.train(killed, *SPIKES, faults=[WRONG]) as child:
        ended = child.finish()
    assert ended.code == 0, ended.text
    assert rewinds(killed) == [event]
    assert bits(killed) == found
    assert digest(killed, STEPS) == digest(workdir, STEPS)


@pytest.mark.slow
def test_row_13_however_seldom_the_loop_looks(reference: Reference, tmp_path: Path):
    """A row that would be over at the next line of the log, and a stop between its end and that line."""
    often, seldom, stopped = (tmp_path / name for name in ("often", "seldom", "stopped"))
    with reference.train(often, *SPIKES, faults=[WRONG]) as child:
        assert child.finish().code == 0, child.text
    rarely = [*SPIKES, "--config.log_every=7"]
    with reference.train(seldom, *rarely, faults=[WRONG]) as child:
        ended = child.finish()
    assert ended.code == 0, ended.text
    assert "the loss spiked 3 times in a row up to step 22: back to step 10" in ended.text
    with reference.train(stopped, *rarely, faults=[WRONG, "hang_data@26"]) as child:
        child.wait_for("WAITING")
        child.signal(signal.SIGTERM)
        assert child.finish().code == 75, child.text
    assert steps_saved(stopped) == [10, 20, 25]
    with reference.train(stopped, *rarely, faults=[WRONG]) as child:
        assert child.finish().code == 0, child.text
    for workdir in (seldom, stopped):
        assert rewinds(workdir) == rewinds(often)
        for step in (10, 20, 30, 40):
            assert digest(workdir, step) == digest(often, step), (workdir, step)
        found = bits(often)
        assert bits(workdir) == {step: found[step] for step in (7, 14, 21, 28, 35, 40)}


@pytest.mark.slow
def test_row_13_back_to_the_start(reference: Reference, tmp_path: Path):
    """Before the first save in turn: a fresh state, also where the run was stopped and has saved."""
    workdir, killed = tmp_path / "run", tmp_path / "killed"
    flags = [*SPIKES, f"--config.checkpoint.every={STEPS}"]
    with reference.train(workdir, *flags, faults=[WRONG]) as child:
        ended = child.finish()
    assert ended.code == 0, ended.text
    assert "back to step 0" in ended.text
    assert rewinds(workdir) == [
        {"event": "rewind", "step": 0, "next_row": 0, "resume_row": (19 + 5) * BATCH}
    ]
    with reference.train(killed, *flags, faults=[WRONG, "hang_data@16"]) as child:
        child.wait_for("WAITING")
        child.signal(signal.SIGTERM)
        assert child.finish().code == 75, child.text
    assert steps_saved(killed) == [15]
    with reference.train(killed, *flags, faults=[WRONG]) as child:
        child.wait_for("warning: the loss spiked")
        child.signal(signal.SIGKILL)
        child.finish()
    assert [path.name for path in (killed / "superseded").iterdir()] == ["15-1"]
    with reference.train(killed, *flags, faults=[WRONG]) as child:
        assert child.finish().code == 0, child.text
    assert rewinds(killed) == rewinds(workdir)
    assert bits(killed) == bits(workdir)
    assert digest(killed, STEPS) == digest(workdir, STEPS)


@pytest.mark.slow
def test_row_13_budget_of_rewinds(reference: Reference, tmp_path: Path):
    """Wrong targets wherever it goes: two rewinds, each further, then the end with a checkpoint."""
    workdir = tmp_path / "run"
    # At step 10 the model is so new that wrong targets are hardly worse: losses still fall by the step.
    flags = [*SPIKES, "--config.guards.spike_sigmas=0.5"]
    with reference.train(workdir, *flags, faults=["wrong_targets@20-99"]) as child:
        ended = child.finish()
    assert ended.code == 5, ended.text
    assert "all guards.rewinds=2 rewinds are used up" in ended.text
    first, second = rewinds(workdir)
    assert first["resume_row"] == second["next_row"] < second["resume_row"]
    assert steps_saved(workdir) == [10]
