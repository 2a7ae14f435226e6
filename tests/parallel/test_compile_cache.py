"""A second start loads what the first has compiled and computes the same; a bad folder stops no run."""

import contextlib
import math
import os
from pathlib import Path
import resource
import tempfile
import warnings
import zlib

import jax
import pytest

from moe.parallel import compile_cache
from moe.sweep.worker import _shared_cache
from tests import entry, test_road

FLAGS = [
    entry.QUICKSTART,
    *entry.MODEL_FLAGS,
    "--config.model.num_layers=1",
    "--config.steps=3",
    "--config.log_every=1",
    "--config.evaluation.batches=1",
    "--config.model.dropout=0.1",
]


@contextlib.contextmanager
def counted():
    """Programs found in the cache and programs written to it."""
    counts = {"cache_hits": 0, "cache_misses": 0}

    def listen(event: str, **_) -> None:
        name = event.rsplit("/", 1)[-1]
        if name in counts:
            counts[name] += 1

    jax.monitoring.register_event_listener(listen)
    yield counts
    jax.monitoring.unregister_event_listener(listen)


@pytest.fixture
def no_cache():
    """As in a fresh process, whatever the machine's environment says."""
    before = {name: jax.config.values[name] for name in (DIRECTORY, THRESHOLD)}
    compile_cache._update({DIRECTORY: None, THRESHOLD: 1.0})
    yield
    compile_cache._update(before)


DIRECTORY, THRESHOLD = compile_cache._DIRECTORY, compile_cache._THRESHOLD


def test_second_start_compiles_nothing_and_computes_the_same(tmp_path, no_cache):
    entry.tiny_text(tmp_path)
    flags = [*FLAGS, *entry.data_flags(tmp_path)]

    def start(name: str, *more: str) -> dict[str, int]:
        jax.clear_caches()
        with counted() as counts:
            ended = entry.run("train", *flags, f"--workdir={tmp_path / name}", *more)
        assert ended.code == 0, ended.err
        return counts

    first = start("first")
    shared = tmp_path / "first" / compile_cache.FOLDER
    assert steps_in(shared) == ["jit_step", "jit_train_step"]
    assert first["cache_misses"] == len(list(shared.rglob("*-cache")))
    assert jax.config.values[DIRECTORY] is None  # of the run, not of the process

    second = start("second", f"--compile_cache={shared}")
    assert second["cache_hits"] >= first["cache_misses"]
    assert steps_in(shared) == ["jit_step", "jit_train_step"]  # neither has been compiled again
    assert not (tmp_path / "second" / compile_cache.FOLDER).exists()
    assert test_road.records(tmp_path / "second") == test_road.records(tmp_path / "first")

    with counted() as third:
        arguments = [f"--workdir={tmp_path / 'second'}", "--compile_cache=none"]
        assert entry.run("eval", *arguments).code == 0
    assert third == {"cache_hits": 0, "cache_misses": 0}
    assert not (tmp_path / "second" / compile_cache.FOLDER).exists()


def steps_in(folder: Path) -> list[str]:
    """The steps among the entries: small programs may take long enough for a file one day or another."""
    names = sorted(path.name.split("-")[0] for path in folder.rglob("*-cache"))
    return [name for name in names if name.endswith("step")]


def settings(workdir: Path, choice: str | None = None, *, primary: bool = True) -> tuple:
    with compile_cache.persistent(workdir, choice, primary=primary):
        return jax.config.values[DIRECTORY], jax.config.values[THRESHOLD]


def test_who_names_the_folder(tmp_path, no_cache):
    mine = compile_cache.machine()
    default = str(tmp_path / compile_cache.FOLDER / mine)
    assert settings(tmp_path) == (default, compile_cache.MIN_SECONDS)
    compile_cache._update({DIRECTORY: str(tmp_path / "told")})  # as the environment variable does
    assert settings(tmp_path) == (str(tmp_path / "told"), 1.0)
    assert settings(tmp_path, str(tmp_path / "flag"))[0] == str(tmp_path / "flag" / mine)
    assert settings(tmp_path, "none")[0] is None
    assert settings(tmp_path, "gs://bucket/cache")[0] == f"gs://bucket/cache/{mine}"


def test_a_folder_is_of_one_kind_of_processor(monkeypatch):
    """Whose instructions are told by lines that all cores have, among others that change."""

    read = Path.read_text

    def machine(*lines: str) -> str:
        def found(path: Path, *how, **more) -> str:
            told = str(path) == "/proc/cpuinfo"
            return "\n".join(lines) if told else read(path, *how, **more)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_text", found)
            return compile_cache.machine()

    one = machine("cpu MHz : 2100", "flags : sse avx", "flags : sse avx")
    assert one == machine("cpu MHz : 1800", "flags : sse avx")
    assert one != machine("cpu MHz : 2100", "flags : sse avx avx512f")
    assert one != machine("Features : sse avx")


def test_other_processes_read_and_make_nothing(tmp_path, no_cache):
    absent = tmp_path / "refused"
    assert settings(absent, primary=False)[0] is None
    assert not absent.exists()
    there, _ = settings(tmp_path)
    with compile_cache.persistent(tmp_path):
        jax.jit(lambda x: x * 3.5)(1.0)  # jax makes the folder, and has nothing for it
    assert list(tmp_path.iterdir()) == []
    Path(there).mkdir(parents=True)
    assert settings(tmp_path, primary=False)[0] == there


def test_a_folder_that_cannot_be_written_is_a_note(tmp_path, no_cache, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    assert settings(tmp_path, str(tmp_path / "file"))[0] is None
    told = capsys.readouterr().err
    assert told.startswith("note: the compile cache")
    assert "compiles everything anew" in told

    def full(**_):
        raise OSError(28, os.strerror(28))

    Path(settings(tmp_path)[0]).mkdir(parents=True)
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    folder, threshold = settings(tmp_path)
    assert folder is not None
    assert threshold == math.inf  # it still reads, and never writes
    assert "No space left on device): programs are loaded from it" in capsys.readouterr().err


def test_entries_cut_short_are_dropped(tmp_path, no_cache):
    folder, _ = settings(tmp_path)
    Path(folder).mkdir(parents=True)
    whole = zlib.compress(bytes(range(256)) * 40)
    (Path(folder) / "whole-cache").write_bytes(whole)
    (Path(folder) / "torn-cache").write_bytes(whole[:-9])
    (Path(folder) / "empty-cache").write_bytes(b"")
    (Path(folder) / "zstd-cache").write_bytes(b"\x28\xb5\x2f\xfd")
    settings(tmp_path)
    assert {path.name for path in Path(folder).iterdir()} == {"whole-cache", "zstd-cache"}


def test_sweeps_share_one(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    assert _shared_cache(tmp_path) == [f"--compile_cache={tmp_path / 'compile_cache'}"]
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    assert _shared_cache(tmp_path) == []


def test_a_disk_that_fills_up_is_said_once_and_leaves_no_torn_program(tmp_path, no_cache, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # as outside of tests
        with compile_cache.persistent(tmp_path, str(tmp_path / "cache")):
            jax.config.update(THRESHOLD, 0.0)
            resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))
            try:
                for number in (2.5, 3.5, 4.5):
                    assert jax.jit(lambda x, n=number: x * n)(2.0) == 2.0 * number
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert list((tmp_path / "cache").rglob("*-cache")) != []
    said = [line for line in capsys.readouterr().err.splitlines() if "compile cache" in line]
    assert len(said) == 1
    assert "File too large" in said[0]
    assert list((tmp_path / "cache").rglob("*-cache")) == []
