"""Every mistake ends in one paragraph and its exit code, before any compile, and leaves nothing."""

import json
from pathlib import Path
import subprocess
import sys

import jax
import pytest

from moe.cli import load_config, split_overrides
from moe.data.tokenizers import byte_tokenizer
from moe.model.build import model_spec
from moe.training import guards, optimizer
from moe.training.checkpoint import Checkpointer
from moe.training.state import TrainState, make_skeleton
from moe.training.workdir import write_config
from tests import entry, tiny

COMPILED: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def _listen():
    def on_event(event: str, duration_secs: float, **_: str | int) -> None:
        del duration_secs
        if "backend_compile" in event:
            COMPILED.append(event)

    jax.monitoring.register_event_duration_secs_listener(on_event)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    entry.tiny_text(folder)
    return folder


def listing(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def fails(
    code: int, words: list[str], program: str, *arguments: str, compiled: bool = False
) -> None:
    """Runs, and holds the ending to the promises of this file."""
    COMPILED.clear()
    ended = entry.run(program, *arguments)
    assert ended.code == code, ended
    name = {2: "ConfigError", 3: "DataError", 4: "CheckpointError"}[code]
    assert ended.err.startswith(f"{name}: ")
    assert ended.err.count("\n") == 1, "one paragraph"
    assert ended.err.endswith(".\n")
    assert ended.out == ""
    assert [word for word in words if word not in ended.err] == [], ended.err
    assert compiled or not COMPILED


def test_the_listener_hears_a_compile():
    COMPILED.clear()
    jax.jit(lambda x: x * 3.25)(1.0)
    assert COMPILED


@pytest.mark.parametrize(
    ("code", "arguments", "words"),
    [
        (2, ["model.num_expert=4"], ["model.num_expert", "'model.num_experts'"]),
        (2, ["steps=many"], ["steps", "'many'", "int"]),
        (2, ["router.k=9"], ["router.k=9", "model.num_experts=8"]),
        (2, ["mesh.expert=8", "mesh.data=1", "model.num_experts=12"], ["12", "mesh.expert=8"]),
        (2, ["mesh.tensor=8", "mesh.data=1"], ["mesh.tensor=8", "divides"]),
        (2, ["mesh.data=3"], ["mesh.data=3", "8 devices"]),
        (2, ["data.batch_size=12"], ["data.batch_size=12", "8", "16"]),
        (2, ["optimizer.accumulation=2"], ["data.batch_size=8", "2", "16"]),
        (2, ["router.k=1"], ["router.k=1", "renormalize", "gradient"]),
        (2, ["router.name=switch"], ["router.k=2", "switch"]),
        (2, ["dispatch.name=fast"], ["dispatch.name='fast'"]),
        (2, ["data.name=stdlibs"], ["data.name='stdlibs'", "stdlib"]),
        (2, ["data.weights={'cod': 1.0}"], ["data.weights", "'cod'", "'code'"]),
        (3, ["data.files=nothing/*.txt"], ["nothing/*.txt"]),
        (3, ["data.sequence_length=100000"], ["data.batch_size=8", "100000"]),
    ],
)
def test_config_and_data(code, arguments, words, text, tmp_path):
    flags = [f"--config.{argument}" for argument in arguments]
    workdir = tmp_path / "run"
    start = [entry.QUICKSTART, f"--workdir={workdir}", *entry.MODEL_FLAGS, *entry.data_flags(text)]
    fails(code, words, "train", *start, *flags)
    assert not workdir.exists()


@pytest.mark.parametrize("content", [b"", b"caf\xe9 au lait\n"], ids=["empty", "not_utf8"])
def test_text_that_cannot_be_used(content, tmp_path):
    for i in range(3):
        (tmp_path / f"code{i}.txt").write_bytes(content)
    flags = [
        entry.QUICKSTART,
        f"--workdir={tmp_path / 'run'}",
        "--config.data.name=files",
        f"--config.data.files={tmp_path}/*.txt",
        f"--config.data.directory={tmp_path / 'made'}",
    ]
    before = listing(tmp_path)
    fails(3, ["text" if content == b"" else "UTF-8"], "train", *flags)
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["--config"]),
        ([entry.QUICKSTART], ["--workdir"]),
        (["--config=configs/nothing.py", "--workdir={}"], ["configs/nothing.py"]),
        ([entry.QUICKSTART + ":thick", "--workdir={}"], ["'thick'", "'dense'"]),
        ([entry.QUICKSTART, "--workdri={}"], ["workdri"]),
        ([entry.QUICKSTART, "--workdir={}", "steps=3"], ["'steps=3'"]),
        ([entry.QUICKSTART, "--workdir={}", "--config.steps", "3"], ["--config.steps=VALUE"]),
        ([entry.QUICKSTART, "--workdir={}/missing/run"], ["parent", "mkdir -p"]),
        ([entry.QUICKSTART, "--workdir={}", "--num_processes=2"], ["--coordinator_address"]),
        ([entry.QUICKSTART, "--workdir={}", "--cpu_devices=0"], ["--cpu_devices=0"]),
    ],
)
def test_command_line(flags, words, tmp_path):
    fails(2, words, "train", *(flag.format(tmp_path / "run") for flag in flags))
    assert listing(tmp_path) == {}


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a place where root cannot write")
def test_workdir_that_cannot_be_written():
    fails(2, ["--workdir=/proc/run", "written"], "train", entry.QUICKSTART, "--workdir=/proc/run")


