"""Checkpoints on real files: any mesh, any fault that can be made here."""

import contextlib
import errno
import json
from pathlib import Path
import resource
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from moe.errors import CheckpointError, ConfigError, DivergedError, ResourceError
from moe.training import step_folder
from moe.training.checkpoint import Checkpointer
from moe.training.digest import digest, summaries
from tests.training.tiny_checkpoints import (
    DATA,
    META,
    abstract,
    assert_same_bits,
    flip_byte,
    make_state,
    sharding,
    target_shardings,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    with Checkpointer(directory) as checkpoints:
        assert checkpoints.latest_step() is None
        assert checkpoints.best_step() is None
        assert checkpoints.save(3, make_state(), DATA, META)
    return directory


@pytest.mark.parametrize("devices", [8, 4, 1])
def test_restores_bit_for_bit_on_any_device_count(saved, devices):
    state = make_state()
    with Checkpointer(saved, read_only=True) as checkpoints:
        restored = checkpoints.restore("latest", abstract(state, devices))
    assert restored.step == 3
    assert restored.data_state == DATA
    assert restored.meta == META
    assert_same_bits(state, restored.state)
    up = restored.state["params"]["experts"]["up"]
    assert up.sharding == sharding(devices, "fsdp")


def test_partial_restore_leaves_out_what_is_not_asked_for(saved):
    state = make_state()
    wanted = {name: state[name] for name in ("params", "router_state")}
    with Checkpointer(saved, read_only=True) as checkpoints:
        restored = checkpoints.restore(3, abstract(wanted), partial=True)
        assert checkpoints.load_meta("latest") == META
        with pytest.raises(CheckpointError, match=r"key is key<fry>.* and absent here"):
            checkpoints.restore(3, abstract(wanted))
    assert_same_bits(wanted, restored.state)


def wrong_shape(state):
    state["params"]["experts"]["up"] = jnp.zeros((16, 48))


def wrong_dtype(state):
    state["step"] = jnp.float32(3)


def raw_key(state):
    state["key"] = jax.random.key_data(state["key"])


def extra_leaf(state):
    state["params"]["experts"]["down"] = jnp.zeros(2)


def missing_leaf(state):
    del state["router_state"]["bias"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wrong_shape, r"params/experts/up is float32\[16, 24\] .* and float32\[16, 48\] here"),
        (wrong_dtype, r"step is int32\[\] .* and float32\[\] here"),
        (raw_key, r"key is key<fry>\[\] .* and uint32\[2\] here"),
        (extra_leaf, r"params/experts/down is absent in the checkpoint and float32\[2\] here"),
        (missing_leaf, r"router_state/bias is float32\[8\] in the checkpoint and absent here"),
    ],
)
def test_another_model_is_refused_by_leaf(saved, change, message):
    state = make_state()
    change(state)
    with (
        Checkpointer(saved, read_only=True) as checkpoints,
        pytest.raises(CheckpointError, match=message) as caught,
    ):
        checkpoints.restore("latest", abstract(state))
    assert caught.value.exit_code == 4


def test_unknown_steps_are_refused_with_the_existing_ones(saved, tmp_path):
    state = make_state()
    with Checkpointer(saved, read_only=True) as checkpoints:
        with pytest.raises(CheckpointError, match=r"no checkpoint 5 .* it has steps \[3\]"):
            checkpoints.restore(5, abstract(state))
        with pytest.raises(CheckpointError, match=r"no checkpoint best with the metric bits_per"):
            checkpoints.resolve("best")
    with (
        Checkpointer(tmp_path / "new") as checkpoints,
        pytest.raises(CheckpointError, match=r"it is empty"),
    ):
        checkpoints.restore("latest", abstract(state))
    with pytest.raises(CheckpointError, match=r"does not exist"):
        Checkpointer(tmp_path / "nothing", read_only=True)
    assert not (tmp_path / "nothing").exists()


