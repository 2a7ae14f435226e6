"""Room on a disk before a run, and words for the errors of one that ran out of it or of memory."""

import ast
import contextlib
import errno
import os
from pathlib import Path
import resource
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import programs, setup
from moe.cli import load_config
from moe.errors import ConfigError, DataError, ResourceError
from moe.parallel.mesh import make_mesh
from moe.training import memory, resources
from moe.training.state import abstract_state
from tests import tiny

MIB = 2**20


@pytest.fixture(scope="module")
def run() -> setup.Run:
    """A run on 8 devices that exists on paper; nothing is compiled."""
    pairs = [
        *(("model.num_layers", "2"), ("model.width", "16"), ("model.heads", "2")),
        *(("model.kv_heads", "2"), ("model.head_dim", "8"), ("model.mlp_width", "32")),
        *(("model.expert_width", "32"), ("model.num_experts", "8"), ("router.k", "2")),
        *(("data.sequence_length", "64"), ("mesh.expert", "4"), ("router.name", "deepseek_v3")),
    ]
    config = load_config("configs/quickstart.py", pairs)
    return setup.assemble(config, setup.mesh_of(config), vocab_size=257)


def with_config(run: setup.Run, **changes: object) -> setup.Run:
    config = run.config.copy_and_resolve_references()
    with config.unlocked():
        config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    spec = run.spec._replace(remat=config.model.remat)
    return run._replace(config=config, spec=spec)


def test_the_bytes_of_a_state_are_those_of_its_arrays(run):
    shapes = abstract_state(run.spec, run.transformation, run.shardings)
    arrays = tiny.numbers(run.skeleton)
    of_parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays[0]))
    assert resources.state_bytes(shapes.params) == of_parameters
    assert resources.state_bytes(shapes.optimizer) >= 2 * of_parameters
    assert resources.state_bytes(jnp.zeros((3, 5), jnp.bfloat16)) == 30
    assert resources.state_bytes({"key": jax.random.key(0)}) == 8


def test_an_estimate_counts_shards_and_follows_the_config(run):
    found = resources.estimate(run)
    whole = resources.state_bytes(abstract_state(run.spec, run.transformation, run.shardings))
    experts = [p for p in jax.tree.leaves(run.skeleton.params) if 8 in p.shape[:2]]
    assert experts
    assert found.devices == 8
    of_parameters = resources.state_bytes(run.skeleton.params)
    assert of_parameters / 4 < found.parameters < 0.7 * of_parameters, "experts are cut in four"
    assert whole / 8 < found.state < 0.8 * whole
    assert found.gradients == found.parameters
    assert found.router > 0
    assert found.total == found.state + found.gradients + found.activations
    twice = with_config(run, data__batch_size=2 * run.config.data.batch_size)
    assert resources.estimate(twice).activations == pytest.approx(2 * found.activations, abs=2)
    dots = resources.estimate(with_config(run, model__remat="dots")).activations
    assert resources.estimate(with_config(run, model__remat="full")).activations < dots
    assert dots < found.activations
    parts = with_config(run, optimizer__accumulation=2)
    assert resources.estimate(parts).activations == pytest.approx(found.activations / 2, abs=2)
    assert resources.estimate(parts).gradients == 2 * found.parameters
    frugal = with_config(run, model__remat="full")
    assert resources.estimate(frugal).activations < found.activations
    assert "activations (2 rows of 64 positions at once, model.remat=none)" in str(found)


def test_activations_are_the_widths_of_what_layers_keep(run):
    """Of two rows of 64 positions: 4 shards of experts make room for 4 times the 2 choices."""
    spec = run.spec._replace(num_layers=3, first_dense=1, shared_experts=1)
    attention = 4 * 16 + (2 * 2 + 2 * 2) * 8 + 2 * 2 * 64
    dense = attention + 3 * 16 + 3 * 32
    sparse = attention + 3 * 16 + 2 * 4 * (2 * 16 + 3 * 32) + 3 * 32 + 4 * 8
    kept = 2 * 64 * (dense + 2 * sparse + 2 * sparse)  # the widest twice more
    logits = 2 * 64 * 3 * 257 * 4
    for changes, expected in (
        ({}, kept * 4 + logits),
        ({"dtype": "bfloat16"}, kept * 2 + logits),
        ({"output": "vector"}, kept * 4),
    ):
        assert memory.activation_bytes(run._replace(spec=spec._replace(**changes))) == expected


