"""The whole road on a tiny model: train, be killed, go on, evaluate, tabulate, generate."""

import json
import os
from pathlib import Path
import re
import signal
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest

from moe.training.recording import Recorder
from tests import entry

STEPS, KILLED = 10, 7
FLAGS = [
    entry.QUICKSTART,
    *entry.MODEL_FLAGS,
    f"--config.steps={STEPS}",
    "--config.log_every=1",
    "--config.checkpoint.every=3",
    "--config.evaluation.every=5",
    "--config.evaluation.batches=1",
    "--config.optimizer.warmup_steps=2",
    "--config.router.name=deepseek_v3",  # state beside the parameters
    "--config.router.jitter=0.01",  # noise, which must not depend on the interruption
    "--config.model.dropout=0.1",
]
# Dies by its own hand in the middle of a step: no handler runs, nothing is flushed.
DOOMED = f"""
import os, signal
import train
from moe import cli
from moe.training.recording import Recorder

write = Recorder.write

def write_or_die(self, step, split, values):
    if step == {KILLED}:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, step, split, values)

Recorder.write = write_or_die
cli.run(train.main)
"""
HISTORY = ("/saturation", "/churn")  # against evaluations before, which overrides leave out
MEASURED = ("speed/", "memory/")  # keys that differ from run to run


def records(workdir: Path) -> list[dict]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith(MEASURED)}
        for line in lines
    ]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Variables for the child process."""
    with entry.compiled_once(tmp_path_factory.mktemp("cache")) as variables:
        yield variables


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("text")
    entry.tiny_text(folder)
    return [*FLAGS, *entry.data_flags(folder)]


@pytest.fixture(scope="module")
def workdir(flags, tmp_path_factory) -> Path:
    """Of a run that was never interrupted."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    ended = entry.run("train", *flags, f"--workdir={workdir}")
    assert ended.code == 0, ended.err
    return workdir


def test_workdir_has_the_interface(workdir):
    names = {path.name for path in workdir.iterdir()}
    assert names == {
        "config.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "choices",
        "eval",
        "history.jsonl",
        "report.html",
        "tokenizer.json",
    }
    config = json.loads((workdir / "config.json").read_text())
    assert set(config) == {"config", "versions", "commit", "device", "devices"}
    assert config["config"]["router"]["name"] == "deepseek_v3"
    assert {path.name for path in (workdir / "checkpoints").iterdir()} >= {"9", "10"}
    assert {path.name for path in (workdir / "eval").iterdir()} == {"valid-5.json", "valid-10.json"}
    assert "<html" in (workdir / "report.html").read_text()


def test_metrics_have_the_interface(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["split"] == "train"]
    valid = [line for line in lines if line["split"] == "valid"]
    assert [line["step"] for line in train] == list(range(1, STEPS + 1))
    assert [line["step"] for line in valid] == [5, 10]
    routing = {
        f"routing/{name}"
        for name in "max_violation drop_rate entropy dead_experts load load_cv margin".split()
    }
    shared = routing | {"loss/cross_entropy", "bits_per_byte", "accuracy"}
    assert set(valid[0]) >= shared | {"perplexity", "speed/tokens_per_second"}
    assert set(train[0]) >= shared | {
        *(f"loss/{name}" for name in ("total", "balance", "z", "sequence_balance")),
        *(
            f"speed/{name}"
            for name in "tokens_per_second step_seconds mfu data_wait_seconds".split()
        ),
        "learning_rate",
        "grad_norm",
    }
    assert np.shape(train[0]["routing/load"]) == (2, 8)
    assert train[-1]["loss/cross_entropy"] < train[0]["loss/cross_entropy"]
    assert all(line["routing/drop_rate"] == 0.0 for line in lines)


def test_killed_and_started_again_is_the_same_run(flags, workdir, cache):
    again = workdir.parent / "killed"
    doomed = subprocess.run(
        [sys.executable, "-c", DOOMED, *flags, f"--workdir={again}", "--cpu_devices=8"],
        capture_output=True,
        text=True,
        env=os.environ | cache,
        timeout=200,
        check=False,
    )
    assert doomed.returncode == -signal.SIGKILL, doomed.stderr
    assert records(again)[-1]["step"] == KILLED - 1
    ended = entry.run("train", *flags, f"--workdir={again}")
    assert ended.code == 0, ended.err
    assert records(again) == records(workdir), "bit for bit"


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT]
)
def test_a_signal_saves_and_exits_75(flags, workdir, number):
    """A real signal in the middle of a step; the same command then makes the same run."""
    again = workdir.parent / f"stopped{int(number)}"
    write = Recorder.write

    def write_and_signal(self, step, split, values):
        write(self, step, split, values)
        if step == KILLED and split == "train":
            signal.raise_signal(number)

    with mock.patch.object(Recorder, "write", write_and_signal):
        stopped = entry.run("train", *flags, f"--workdir={again}")
    assert stopped.code == 75, stopped.err
    found = re.search(r"stopped at step (\d+)", stopped.err)
    assert found is not None, stopped.err
    step = int(found[1])  # a thread listens: the loop may be a step further by then
    assert KILLED <= step < STEPS
    assert (again / "checkpoints" / str(step)).is_dir()
    if number == signal.SIGTERM:
        assert entry.run("train", *flags, f"--workdir={again}").code == 0
        assert records(again) == records(workdir), "bit for bit"