def test_keep_rules_and_best_survive_reopening(tmp_path):
    state = make_state()
    bits = {1: 2.0, 2: None, 3: 1.0, 4: 3.0, 5: float("nan"), 6: None, 7: 2.5}
    options: dict[str, Any] = {"keep_latest": 2, "keep_best": 2}
    with Checkpointer(tmp_path, **options) as checkpoints:
        for step, value in bits.items():
            metrics = (
                None
                if value is None
                else {"bits_per_byte": value, "accuracy": step / 10, "routing/load": [[1.0]]}
            )
            checkpoints.save(step, state, DATA, META, metrics)
            if step == 4:
                assert checkpoints.all_steps() == [1, 3, 4]
        assert checkpoints.all_steps() == [1, 3, 6, 7]
    (tmp_path / "notes").mkdir()
    with Checkpointer(tmp_path, **options) as checkpoints:
        assert checkpoints.best_step() == 3
        assert checkpoints.restore("best", abstract(state)).step == 3
        checkpoints.save(8, state, DATA, META, {"bits_per_byte": 1.0})
        assert checkpoints.all_steps() == [3, 7, 8]
        assert checkpoints.best_step() == 8  # the newer of two equals
        assert not checkpoints.save(8, state, DATA, META)
    with Checkpointer(tmp_path, best_metric="accuracy", best_mode="max") as checkpoints:
        assert checkpoints.best_step() == 7
    assert (tmp_path / "notes").is_dir()


def test_state_may_be_donated_while_it_is_written(tmp_path):
    state = {"w": jnp.arange(2**20, dtype=jnp.float32)}
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x * 3 + 1, tree), donate_argnums=0)
    expected = np.asarray(state["w"]).copy()
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, state, {}, {})
        for _ in range(20):
            state = advance(state)
    target = {"w": jax.ShapeDtypeStruct((2**20,), jnp.float32, sharding=sharding(1))}
    with Checkpointer(tmp_path) as checkpoints:
        restored = checkpoints.restore("latest", target)
    np.testing.assert_array_equal(restored.state["w"], expected)