ONE = {"data": 1, "devices": jax.devices()[:1]}


def test_activations_are_cut_along_positions_and_widths(run):
    rows, positions, widths, nothing = (
        memory.activation_bytes(run._replace(mesh=make_mesh(**sizes)))
        for sizes in ({"data": 8}, {"data": 1, "sequence": 8}, {"data": 1, "tensor": 8}, ONE)
    )
    assert rows == positions == nothing / 8
    assert rows < widths < nothing


def test_advice_names_what_this_run_can_still_change(run):
    """And nothing that it has done already."""
    said = " ".join(resources.estimate(run).advice)
    for words in (
        "model.remat=full (now none)",
        "Each device holds 2 rows",
        "dispatch.buffer_factor",
    ):
        assert words in said
    assert "query_block" not in said, "rows of 64 have small scores"
    assert "mesh.rules=folded or hybrid (now separate)" in said
    assert "halves the moments" in said
    long = with_config(run, data__sequence_length=513)
    assert "2 x 513^2 scores" in " ".join(resources.estimate(long).advice)
    changes = {"model__remat": "full", "data__batch_size": 8, "dispatch__buffer_factor": 1.25}
    done = with_config(run, optimizer__moment_dtype="bfloat16", mesh__rules="zero1", **changes)
    assert memory.activation_fixes(done) == [
        "Use more devices, or a mesh.sequence or mesh.tensor above 1."
    ]
    assert memory.state_fix(done) == (
        "Use more devices along mesh.fsdp or mesh.expert, mesh.rules=separate, folded or hybrid (now "
        "zero1), which cuts what this one keeps whole."
    )


@pytest.mark.slow
def test_activations_are_of_the_size_that_the_compiler_plans(run):
    key = jax.eval_shape(lambda: jax.random.key(0))
    for changed in (run, with_config(run, model__remat="full")):
        state = abstract_state(changed.spec, changed.transformation, changed.shardings)
        with jax.set_mesh(changed.mesh):
            step = programs.jit_train_step(changed)
            arguments = (state, setup.abstract_batch(changed), key, programs.hyper(changed))
            stats = step.lower(*arguments).compile().memory_analysis()
        found = resources.estimate(changed)
        assert found.activations + found.gradients < 2 * stats.temp_size_in_bytes
        assert found.activations + found.gradients > stats.temp_size_in_bytes / 2


def test_a_disk_without_room_for_two_states_is_refused(tmp_path):
    status = os.statvfs(tmp_path)
    free = status.f_bfree * status.f_frsize
    resources.check_disk(tmp_path, MIB)
    assert list(tmp_path.iterdir()) == [], "only looked at"
    with pytest.raises(ResourceError) as caught:
        resources.check_disk(tmp_path, free)
    said = str(caught.value)
    assert caught.value.exit_code == 6
    for word in (str(tmp_path / "checkpoints"), str(2 * free), "free", "moment_dtype", "--workdir"):
        assert word in said


def test_the_disk_is_that_of_the_checkpoints(tmp_path, monkeypatch):
    looked = []
    true = os.statvfs
    monkeypatch.setattr(resources.os, "statvfs", lambda path: looked.append(path) or true(path))
    resources.check_disk(tmp_path / "run", 1)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    resources.check_disk(tmp_path / "run", 1)
    assert looked == [tmp_path, tmp_path / "run" / "checkpoints"]