def test_a_run_that_is_done_says_so(flags, workdir):
    before = records(workdir)
    ended = entry.run("train", *flags, f"--workdir={workdir}")
    assert (ended.code, ended.err) == (0, "")
    assert f"it stands at step {STEPS} of steps={STEPS}" in ended.out
    assert records(workdir) == before


def test_eval_writes_table_and_json(workdir):
    ended = entry.run("eval", f"--workdir={workdir}", "--split=test", "--step=best")
    assert ended.code == 0, ended.err
    lines = [line.split() for line in ended.out.splitlines()]
    table = {line[0]: line[1:] for line in lines if line}
    assert {"all", "code", "prose", "routing/max_violation", "speed/tokens_per_second"} <= set(
        table
    )
    path = next((workdir / "eval").glob("test-*.json"))
    record = json.loads(path.read_text())
    assert set(record) == {
        "step",
        "split",
        "metrics",
        "domains",
        "domain_load",
        "tables",
        "model",
        "causality",
        "sample",
        "favourites",
        "modality_load",
        "triad",
    }
    assert table["all"][2] == f"{record['metrics']['bits_per_byte']:.4f}"
    assert set(record["domains"]) == {"code", "prose"}
    triad = record["triad"]
    bits = triad["accuracy"]["bits_per_byte"]
    assert bits["value"] == pytest.approx(record["metrics"]["bits_per_byte"], rel=1e-5)
    assert bits["low"] < bits["value"] < bits["high"]
    assert table["bits_per_byte"][0] == f"{bits['value']:.4f}"
    gap = triad["generalisation"]["train"]["bits_per_byte"]
    assert gap["difference"] == pytest.approx(gap["value"] - bits["value"])
    assert table["train"][0] == f"{gap['value']:.4f}"
    assert np.shape(record["domain_load"]["code"]) == (2, 8)
    assert np.shape(record["sample"]["experts"]) == (2, 32, 2)
    assert len(record["sample"]["tokens"]) == 32


def test_eval_of_the_last_step_agrees_with_the_training_loop(workdir):
    """One batch of valid, as in the loop; the checkpoint went to disk and back between them."""
    flags = [f"--workdir={workdir}", f"--step={STEPS}", "--config.evaluation.batches=1"]
    assert entry.run("eval", *flags).code == 0
    found = json.loads(next((workdir / "eval" / "overrides").glob("valid-*.json")).read_text())
    loop = json.loads((workdir / "eval" / f"valid-{STEPS}.json").read_text())
    for key, value in loop["metrics"].items():
        if not key.startswith(MEASURED) and not key.endswith(HISTORY):
            np.testing.assert_allclose(found["metrics"][key], value, rtol=1e-6, err_msg=key)


def test_matrix_is_one_table(workdir):
    ended = entry.run(
        "eval", f"--workdir={workdir}", "--matrix=router.k=1;dispatch.capacity_factor=0.5,none"
    )
    assert ended.code == 0, ended.err
    rows = json.loads(next((workdir / "eval" / "matrix").glob("*.json")).read_text())
    drops = [row["metrics"]["routing/drop_rate"] for row in rows]
    assert drops[0] > 0.05
    assert drops[1] == 0.0
    assert [row["overrides"]["dispatch.capacity_factor"] for row in rows] == ["0.5", "none"]
    header = ended.out.splitlines()[0].split()
    assert header[:3] == ["router.k", "dispatch.capacity_factor", "loss/cross_entropy"]


def test_generate_continues_the_prompt(workdir):
    arguments = [f"--workdir={workdir}", "--generate=def ", "--length=6", "--temperature=0.5"]
    ended = entry.run("eval", *arguments, "--seed=1")
    assert ended.code == 0, ended.err
    assert ended.out.startswith("def ")
    assert len(ended.out.encode()) > len(b"def \n")