def test_workdir_that_is_a_file(tmp_path):
    path = tmp_path / "run"
    path.write_text("mine")
    fails(2, ["is a file"], "train", entry.QUICKSTART, f"--workdir={path}")
    assert path.read_text() == "mine"


@pytest.fixture
def workdir(text, tmp_path) -> Path:
    """Of a run that has saved step 3; nothing was compiled to make it."""
    _, _, pairs = split_overrides([*entry.MODEL_FLAGS, *entry.data_flags(text)])
    config = load_config("configs/quickstart.py", pairs)
    tokenizer = byte_tokenizer()
    skeleton = make_skeleton(model_spec(config, tokenizer.vocab_size))
    params, router = tiny.numbers(skeleton)
    o = config.optimizer
    moments = optimizer.adam(b1=o.b1, b2=o.b2, eps=o.eps).init(params)
    state = TrainState(jax.numpy.int32(3), params, router, moments, guards.fresh())
    workdir = tmp_path / "run"
    workdir.mkdir()
    write_config(workdir, config.to_dict())
    (workdir / "tokenizer.json").write_text(tokenizer.to_json())
    meta = {"config": config.to_dict(), "tokenizer": tokenizer.to_json()}
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        checkpointer.save(3, state._asdict(), {"next_batch": 3}, meta)
    return workdir


def test_checkpoint_of_another_model(workdir, text):
    before = listing(workdir)
    start = [entry.QUICKSTART, f"--workdir={workdir}", *entry.MODEL_FLAGS, *entry.data_flags(text)]
    for change, words in (
        ("model.width=32", ["another model", "16", "32"]),
        ("model.num_layers=4", ["another model"]),
        ("model.tie_embeddings=true", ["another model", "head"]),
    ):
        fails(4, words, "train", *start, f"--config.{change}")
        fails(4, words, "eval", f"--workdir={workdir}", f"--config.{change}")
    # The same model, another place in the data. Digests of what was read are compiled before.
    fails(4, ["place in the data"], "train", *start, compiled=True)
    # What took long to compile is kept: on a busy machine that is the digests too.
    after = {name: v for name, v in listing(workdir).items() if "compile_cache" not in name}
    assert after == {name: v for name, v in before.items() if "compile_cache" not in name}


@pytest.mark.parametrize(
    ("code", "flags", "words"),
    [
        (4, ["--step=7"], ["7", "[3]"]),
        (4, ["--step=best"], ["best", "bits_per_byte"]),
        (2, ["--step=newest"], ["--step=newest"]),
        (2, ["--split=train"], ["split", "valid"]),
        (2, ["--matrix=router.k"], ["--matrix", "router.k"]),
        (2, ["--matrix=router.kk=1"], ["router.kk", "router.k"]),
        (2, ["--matrix=router.k=2,9"], ["router.k=9"]),
        (2, ["--matrix=data.batch_size=8"], ["'data.batch_size'", "model, router, dispatch"]),
        (2, ["--matrix=router.k=2;model.width=16,32"], ["router.k=2;model.width=32"]),
        (2, ["--generate=def", "--top_p=2"], ["top_p=2.0"]),
        (2, ["--generate=def", "--length=0"], ["length=0"]),
        (2, ["--config=configs/quickstart.py"], ["--config=FILE"]),
        (2, ["--config.model.num_expert=4"], ["'model.num_experts'"]),
    ],
)
def test_eval_command_line(code, flags, words, workdir):
    before = listing(workdir)
    fails(code, words, "eval", f"--workdir={workdir}", *flags)
    assert listing(workdir) == before


def test_eval_without_a_run(tmp_path):
    fails(2, ["--workdir"], "eval")
    fails(2, ["config.json"], "eval", f"--workdir={tmp_path / 'nothing'}")
    (tmp_path / "config.json").write_text(json.dumps({"config": {}}))
    fails(4, ["no checkpoints"], "eval", f"--workdir={tmp_path}")


def test_the_shell_sees_the_code_in_seconds(tmp_path):
    done = subprocess.run(
        [sys.executable, "train.py", entry.QUICKSTART, f"--workdir={tmp_path}/a/b"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("ConfigError: --workdir=")
    assert "Traceback" not in done.stderr
    assert listing(tmp_path) == {}