@contextlib.contextmanager
def full_disk():
    """No file may grow past 64 KB: a write in the background fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def poll_until_it_raises(checkpoints: Checkpointer) -> None:
    for _ in range(200):
        checkpoints.poll()
        time.sleep(0.05)


def test_a_failed_save_is_reported_and_the_next_one_works(tmp_path):
    state = {"w": jax.random.normal(jax.random.key(0), (2**18,))}  # 1 MB that does not compress
    target = {"w": jax.ShapeDtypeStruct((2**18,), jnp.float32, sharding=sharding(1))}
    with Checkpointer(tmp_path, keep_latest=1) as checkpoints:
        checkpoints.save(1, state, DATA, META)
        checkpoints.wait()
        with full_disk():
            checkpoints.save(2, state, DATA, META)
            with pytest.raises(ResourceError, match=r"Checkpoint 2 was not saved.*steps .1. are"):
                poll_until_it_raises(checkpoints)
        assert checkpoints.all_steps() == [1]
        assert_same_bits(state, checkpoints.restore("latest", target).state)
        checkpoints.save(3, state, DATA, META)
        assert checkpoints.all_steps() == [3]
        with full_disk():
            checkpoints.save(4, state, DATA, META)
            with pytest.raises(ResourceError, match=r"Checkpoint 4 was not saved"):
                checkpoints.close()


def test_a_failed_save_leaves_no_writer_behind(tmp_path, monkeypatch):
    """Orbax raises its first error while other writers go on, and as late as in the next save."""
    state = {"w": jax.random.normal(jax.random.key(0), (2**10,))}
    leftover = tmp_path / "1.orbax-checkpoint-tmp"

    def write_on() -> None:
        for i in range(20):
            leftover.mkdir(exist_ok=True)
            (leftover / str(i)).touch()
            time.sleep(0.02)

    def fail(manager: ocp.CheckpointManager, *args: object, **kwargs: object) -> None:
        threading.Thread(target=write_on, name="async_save").start()
        raise OSError(errno.ENOSPC, "No space left on device")

    with Checkpointer(tmp_path) as checkpoints:
        with monkeypatch.context() as patched:
            patched.setattr(ocp.CheckpointManager, "save", fail)
            with pytest.raises(ResourceError, match="Checkpoint 1 was not saved"):
                checkpoints.save(1, state, DATA, META)
        assert not leftover.exists()
        assert not [t for t in threading.enumerate() if t.name == "async_save"]
        assert checkpoints.save(1, state, DATA, META)
        assert checkpoints.all_steps() == [1]


def test_what_a_failed_save_left_is_a_note_to_its_cause(tmp_path, monkeypatch):
    def cannot(directory: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(directory))

    with Checkpointer(tmp_path) as checkpoints, full_disk():
        checkpoints.save(1, {"w": jax.random.normal(jax.random.key(0), (2**18,))}, DATA, META)
        monkeypatch.setattr(step_folder, "clean", cannot)
        with pytest.raises(ResourceError, match="Checkpoint 1 was not saved") as caught:
            checkpoints.wait()
    assert "cannot be removed" in caught.value.__notes__[0]


def save_and_fail(directory: Path) -> None:
    state = {"w": jax.random.normal(jax.random.key(0), (2**18,))}
    with Checkpointer(directory) as checkpoints:
        checkpoints.save(1, state, DATA, META)
        raise ValueError("the cause")


def test_the_error_that_ended_the_run_is_shown_before_that_of_its_last_save(tmp_path):
    with full_disk(), pytest.raises(ValueError, match="the cause") as caught:
        save_and_fail(tmp_path)
    assert "Checkpoint 1 was not saved" in caught.value.__notes__[0]


def test_a_leaf_that_is_no_jax_array_is_refused_by_name(tmp_path):
    with Checkpointer(tmp_path) as checkpoints:
        with pytest.raises(TypeError, match=r"params/w is a ndarray, not a jax.Array"):
            checkpoints.save(1, {"params": {"w": np.zeros(2)}}, DATA, META)
        assert checkpoints.latest_step() is None


def test_flipped_bits_never_load(tmp_path):
    state = {"params": {"w": jax.random.normal(jax.random.key(0), (2**16,))}}
    target = {"params": {"w": jax.ShapeDtypeStruct((2**16,), jnp.float32, sharding=sharding(1))}}
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(5, state, DATA, META)
    payload = max(tmp_path.rglob("d/*"), key=lambda path: path.stat().st_size)
    intact = payload.read_bytes()
    size = len(intact)
    with Checkpointer(tmp_path, read_only=True) as checkpoints:
        for index in range(size // 16, size, size // 8):
            flip_byte(payload, index)
            with pytest.raises(CheckpointError, match=r"Checkpoint 5 .* digest of params/w is not"):
                checkpoints.restore(5, target)
            payload.write_bytes(intact)
        payload.write_bytes(intact[: size // 2])
        with pytest.raises(CheckpointError, match=r"Checkpoint 5 .* is damaged"):
            checkpoints.restore(5, target)
        payload.write_bytes(intact)
        assert_same_bits(state, checkpoints.restore(5, target).state)


@pytest.mark.parametrize("name", ["data/metadata", "meta/metadata"])
def test_changed_json_never_loads(saved, tmp_path, name):
    copy = tmp_path / "c"
    shutil.copytree(saved, copy)
    path = copy / "3" / name
    value = json.loads(path.read_text())
    value["next_index"] = 8
    path.write_text(json.dumps(value))
    with (
        Checkpointer(copy, read_only=True) as checkpoints,
        pytest.raises(CheckpointError, match=r"Checkpoint 3 .* damaged: the contents of"),
    ):
        checkpoints.restore(3, abstract(make_state()))


def test_a_step_without_its_record_is_not_a_checkpoint(saved, tmp_path):
    copy = tmp_path / "c"
    shutil.copytree(saved, copy)
    (copy / "9").mkdir()
    with Checkpointer(copy) as checkpoints:
        assert checkpoints.latest_step() == 3
    (copy / "3" / "_CHECKPOINT_METADATA").write_text("{}")
    with (
        Checkpointer(copy) as checkpoints,
        pytest.raises(CheckpointError, match=r"None of the checkpoints \[3, 9\]"),
    ):
        checkpoints.latest_step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "checkpoint.every=0 must be at least 1"),
        ({"keep_latest": 0}, "checkpoint.keep_latest=0 must be at least 1"),
        ({"best_mode": "least"}, "best_mode='least' must be"),
    ],
)
def test_impossible_options_are_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        Checkpointer(tmp_path, **options)


def test_due_follows_every(tmp_path):
    with Checkpointer(tmp_path, every=3) as checkpoints:
        assert [step for step in range(8) if checkpoints.due(step)] == [3, 6]


def test_digest_ignores_sharding_and_sees_every_bit():
    state = make_state(8)
    assert digest(state) == digest(make_state(1))
    draws = np.random.default_rng(0)
    host = np.asarray(state["params"]["experts"]["up"])
    before = digest({"x": jnp.asarray(host)})
    for _ in range(50):
        changed = host.copy().view(np.uint32)
        changed[draws.integers(16), draws.integers(24)] ^= np.uint32(1 << draws.integers(32))
        assert digest({"x": jnp.asarray(changed.view(np.float32))}) != before
    assert digest({"x": jnp.asarray(host[::-1])}) != before  # the order of rows counts too


def test_values_that_are_not_finite_are_counted_on_any_mesh():
    state = make_state(1)
    state["params"]["experts"]["up"] = (
        state["params"]["experts"]["up"].at[3, 4].set(jnp.nan).at[15, 0].set(-jnp.inf)
    )
    state["params"]["scale"] = state["params"]["scale"].at[0].set(jnp.inf)
    spread = jax.device_put(state, target_shardings(state, 8))
    assert summaries(spread) == summaries(state)
    counts = {name: found.not_finite for name, found in summaries(spread).items()}
    wrong = {name: count for name, count in counts.items() if count}
    assert wrong == {"params/experts/up": 2, "params/scale": 1}


def test_a_state_that_is_not_finite_is_never_written(tmp_path):
    state = make_state()
    with Checkpointer(tmp_path / "c") as checkpoints:
        checkpoints.save(1, state, DATA, META)
        state["params"]["scale"] = state["params"]["scale"].at[3].set(jnp.nan)
        with pytest.raises(DivergedError, match=r"1 of the 24 values of params/scale") as caught:
            checkpoints.save(2, state, DATA, META)
        assert caught.value.exit_code == 5
        assert checkpoints.all_steps() == [1]
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["1"]


def run_child(code: str, *arguments: object, **options) -> subprocess.Popen:
    source = textwrap.dedent(code)
    command = [sys.executable, "-c", source, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)


def test_the_last_save_survives_an_uncaught_error(tmp_path):
    child = run_child(
        """
        import sys
        import jax.numpy as jnp
        from moe.training.checkpoint import Checkpointer
        with Checkpointer(sys.argv[1]) as checkpoints:
            checkpoints.save(1, {"w": jnp.arange(2**22, dtype=jnp.float32)}, {}, {})
            raise ValueError
        """,
        tmp_path,
        stderr=subprocess.DEVNULL,
    )
    with child:
        assert child.wait(timeout=60) == 1
    target = {"w": jax.ShapeDtypeStruct((2**22,), jnp.float32, sharding=sharding(1))}
    with Checkpointer(tmp_path, read_only=True) as checkpoints:
        restored = checkpoints.restore("latest", target)
    np.testing.assert_array_equal(restored.state["w"], np.arange(2**22, dtype=np.float32))