@pytest.mark.parametrize(
    ("blocks", "free", "available", "user", "fits"),
    [
        (100, 2, 0, 0, True),  # root may fill what is kept for it
        (100, 1, 1, 0, False),
        (100, 9, 2, 1000, True),
        (100, 9, 1, 1000, False),
        (0, 0, 0, 1000, True),  # a file system that reports nothing
    ],
)
def test_what_is_free_is_what_this_user_may_fill(
    blocks, free, available, user, fits, tmp_path, monkeypatch
):
    status = types.SimpleNamespace(f_blocks=blocks, f_bfree=free, f_bavail=available, f_frsize=MIB)
    monkeypatch.setattr(resources.os, "statvfs", lambda path: status)
    monkeypatch.setattr(resources.os, "geteuid", lambda: user)
    with (
        contextlib.nullcontext() if fits else pytest.raises(ResourceError, match=r"need 2\.00 MiB")
    ):
        resources.check_disk(tmp_path, MIB)


@pytest.mark.parametrize(
    ("limit", "processes", "size", "fits"),
    [
        (MIB, 2, 2 * MIB, True),  # each writes its own part
        (MIB, 2, 2 * MIB + 1, False),
        (1 << 31, 1, 1 << 33, True),  # at which another file begins
    ],
)
def test_the_largest_file_is_of_one_process_and_bounded(
    limit, processes, size, fits, tmp_path, monkeypatch
):
    monkeypatch.setattr(resources.resource, "getrlimit", lambda which: (limit, limit))
    monkeypatch.setattr(resources.jax, "process_count", lambda: processes)
    status = types.SimpleNamespace(f_blocks=0, f_bfree=0, f_bavail=0, f_frsize=MIB)
    monkeypatch.setattr(resources.os, "statvfs", lambda path: status)
    with contextlib.nullcontext() if fits else pytest.raises(ResourceError, match="ulimit -f"):
        resources.check_disk(tmp_path, size)


def test_a_limit_on_files_is_refused_before_a_save_meets_it(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))
    try:
        resources.check_disk(tmp_path, MIB)
        with pytest.raises(ResourceError, match=r"1\.00 MiB \(1048576 bytes\).*ulimit -f"):
            resources.check_disk(tmp_path, MIB + 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


TENSORSTORE = (
    'RESOURCE_EXHAUSTED: Error writing "a1/c/0/0" in OCDBT database at local file '
    '"/disk/c/3/ocdbt.process_0/": Failed to write 42377 bytes to file 4: No space left on device '
    "[os_error_code='28']"
)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left", "/d/x"), ["/d/x", "No space", "keep_latest"]),
        (OSError(errno.EDQUOT, "quota", "/d/x"), ["/d/x", "quota exceeded", "Free some of your"]),
        (OSError(errno.EFBIG, "File too large"), ["a file of the run", "ulimit -f"]),
        (
            OSError(errno.EROFS, "Read-only file system", "/d/x"),
            ["/d/x", "Read-only", "writable again"],
        ),
        (ValueError(TENSORSTORE), ["/disk/c/3/ocdbt", "No space", "keep_best"]),
        (jax.errors.JaxRuntimeError(TENSORSTORE), ["/disk/c/3/ocdbt", "No space", "keep_best"]),
    ],
)
def test_a_disk_that_failed_is_told_from_anywhere_in_the_chain(error, words):
    for wrapped in (error, _raised(error, explicit=True), _raised(error, explicit=False)):
        told = resources.translate(wrapped)
        assert isinstance(told, ResourceError)
        assert told.exit_code == 6
        for word in (*words, "as they were", "newest checkpoint"):
            assert word in str(told)
        assert "memory" not in str(told)


def _raised(error: Exception, *, explicit: bool) -> Exception:
    outer = RuntimeError("save failed")
    try:
        try:
            raise error
        except Exception as inner:
            raise outer from (inner if explicit else None)
    except RuntimeError:
        outer.__suppress_context__ = explicit
        return outer


def out_of_device_memory() -> None:
    jax.jit(lambda: jnp.zeros(1 << 45))()


def out_of_host_memory() -> None:
    raise MemoryError


SHORT = {
    "device": (out_of_device_memory, "140737488355328 bytes"),
    "numpy": (lambda: np.zeros(1 << 48) + 1, "2.00 PiB"),
    "host": (out_of_host_memory, "MemoryError"),
}


