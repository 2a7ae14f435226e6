"""`scripts/checkpoint.py`: what it tells, what it deletes, and checkpoints as safetensors and back."""

import contextlib
import importlib
import io
import json
import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moe import cli
from moe.errors import CheckpointError
from moe.training import conversion
from moe.training.checkpoint import Checkpointer
from moe.training.record import sign
from moe.training.workdir import open_workdir
from tests.training.tiny_checkpoints import (
    DATA,
    META,
    abstract,
    assert_same_bits,
    files_of,
    flip_byte,
    make_state,
    save_steps,
    small_state,
)


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code and what was printed."""
    module = importlib.import_module("scripts.checkpoint")
    module.FLAGS.unparse_flags()
    for name in module.FLAGS:
        module.FLAGS[name].using_default_value = True
        module.FLAGS[name].value = module.FLAGS[name].default
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch("sys.argv", ["checkpoint.py", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        cli.run(module.main)
    return int(end.value.code or 0), out.getvalue(), err.getvalue()


@pytest.fixture
def workdir(tmp_path):
    directory = tmp_path / "run" / "checkpoints"
    directory.parent.mkdir()
    with Checkpointer(directory, keep_latest=9) as checkpoints:
        for step, bits in ((1, 1.0), (2, 3.0), (3, 2.0)):
            checkpoints.save(step, small_state(step), DATA, META, {"bits_per_byte": bits})
        checkpoints.rate(3, {"accuracy": 0.5})
    return directory.parent


def steps(workdir) -> list[str]:
    return sorted(p.name for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def test_list_tells_what_there_is_and_what_is_trusted(workdir):
    (workdir / "checkpoints" / "7").mkdir()
    code, out, _ = run("list", workdir)
    assert code == 0
    lines = out.splitlines()
    assert len(lines) == 4
    size = sum(path.stat().st_size for path in files_of(workdir / "checkpoints" / "3"))
    assert lines[2] == (f"step 3  {size} bytes  format 2  trusted  bits_per_byte=2 accuracy=0.5")
    assert lines[3] == "step 7  0 bytes  format -  not trusted: it is empty"
    assert run("list", workdir / "checkpoints")[1] == out
    code, _, err = run("list", workdir.parent)
    assert code == 4
    assert err.startswith("CheckpointError: There are no checkpoints at")


def test_verify_names_the_file_and_the_leaf(workdir):
    code, out, _ = run("verify", workdir)
    assert (code, out.count("all as it was saved")) == (0, 3)
    folder = workdir / "checkpoints" / "2"
    payload = max(folder.rglob("d/*"), key=lambda path: path.stat().st_size)
    flip_byte(payload, payload.stat().st_size // 2)
    code, out, err = run("verify", workdir)
    assert code == 4
    assert str(payload.relative_to(folder)) in out
    assert "the digest of params/w is not the one that was saved" in out
    assert "Checkpoints [2] in" in err
    assert run("verify", workdir, "--step=1")[0] == 0
    assert run("verify", workdir, "--step=9")[0] == 4
    (folder / "manifest.json").unlink()  # then the leaves alone tell
    code, out, _ = run("verify", workdir, "--step=2")
    assert (code, out.count(";")) == (4, 0)
    assert "params/w" in out


def test_verify_sees_a_flipped_bit_of_every_file(workdir):
    folder = workdir / "checkpoints" / "3"
    for path in files_of(folder):
        flip_byte(path, path.stat().st_size // 2)
        assert run("verify", workdir, "--step=3")[0] == 4, path
        flip_byte(path, path.stat().st_size // 2)
    assert run("verify", workdir, "--step=3")[0] == 0


def test_prune_deletes_what_no_rule_keeps_and_nothing_else(workdir):
    outside = workdir / "outside"
    shutil.copytree(workdir / "checkpoints" / "1", outside)
    (workdir / "checkpoints" / "0").symlink_to(outside)
    (workdir / "checkpoints" / "4").mkdir()
    rules = ("--keep_latest=1", "--keep_best=1")
    before = len(files_of(outside))
    code, out, _ = run("prune", workdir, *rules, "--dry_run")
    assert code == 0
    assert "step 2 " in out
    assert "would be deleted" in out
    assert steps(workdir) == ["0", "1", "2", "3", "4"]
    code, out, _ = run("prune", workdir, *rules)
    assert (code, out.count("deleted")) == (0, 1)
    assert steps(workdir) == ["0", "1", "3", "4"]  # what is not ours stays
    assert len(files_of(outside)) == before


def test_prune_is_refused_where_a_run_is_going_or_nothing_is_ours(workdir, tmp_path):
    rules = ("--keep_latest=1", "--keep_best=0")
    with open_workdir(workdir):
        code, _, err = run("prune", workdir, *rules)
        assert code == 2
        assert "is in use by" in err
        assert steps(workdir) == ["1", "2", "3"]
    (tmp_path / "other" / "checkpoints" / "5").mkdir(parents=True)
    code, _, err = run("prune", tmp_path / "other", *rules)
    assert code == 4
    assert "None of the checkpoints [5]" in err
    assert run("prune", workdir)[0] == 2
    assert run("prune", workdir, "--keep_latest=0", "--keep_best=0")[0] == 2


@pytest.mark.parametrize(
    "arguments", [(), ("list",), ("burn", "."), ("list", ".", "."), ("list", ".", "--x=1")]
)
def test_usage(arguments):
    code, _, err = run(*arguments)
    assert code == 2
    assert err.startswith("ConfigError: ")


# ---- safetensors


@pytest.fixture
def full(tmp_path):
    """A state with every kind of leaf, and router state under its name."""
    state = make_state()
    state["router"] = state.pop("router_state")
    directory = tmp_path / "full" / "checkpoints"
    directory.parent.mkdir()
    with Checkpointer(directory) as checkpoints:
        checkpoints.save(5, state, DATA, META, {"bits_per_byte": 2.0})
        checkpoints.rate(5, {"accuracy": 0.5})
    return directory.parent, state


def test_a_round_trip_through_safetensors_is_bit_for_bit(full, tmp_path):
    workdir, state = full
    assert run("convert", workdir, f"--to={tmp_path / 'out'}", "--all")[0] == 0
    code, out, _ = run("convert", tmp_path / "out", f"--to={tmp_path / 'back'}")
    assert (code, out) == (0, f"step 5 is in {tmp_path / 'back'}\n")
    for devices in (8, 1):
        with Checkpointer(tmp_path / "back" / "checkpoints") as checkpoints:
            restored = checkpoints.restore_newest(abstract(state, devices), fresh={})
            assert restored is not None
            assert checkpoints.best_step() == 5
        assert_same_bits(state, restored.state)
        assert (restored.step, restored.data_state, restored.meta) == (5, DATA, META)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["config"] == META["config"]
    code, _, err = run("convert", tmp_path / "out", f"--to={tmp_path / 'back'}")
    assert code == 4
    assert "There is a checkpoint 5" in err


def test_the_arrays_are_what_their_names_say(full, tmp_path):
    workdir, state = full
    assert run("convert", workdir, f"--to={tmp_path / 'out'}")[0] == 0
    modes = {
        (tmp_path / "out" / name).stat().st_mode for name in ("model.safetensors", "record.json")
    }
    assert len(modes) == 1, "whoever may read one may read the other"
    arrays = load_file(tmp_path / "out" / "model.safetensors")
    assert sorted(arrays) == ["params.experts.up", "params.scale", "router.bias"]
    assert arrays["params.scale"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        arrays["params.experts.up"], np.asarray(state["params"]["experts"]["up"])
    )
    assert run("convert", tmp_path / "out", f"--to={tmp_path / 'back' / 'checkpoints'}")[0] == 0
    assert steps(tmp_path / "back") == ["5"]
    code, _, err = run("convert", workdir, f"--to={tmp_path / 'out'}")
    assert code == 4
    assert "holds a converted checkpoint already" in err


def test_a_model_without_its_optimizer_restores_in_part(full, tmp_path):
    workdir, state = full
    conversion.to_safetensors(workdir / "checkpoints", 5, tmp_path / "out")
    conversion.from_safetensors(tmp_path / "out", tmp_path / "back" / "checkpoints")
    model = {name: state[name] for name in ("params", "router")}
    with Checkpointer(tmp_path / "back" / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore("latest", abstract(model), partial=True)
        assert_same_bits(model, restored.state)
        with pytest.raises(CheckpointError, match="is absent in the checkpoint"):
            checkpoints.restore("latest", abstract(state))


def test_keys_are_their_data_under_their_name(full, tmp_path):
    workdir, state = full
    conversion.to_safetensors(workdir / "checkpoints", 5, tmp_path / "out", everything=True)
    arrays = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(arrays["key"], jax.random.key_data(state["key"]))


@pytest.mark.parametrize("name", ["model.safetensors", "record.json"])
def test_a_damaged_folder_is_refused(full, tmp_path, name):
    workdir, _ = full
    out = tmp_path / "out"
    conversion.to_safetensors(workdir / "checkpoints", 5, out)
    intact = (out / name).read_bytes()
    for index in (2, len(intact) // 2, len(intact) - 4):
        flip_byte(out / name, index)
        with pytest.raises(CheckpointError):
            conversion.from_safetensors(out, tmp_path / "back" / "checkpoints")
        (out / name).write_bytes(intact)
    (out / name).write_bytes(intact[:-9])
    with pytest.raises(CheckpointError, match="out"):
        conversion.from_safetensors(out, tmp_path / "back" / "checkpoints")
    (out / name).write_bytes(b"\x80\x04\x95cos\nsystem\n.")
    with pytest.raises(CheckpointError, match="is no converted checkpoint"):
        conversion.from_safetensors(out, tmp_path / "back" / "checkpoints")
    assert not (tmp_path / "back").exists()


def test_a_damaged_checkpoint_is_not_converted(tmp_path):
    save_steps(tmp_path / "checkpoints", [1])
    payload = max((tmp_path / "checkpoints").rglob("d/*"), key=lambda p: p.stat().st_size)
    flip_byte(payload, payload.stat().st_size // 2)
    code, _, err = run("convert", tmp_path, f"--to={tmp_path / 'out'}")
    assert code == 4
    assert "Checkpoint 1" in err
    assert "is not converted" in err
    assert not (tmp_path / "out").exists()


def of_a_later_format(record: dict, arrays: dict) -> str:
    rest = {name: value for name, value in record.items() if name != "sha256"}
    record.update(sign({**rest, "format": 2}))
    return "is damaged or of another format"


def with_an_array_more(record: dict, arrays: dict) -> str:
    arrays["params.more"] = np.zeros(2, np.float32)
    return r"differ in \['params.more'\]"


def with_bits_of_another_type(record: dict, arrays: dict) -> str:
    arrays["params.experts.up"] = arrays["params.experts.up"].view(np.int32)
    return "params/experts/up is not the array that was converted"


@pytest.mark.parametrize(
    "change", [of_a_later_format, with_an_array_more, with_bits_of_another_type]
)
def test_a_folder_that_is_not_what_was_converted_is_refused(full, tmp_path, change):
    conversion.to_safetensors(full[0] / "checkpoints", 5, tmp_path / "out")
    path = tmp_path / "out" / "record.json"
    record, arrays = json.loads(path.read_text()), load_file(path.with_name("model.safetensors"))
    told = change(record, arrays)
    path.write_text(json.dumps(record))
    save_file(arrays, path.with_name("model.safetensors"))
    with pytest.raises(CheckpointError, match=told):
        conversion.from_safetensors(tmp_path / "out", tmp_path / "back" / "checkpoints")
