"""A run whose prior learns from held-out text: interrupted and not, its routing over time, its page."""

import json
from pathlib import Path
import re
import signal
from unittest import mock

import numpy as np
import pytest

from moe.evaluation.kept_choices import read, saturation_curve
from moe.training.checkpoint import Checkpointer
from moe.training.recording import Recorder
from tests import entry

STEPS, STOPPED = 8, 5
FLAGS = [
    entry.QUICKSTART,
    *entry.MODEL_FLAGS,
    "--config.model.num_experts=4",
    f"--config.steps={STEPS}",
    "--config.log_every=1",
    "--config.checkpoint.every=2",
    "--config.checkpoint.keep_latest=4",
    "--config.evaluation.every=2",
    "--config.evaluation.batches=1",
    "--config.optimizer.warmup_steps=2",
    "--config.router.name=random_path",
    "--config.router.paths=2",
    "--config.prior.every=3",
    "--config.prior.rate=0.5",
]
MEASURED = ("speed/", "memory/")


def records(workdir: Path) -> list[dict]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.startswith(MEASURED)} for line in lines]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with entry.compiled_once(tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("text")
    entry.tiny_text(folder)
    return [*FLAGS, *entry.data_flags(folder)]


@pytest.fixture(scope="module")
def workdir(flags, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    ended = entry.run("train", *flags, f"--workdir={workdir}")
    assert ended.code == 0, ended.err
    assert "note:" not in ended.err
    return workdir


def test_prior_moves_every_third_step(workdir):
    rounds = [line for line in records(workdir) if line["split"] == "router_valid"]
    assert [line["step"] for line in rounds] == [3, 6]
    assert all(line["routing/reward_spread"] > 0 for line in rounds)
    valid = [line for line in records(workdir) if line["split"] == "valid"]
    entropy = {line["step"]: line["routing/prior_entropy"] for line in valid}
    assert entropy[2] == pytest.approx(np.log(4), rel=1e-6)
    assert entropy[4] < entropy[2] - 0.01
    assert entropy[8] != entropy[4]


def test_interrupted_run_goes_on_bit_for_bit(flags, workdir):
    again = workdir.parent / "stopped"
    write = Recorder.write

    def write_and_signal(self, step, split, values):
        write(self, step, split, values)
        if step == STOPPED and split == "train":
            signal.raise_signal(signal.SIGTERM)

    with mock.patch.object(Recorder, "write", write_and_signal):
        stopped = entry.run("train", *flags, f"--workdir={again}")
    assert stopped.code == 75, stopped.err
    assert re.search(r"stopped at step [567]", stopped.err)
    assert entry.run("train", *flags, f"--workdir={again}").code == 0
    assert records(again) == records(workdir)
    one, two = (saturation_curve(read(run, "valid")) for run in (again, workdir))
    assert one == two


def test_last_evaluation_tells_how_routing_settled(workdir):
    kept = read(workdir, "valid")
    assert [k.step for k in kept] == [2, 4, 6, 8]
    record = json.loads((workdir / "eval" / "valid-8.json").read_text())
    assert record["saturation"] == saturation_curve(kept)
    assert np.shape(record["saturation"]["per_layer"]) == (3, 2)
    metrics = record["metrics"]
    last = record["saturation"]["per_layer"][-1]
    assert metrics["routing/per_layer/saturation"] == last
    assert metrics["routing/churn"] == pytest.approx(1 - np.mean(last))
    first = json.loads((workdir / "eval" / "valid-2.json").read_text())
    assert "routing/churn" not in first["metrics"]
    assert "saturation" not in first


def test_evaluating_the_last_step_again_keeps_what_the_loop_found(workdir):
    path = workdir / "eval" / "valid-8.json"
    loop = json.loads(path.read_text())
    assert entry.run("eval", f"--workdir={workdir}", "--split=valid").code == 0
    again = json.loads(path.read_text())
    assert again["saturation"] == loop["saturation"]
    assert again["metrics"]["routing/churn"] == loop["metrics"]["routing/churn"]


def test_record_tells_cost_and_causality(workdir):
    record = json.loads((workdir / "eval" / "valid-8.json").read_text())
    assert record["causality"] == {"router": "C0", "causal_form": True}
    model, choices = record["model"], record["metrics"]["routing/choices"]
    assert 1.0 <= choices < 2.0, "paths that meet run one expert"
    missing = (2 - choices) * 2 * 2 * 3 * 16 * 16  # layers x 2 FLOPs x 3 matrices of 16 x 16
    assert model["flops_executed"] == pytest.approx(model["flops_per_token"] - missing)


def test_eval_against_other_checkpoints(workdir):
    ended = entry.run("eval", f"--workdir={workdir}", "--split=test", "--reference_step=all")
    assert ended.code == 0, ended.err
    record = json.loads((workdir / "eval" / "test-8.json").read_text())
    with Checkpointer(workdir / "checkpoints", read_only=True) as checkpointer:
        others = [step for step in sorted(checkpointer.all_steps()) if step != STEPS]
    assert len(others) >= 3
    assert record["saturation"]["steps"] == others
    shares = np.mean(record["saturation"]["per_layer"], axis=1)
    assert (shares > 0.2).all()
    assert (shares < 1.0).all()
    assert shares[-1] > shares[0]
    assert f"saturation, step {others[0]} against 8" in ended.out
    same = entry.run("eval", f"--workdir={workdir}", "--split=test", "--reference_step=8")
    record = json.loads((workdir / "eval" / "test-8.json").read_text())
    assert same.code == 0, same.err
    assert record["metrics"]["routing/saturation"] == 1.0
    mixed = entry.run("eval", f"--workdir={workdir}", "--reference_step=2", "--matrix=router.k=1")
    assert mixed.code == 2
    assert "--reference_step" in mixed.err