@pytest.mark.parametrize("where", SHORT)
def test_a_memory_that_failed_is_told_with_the_estimate_and_keys(where, run):
    fail, amount = SHORT[where]
    with pytest.raises((jax.errors.JaxRuntimeError, MemoryError)) as caught:
        fail()
    told = resources.translate(caught.value, lambda: resources.estimate(run))
    assert isinstance(told, ResourceError)
    said = str(told)
    assert said.startswith(f"Out of memory on the {'device' if where == 'device' else 'host'}: ")
    for word in (
        *(amount, "parameters", "moments", "gradients", "by estimate", "model.remat=full"),
        *("optimizer.accumulation", "data.batch_size", "mesh.fsdp", "optimizer.moment_dtype"),
    ):
        assert word in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "host"),
        (jax.errors.JaxRuntimeError("INTERNAL: Out of memory while it compiles"), "device"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 1 byte"), "device"),
    ],
)
def test_other_words_for_a_memory_that_failed(error, where):
    """On the CPU, where these tests run, the host's memory is that of the devices."""
    told = str(resources.translate(_raised(error, explicit=True)))
    assert told.startswith(f"Out of memory on the {where}: ")
    assert "share the memory of the host with the data readers" in told


def test_an_estimate_that_has_no_memory_itself_is_left_out():
    def none_left() -> resources.Estimate:
        raise MemoryError

    told = resources.translate(MemoryError("once"), none_left)
    assert isinstance(told, ResourceError)
    assert str(told).startswith("Out of memory on the host: once. ")


def test_what_was_told_already_is_not_covered_by_what_failed_on_the_way_out():
    told = ResourceError("Checkpoint 20 was not saved")
    after = OSError(errno.ENOSPC, "No space left on device")
    after.__context__ = told
    assert resources.translate(after) is told


@pytest.mark.parametrize(
    "error",
    [
        ValueError("RESOURCE"),
        RuntimeError("out of memory of mine"),
        FileNotFoundError(errno.ENOENT, "No such file", "/x"),
        ConfigError("No space left on device, and told so already"),
        RuntimeError("RESOURCE_EXHAUSTED of mine"),
        jax.errors.JaxRuntimeError("INVALID_ARGUMENT: a shape"),
        KeyError("steps"),
    ],
)
def test_other_errors_stay_what_they_are(error):
    assert resources.translate(error) is None


def test_a_loop_of_causes_ends():
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__cause__ = two, one
    assert resources.translate(one) is None


def test_what_is_spared_is_said_once_of_each_kind(caplog):
    def full(path: str) -> str:
        if path == "bad":
            raise OSError(errno.ENOSPC, "No space left on device", path)
        return path

    def nothing_to_show() -> None:
        raise DataError("no metrics.jsonl")

    spare = resources.Spare()
    assert spare("the report", full, "good") == "good"
    assert spare("the report", full, "bad") is None
    assert spare("the report", full, "bad") is None
    spare("config.json", nothing_to_show)
    told = [record.message for record in caplog.records]
    assert [text.partition(" could not")[0] for text in told] == ["The report", "Config.json"]
    assert "No space left on device" in told[0]
    assert spare("the report", full, path="good") == "good"
    with pytest.raises(KeyError):
        spare("the report", {}.__getitem__, "missing")


WALL = {"time", "time_ns", "ctime", "localtime", "gmtime", "strftime", "now", "today", "utcnow"}
CHANGES_ONLY = {
    "moe/sweep/study.py",  # a sign that others see change; they time its age by their own clock
    "moe/training/history.py",  # when a start was, for people
}


def test_nothing_decides_by_the_clock_on_the_wall():
    root = Path(__file__).parents[2]
    files = [*(root / "moe").rglob("*.py"), root / "train.py", root / "eval.py"]
    found = {
        str(path.relative_to(root))
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Attribute) and _is_wall(node))
        or (isinstance(node, ast.ImportFrom) and node.module in ("time", "datetime"))
    }
    assert found <= CHANGES_ONLY


def _is_wall(node: ast.Attribute) -> bool:
    """`time.time`, `datetime.now`, `datetime.datetime.now` and their like."""
    owner = node.value.attr if isinstance(node.value, ast.Attribute) else node.value
    name = owner.id if isinstance(owner, ast.Name) else owner
    return name in ("time", "datetime", "date") and node.attr in WALL
