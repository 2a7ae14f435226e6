"""Row 16: a config that cannot work ends before anything is made, and says what would."""

import subprocess
import sys
import time

import pytest

from moe.cli import complete_config, load_config, split_overrides
from tests import entry
from tests.faults.harness import ROOT
from tests.test_bad_input import _listen, fails, listing  # noqa: F401  # the fixture is used by name


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    entry.tiny_text(folder)
    return folder


BAD = [
    # Shapes that do not fit each other or the devices.
    (["model.num_experts=6", "mesh.expert=4"], ["6", "mesh.expert=4", "8"]),
    (["model.num_experts=8", "router.k=12"], ["router.k=12", "model.num_experts=8"]),
    (["mesh.data=4", "mesh.expert=4"], ["8 devices", "mesh.data=4", "mesh.expert=4"]),
    (["mesh.data=-1", "mesh.fsdp=-1"], ["mesh.data=-1", "mesh.fsdp=-1"]),
    (
        ["mesh.sequence=2", "mesh.data=4", "data.sequence_length=33"],
        ["33", "mesh.sequence=2", "34"],
    ),
    (["data.batch_size=20"], ["data.batch_size=20", "8", "24"]),
    (["model.heads=3"], ["model.heads=3", "kv_heads=2", "divisors"]),
    (["model.head_dim=7"], ["model.head_dim=7", "even"]),
    (["model.first_dense=5"], ["model.first_dense=5", "model.num_layers=2"]),
    # Numbers out of range.
    (["steps=0"], ["steps=0", "greater than 0"]),
    (["steps=-5"], ["steps=-5", "greater than 0"]),
    (["seed=-1"], ["seed=-1", "negative"]),
    (["model.dropout=1"], ["model.dropout=1.0", "less than 1"]),
    (["optimizer.learning_rate=-1e-3"], ["optimizer.learning_rate=-0.001", "negative"]),
    (["optimizer.learning_rate=nan"], ["optimizer.learning_rate", "float", "nan"]),
    (["optimizer.learning_rate=inf"], ["optimizer.learning_rate", "float", "inf"]),
    (["optimizer.learning_rate=1e999"], ["optimizer.learning_rate", "inf", "finite"]),
    (["losses.z=1e999"], ["losses.z", "inf", "finite"]),
    (["guards.window=0"], ["guards.window=0", "greater than 0"]),
    (["guards.rewinds=-1"], ["guards.rewinds=-1", "negative"]),
    (["checkpoint.keep_latest=0"], ["checkpoint.keep_latest=0", "greater than 0"]),
    (["data.workers=-1"], ["data.workers=-1", "negative"]),
    # Types.
    (["steps=true"], ["steps", "int", "True", "bool"]),
    (["steps=1e3"], ["steps", "int", "1000.0", "float"]),
    (["steps="], ["steps", "int", "''"]),
    (["steps=none"], ["steps", "int", "None"]),
    (["model.tie_embeddings=1"], ["model.tie_embeddings", "bool", "1", "int"]),
    (["data.files=[1]"], ["data.files", "list"]),
    # Names and keys.
    (["optimizer.moment_dtype=float16"], ["optimizer.moment_dtype='float16'", "bfloat16"]),
    (["router.name=swich"], ["router.name='swich'", "'switch'"]),
    (["mesh.rules=foldet"], ["mesh.rules='foldet'", "folded"]),
    (["optimizer.learning_rat=1"], ["'optimizer.learning_rat'", "'optimizer.learning_rate'"]),
    (["guard.window=5"], ["'guard.window'", "'guards.window'"]),
    (["optimizer=adam"], ["'optimizer'", "unknown config key"]),
    (["optimizer.b1.x=1"], ["'optimizer.b1.x'", "'optimizer.b1'"]),
    (["=3"], ["unknown config key ''"]),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[" ".join(bad) for bad, _ in BAD])
def test_row_16_bad_config(arguments, words, text, tmp_path):
    workdir = tmp_path / "run"
    start = [entry.QUICKSTART, f"--workdir={workdir}", *entry.MODEL_FLAGS, *entry.data_flags(text)]
    fails(2, words, "train", *start, *[f"--config.{argument}" for argument in arguments])
    assert listing(tmp_path) == {}


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.", ["--config.=VALUE"]),
        ("--config.steps", ["--config.steps=VALUE"]),
        ("--config.steps 3", ["--config.steps 3=VALUE"]),
        ("-config.steps=x", ["steps", "'x'"]),
        ("--config=", ["--config="]),
        ("--configs.steps=3", ["configs.steps"]),
    ],
)
def test_row_16_bad_flag(flag, words, tmp_path):
    fails(2, words, "train", entry.QUICKSTART, f"--workdir={tmp_path / 'run'}", flag)
    assert listing(tmp_path) == {}


def test_the_last_of_several_values_wins_as_in_absl():
    """A script that ends in "$@" is overridden from its command line."""
    _, path, pairs = split_overrides(
        ["--config=a.py", "--config.steps=3", "--config=configs/quickstart.py", "--config.steps=5"]
    )
    assert path == "configs/quickstart.py"
    config = load_config(path, pairs)
    assert config.steps == 5
    assert complete_config(config, [("seed", "1"), ("seed", "2")]).seed == 2


def seconds(*arguments: str) -> float:
    started = time.monotonic()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, check=False)
    return time.monotonic() - started


def test_row_16_the_shell_hears_of_it_at_once(tmp_path):
    """Two seconds beyond the imports of the program, on a machine with nothing else to do."""
    flags = [entry.QUICKSTART, f"--workdir={tmp_path / 'run'}", "--config.steps=many"]
    imports = seconds("-c", "import train")
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "train.py", *flags], cwd=ROOT, capture_output=True, text=True, check=False
    )
    beyond = time.monotonic() - started - imports
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ConfigError: ")
    assert "'many'" in done.stderr
    assert listing(tmp_path) == {}
    assert beyond < 2 + imports  # imports alone vary by as much where others run
