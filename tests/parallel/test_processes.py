"""Two processes of four devices each are one run of eight devices, interrupted and resumed as one."""

import json
import os
from pathlib import Path
import socket
import subprocess
import sys

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]

CONFIG = """
from configs import models
from moe.config import default_config


def get_config():
    config = default_config()
    config.update({"steps": 4, "log_every": 1})
    config.optimizer.update({"schedule": "constant", "warmup_steps": 1})  # the same in 2 steps as in 4
    config.model.update(models.tiny())
    config.model.update({"num_layers": 1, "num_experts": 4})
    config.data.update({
        "name": "files", "files": "TEXT", "directory": "CACHE", "batch_size": 8, "sequence_length": 32
    })
    config.mesh.update({"expert": 4, "tensor": 2})
    config.checkpoint.every = 2
    config.evaluation.every = 4
    return config
"""


@pytest.fixture
def tiny_run(tmp_path):
    """A config file over text of its own."""
    rng = np.random.default_rng(0)
    words = ["".join(chr(97 + c) for c in rng.integers(0, 26, 5)) for _ in range(50)]
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text(" ".join(rng.choice(words, 300)))
    text = CONFIG.replace("TEXT", str(tmp_path / "*.txt")).replace("CACHE", str(tmp_path / "cache"))
    (tmp_path / "config.py").write_text(text)
    return tmp_path


def start(folder: Path, name: str, devices: int, process: tuple[int, int, int] | None, *more: str):
    """One process of the run; `process` is (port, number of processes, which one)."""
    command = [sys.executable, "train.py", f"--config={folder / 'config.py'}"]
    command += [f"--workdir={folder / name}", f"--cpu_devices={devices}", *more]
    if process is not None:
        port, count, which = process
        command += [f"--coordinator_address=127.0.0.1:{port}"]
        command += [f"--num_processes={count}", f"--process_id={which}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*children: subprocess.Popen) -> None:
    for child in children:
        output, _ = child.communicate(timeout=240)
        assert child.returncode == 0, output


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["loss/total"] for r in lines if r["split"] == "train"}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_processes_are_one_run_and_resume_as_one(tiny_run):
    finish(start(tiny_run, "alone", 8, None))
    port = free_port()
    finish(*(start(tiny_run, "pair", 4, (port, 2, i), "--config.steps=2") for i in (0, 1)))
    finish(start(tiny_run, "pair", 8, None))
    expected, found = losses(tiny_run / "alone"), losses(tiny_run / "pair")
    assert list(found) == list(expected) == [1, 2, 3, 4]
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)
    alone, pair = (
        json.loads((tiny_run / name / "eval" / "valid-4.json").read_text())["metrics"]
        for name in ("alone", "pair")
    )
    assert alone["tokens"] == pair["tokens"]
    assert alone["loss/cross_entropy"] == pytest.approx(pair["loss/cross_entropy"], rel=1e-5)
