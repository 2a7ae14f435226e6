"""Two processes of four devices each are one run of eight devices, interrupted and resumed as one."""

import json
import os
from pathlib import Path
import re
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from moe.errors import ConfigError
from moe.parallel import distributed
from tests import entry

ROOT = Path(__file__).parents[2]
CLUSTERS = ("SLURM_", "OMPI_", "KUBERNETES_", "TPU_", "MEGASCALE_", "JAX_COORDINATOR")


def start(*arguments: str, **variables: str) -> subprocess.Popen:
    """One Python process, whatever cluster this test itself may run on."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(CLUSTERS)}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**inherited, "PYTHONPATH": str(ROOT), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*children: subprocess.Popen, code: int = 0) -> list[str]:
    outputs = [child.communicate(timeout=240)[0] for child in children]
    assert [child.returncode for child in children] == [code] * len(children), "\n".join(outputs)
    return outputs


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def pair(*arguments: str) -> list[subprocess.Popen]:
    """Both processes of a run of two, by flags."""
    address = f"--coordinator_address=127.0.0.1:{free_port()}"
    flags = [*arguments, "--cpu_devices=4", address, "--num_processes=2"]
    return [start(*flags, f"--process_id={i}") for i in (0, 1)]


def clustered(name: str, *arguments: str) -> list[subprocess.Popen]:
    """Both processes of a run of two, by the variables that a launcher sets, on loopback alone."""
    port = free_port()
    ours = {
        "JAX_COORDINATOR_PORT": str(port),
        "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
    }
    return [start(*arguments, "--detect_cluster", **ours, **LAUNCHERS[name](i)) for i in (0, 1)]


LAUNCHERS = {
    "slurm": lambda i: {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(i),
        "SLURM_LOCALID": str(i),
    },
    "ompi": lambda i: {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(i),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(i),
    },
}

CONFIG = """
from configs import models
from moe.config import default_config


def get_config():
    config = default_config()
    config.update({"steps": 3, "log_every": 1})
    config.optimizer.update({"schedule": "constant", "warmup_steps": 1})  # the same at any length
    config.model.update(models.tiny())
    config.model.update({"num_layers": 1, "num_experts": 4})
    config.data.update({"batch_size": 8, "sequence_length": 32})
    config.mesh.update({"expert": 4, "tensor": 2})
    return config
"""


@pytest.mark.slow
def test_a_run_goes_on_with_any_number_of_processes(tmp_path):
    """Trained by two, one and two processes and evaluated by two under Slurm, beside one process."""
    entry.tiny_text(tmp_path)
    (tmp_path / "config.py").write_text(CONFIG)
    cache = f"--compile_cache={tmp_path / 'cache'}"
    data = [flag for flag in entry.data_flags(tmp_path) if "batch" not in flag]
    train = ["train.py", f"--config={tmp_path / 'config.py'}", *data, cache]
    alone, changing = tmp_path / "alone", tmp_path / "changing"
    finish(start(*train, f"--workdir={alone}", "--cpu_devices=8"))
    train.append(f"--workdir={changing}")
    finish(*pair(*train, "--config.steps=1"))
    finish(start(*train, "--cpu_devices=8", "--config.steps=2"))
    finish(*pair(*train))
    assert list(losses(changing)) == [1, 2, 3]
    np.testing.assert_allclose(
        list(losses(changing).values()), list(losses(alone).values()), rtol=1e-5
    )
    trained = evaluation(changing)
    (changing / "eval" / "valid-3.json").unlink()
    finish(*clustered("slurm", "eval.py", f"--workdir={changing}", cache, "--cpu_devices=4"))
    for one in (trained, evaluation(changing)):
        assert one["tokens"] == evaluation(alone)["tokens"]
        assert one["loss/cross_entropy"] == pytest.approx(
            evaluation(alone)["loss/cross_entropy"], rel=1e-5
        )


def losses(workdir: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["loss/total"] for r in lines if r["split"] == "train"}


def evaluation(workdir: Path) -> dict:
    return json.loads((workdir / "eval" / "valid-3.json").read_text())["metrics"]


WHO = """
import sys
from absl import flags
import jax
from jax.experimental import multihost_utils
from moe.parallel import distributed

values = flags.FlagValues()
distributed.define_flags(values)
values(sys.argv)
distributed.start_from_flags(values)
everyone = multihost_utils.process_allgather(jax.numpy.asarray(jax.process_index()))
print(jax.process_index(), everyone.tolist(), jax.device_count())
"""


@pytest.mark.parametrize("launcher", [pytest.param("ompi", marks=pytest.mark.slow), "slurm"])
def test_processes_find_each_other_in_a_cluster(launcher, tmp_path):
    (tmp_path / "who.py").write_text(textwrap.dedent(WHO))
    told = finish(*clustered(launcher, str(tmp_path / "who.py"), "--cpu_devices=2"))
    for text, line in zip(told, ("0 [0, 1] 4", "1 [0, 1] 4"), strict=True):
        assert line in text.splitlines()  # among what gloo prints


def test_no_cluster_is_told(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    flags = ["train.py", f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}"]
    (told,) = finish(start(*flags, "--detect_cluster"), code=2)
    assert "--detect_cluster found no cluster" in told
    with pytest.raises(ConfigError, match="--detect_cluster with --process_id: the cluster tells"):
        distributed.start(process_id=0, detect_cluster=True)


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"process_id": 2}, "--process_id=2 must be in 0 ... 1 (--num_processes=2)."),
        ({"process_id": -1}, "--process_id=-1 must be in 0 ... 1 (--num_processes=2)."),
        ({}, "--process_id missing: a run of several processes needs"),
        ({"coordinator_address": None}, "--coordinator_address, --process_id missing"),
    ],
)
def test_mistakes_are_told_before_anybody_is_waited_for(given, word, monkeypatch):
    monkeypatch.setattr("jax.distributed.initialize", None)
    with pytest.raises(ConfigError, match=re.escape(word)):
        distributed.start(**{"coordinator_address": "127.0.0.1:1", "num_processes": 2} | given)
