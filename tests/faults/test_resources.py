"""Rows 6, 7, 17, 19, 22 and 27: disks that are full or read-only, memory, the clock, a second run.

Disks are real: a tmpfs for root, else a limit on the size of files or the bits of a folder.
"""

from collections.abc import Generator
import contextlib
import importlib
import json
import os
from pathlib import Path
import resource
import signal
import socket
import subprocess
import sys
import time

import pytest

from moe.training import manifest
from tests import entry
from tests.faults.harness import STEPS, Child, Reference, bits, digest, steps_saved
from tests.test_bad_input import _listen, fails  # noqa: F401  # the fixture is used by name

SLOW_STEPS = "slow_step@1-99:0.2"  # time to do something to a run while it runs
MIB = 2**20


def may_mount() -> bool:
    """Whether this process may mount: root is not enough in every container."""
    if os.geteuid() != 0:
        return False
    probe = subprocess.run(["unshare", "--mount", "true"], capture_output=True)
    return probe.returncode == 0


needs_mount = pytest.mark.skipif(not may_mount(), reason="needs the right to mount a disk")


@contextlib.contextmanager
def disk(folder: Path, size: int = 64 * MIB) -> Generator[Path]:
    """A disk of its own under `folder`; Linux keeps it in memory."""
    folder.mkdir(exist_ok=True)
    options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    subprocess.run(["mount", *options], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Takes what is free on the disk of a folder, to the last block; returns the file to remove."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(MIB // 4))
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(512))
    return filler


def limit_files(child: Child, size: int) -> None:
    """No file of the child may grow beyond `size` bytes from now on."""
    _, hard = resource.prlimit(child.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (size, hard))


def whole(workdir: Path) -> list[int]:
    """Steps whose files are those that were written, byte for byte."""
    folders = {step: workdir / "checkpoints" / str(step) for step in steps_saved(workdir)}
    return [s for s, path in folders.items() if manifest.difference(path, thorough=True) is None]


def same_as(reference: Reference, workdir: Path) -> None:
    assert bits(workdir) == reference.bits
    assert digest(workdir, STEPS) == reference.digest


def in_this_process(reference: Reference, workdir: Path) -> list[str]:
    """Flags of R for `entry.run`, where the devices are there already."""
    return [*[f for f in reference.flags if "cpu_devices" not in f], f"--workdir={workdir}"]


@pytest.mark.parametrize(
    "how", [pytest.param("disk", marks=needs_mount), pytest.param("limit", marks=pytest.mark.slow)]
)
def test_row_06_disk_full_in_a_save(how, reference, tmp_path):
    """Exit 6 before the next save is due, older steps whole; with room again the run is R."""
    workdir = tmp_path / "run"
    with contextlib.ExitStack() as stack:
        if how == "disk":
            stack.enter_context(disk(workdir))
        slow = ["slow_step@11-19:1", "slow_step@20-99:0.2"]
        with reference.train(workdir, faults=slow) as child:
            child.wait_for("step 11/")
            end = time.monotonic() + 60
            while whole(workdir) != [10]:
                assert time.monotonic() < end
                time.sleep(0.1)
            if how == "disk":
                filler = fill(workdir)
            else:
                limit_files(child, 1024)
            child.wait_for("SAVING 20")
            asked = time.monotonic()
            ended = child.finish()
        assert ended.code == 6, ended.text
        assert time.monotonic() - asked < 30
        assert "SAVING 30" not in ended.text
        assert "ResourceError: " in ended.text
        message = ended.text.partition("ResourceError: ")[2].splitlines()[0]
        assert str(workdir / "checkpoints") in message
        assert ("No space left on device" if how == "disk" else "File too large") in message
        assert ended.text.count("Metrics cannot be written") == 1
        assert whole(workdir) == [10]
        if how == "disk":
            filler.unlink()
        with reference.train(workdir) as child:
            again = child.finish()
        assert again.code == 0, again.text
        assert not (workdir / "quarantine").exists()
        same_as(reference, workdir)
        assert steps_saved(workdir) == steps_saved(reference.workdir)


@contextlib.contextmanager
def read_only(folder: Path) -> Generator[None]:
    """Nobody can write in a folder: bits for most, another mount for root."""
    if os.geteuid() != 0:
        folder.chmod(0o555)
        yield
        folder.chmod(0o755)
        return
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(os.geteuid() == 0 and not may_mount(), reason="root passes permission bits")
@pytest.mark.parametrize("kind", ["new", "old"])
def test_row_07_read_only_workdir(kind, reference, tmp_path):
    """Exit 2 in seconds, before any compile, with the path."""
    workdir = tmp_path / "disk" / "run"
    workdir.parent.mkdir()
    if kind == "old":
        reference.until(20, workdir)
    before = sorted(tmp_path.rglob("*"))
    importlib.import_module(
        "train"
    )  # which takes seconds, and is done before anything is looked at
    started = time.monotonic()
    with read_only(workdir if kind == "old" else workdir.parent):
        words = [f"--workdir={workdir}", "cannot be written"]
        fails(2, words, "train", *in_this_process(reference, workdir))
    assert time.monotonic() - started < 10
    assert sorted(tmp_path.rglob("*")) == before


def test_row_17_two_runs_in_one_workdir(reference, tmp_path):
    """The second is told of the first, which notices nothing; a killed first one lets go."""
    workdir = tmp_path / "run"
    with reference.train(workdir, faults=[SLOW_STEPS]) as first:
        first.wait_for("step 3/")
        started = time.monotonic()
        words = [f"--workdir={workdir}", "in use", f"pid {first.pid} on {socket.gethostname()}"]
        fails(2, words, "train", *in_this_process(reference, workdir))
        assert time.monotonic() - started < 5
        first.wait_for("step 12/")
        first.signal(signal.SIGKILL)
        assert first.finish().code == -signal.SIGKILL
    with reference.train(workdir) as second:
        ended = second.finish()
    assert ended.code == 0, ended.text
    same_as(reference, workdir)


@pytest.mark.slow
def test_row_19_clock_jumps(reference, tmp_path):
    """An hour back, then an hour ahead: same numbers, same steps kept, same files."""
    workdir = tmp_path / "run"
    jumps = ["clock@5-15:-3600", "clock@16-99:3600"]
    with reference.train(workdir, faults=jumps) as child:
        ended = child.finish()
    assert ended.code == 0, ended.text
    same_as(reference, workdir)
    assert steps_saved(workdir) == steps_saved(reference.workdir)
    for folder in ("eval", "choices", "tensorboard/train", "tensorboard/valid"):
        names = [
            sorted(p.name for p in (w / folder).iterdir()) for w in (workdir, reference.workdir)
        ]
        assert names[0] == names[1]
        assert names[0]


@pytest.fixture(scope="module")
def long_text(tmp_path_factory) -> list[str]:
    """Rows of 8,192 positions need more text than R has."""
    folder = tmp_path_factory.mktemp("long")
    for i in range(40):
        (folder / f"code{i}.txt").write_text(f"{i}\n" + "def f(x): return x + 1\n" * 500)
        (folder / f"prose{i}.txt").write_text(f"{i}\n" + "A line of words, and so on.\n" * 500)
    return [*entry.data_flags(folder), "--config.data.sequence_length=8192"]


@pytest.mark.slow
def test_row_22_out_of_memory_on_the_device(reference, long_text, tmp_path):
    """64 heads x 8,192^2 scores a row: XLA is refused; what a row needs and what to change is said."""
    workdir = tmp_path / "run"
    large = ["--config.model.heads=64", "--config.model.head_dim=2", "--config.data.batch_size=16"]
    with reference.train(workdir, *long_text, *large) as child:
        _, hard = resource.prlimit(child.pid, resource.RLIMIT_AS)
        resource.prlimit(child.pid, resource.RLIMIT_AS, (16 * 2**30, hard))
        ended = child.finish()
    assert ended.code == 6, ended.text
    message = ended.text.partition("ResourceError: ")[2].splitlines()[0]
    for word in (
        *(
            "Out of memory on the device: RESOURCE_EXHAUSTED",
            "each of 8 devices holds",
            "parameters",
        ),
        *("moments", "gradients", "by estimate", "model.remat=full", "data.batch_size"),
        *("attention.query_block=512", "mesh.fsdp", "optimizer.moment_dtype=bfloat16"),
    ):
        assert word in message
    assert ended.text.count("compiled in") == 1, "tried once"
    assert "Traceback" not in ended.text


@pytest.mark.slow
def test_row_22_out_of_memory_on_the_host(reference, tmp_path):
    """Checkpoints stay, and the same command ends as R."""
    workdir = tmp_path / "run"
    with reference.train(workdir, faults=["no_memory@17"]) as child:
        ended = child.finish()
    assert ended.code == 6, ended.text
    assert "ResourceError: Out of memory on the host: no memory on purpose" in ended.text
    assert "by estimate" in ended.text
    assert whole(workdir) == [10]
    with reference.train(workdir) as child:
        again = child.finish()
    assert again.code == 0, again.text
    same_as(reference, workdir)


def warnings(text: str, words: str) -> int:
    return sum(words in line for line in text.splitlines())


@pytest.mark.slow
@needs_mount
def test_row_27_only_logs_on_a_full_disk(reference, tmp_path):
    """The state is R's at every save; each kind of output is said once; readers find no torn JSON."""
    workdir, checkpoints = tmp_path / "run", tmp_path / "checkpoints"
    checkpoints.mkdir()
    with disk(workdir):
        (workdir / "checkpoints").symlink_to(checkpoints)
        with reference.train(workdir, faults=[SLOW_STEPS]) as child:
            child.wait_for("step 12/")
            fill(workdir)
            ended = child.finish()
        assert ended.code == 0, ended.text
        assert steps_saved(workdir) == whole(workdir) == steps_saved(reference.workdir)
        for step in steps_saved(workdir):
            assert digest(workdir, step) == digest(reference.workdir, step)
        assert warnings(ended.text, "Metrics cannot be written") == 1
        assert warnings(ended.text, "The record of an evaluation could not be written") == 1
        assert warnings(ended.text, "Kept choices could not be written") == 1
        assert warnings(ended.text, "The report could not be written") == 1
        written = [
            json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()
        ]
        assert written
        for path in (workdir / "eval").iterdir():
            assert json.loads(path.read_text())
        assert list(workdir.rglob("*.tmp")) == []


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_row_27_the_log_itself_on_a_full_disk(stream, reference, tmp_path):
    """Lines find no room; the run ends with the code and the state of R."""
    workdir = tmp_path / "run"
    command = ["train.py", *reference.flags, f"--workdir={workdir}"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=Path(__file__).parents[2],
            env={**os.environ, **reference.variables},
            stdin=subprocess.DEVNULL,
            timeout=240,
            **{"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, stream: full},
        )
    assert done.returncode == 0
    same_as(reference, workdir)


@pytest.mark.slow
@needs_mount
def test_row_27_evaluation_on_a_full_disk(reference, tmp_path):
    """The tables are printed; a record that did not fit is an error, and none is half there."""
    workdir = reference.until(20, tmp_path / "run")
    flags = [f"--workdir={workdir}", "--nogeneralisation", "--config.evaluation.batches=1"]
    with disk(workdir / "eval", 4096):
        fill(workdir / "eval")
        ended = entry.run("eval", *flags)
        left = sorted(path.name for path in (workdir / "eval").rglob("*") if path.is_file())
    assert ended.code == 6, ended.err
    assert "perplexity" in ended.out
    assert f"{workdir / 'eval' / 'overrides'}" in ended.err
    assert "No space left on device" in ended.err
    assert "written to" not in ended.out
    assert left == ["filler"]


@needs_mount
def test_row_06_too_little_room_is_refused_at_the_start(reference, tmp_path):
    """A state that cannot fit twice ends a run before the first step, with bytes and advice."""
    workdir = tmp_path / "run"
    with disk(workdir, 128 * 1024):
        ended = entry.run("train", *in_this_process(reference, workdir))
        left = sorted(path.name for path in workdir.rglob("*") if path.is_file())
    assert ended.code == 6, ended
    assert ended.err.startswith(f"ResourceError: {workdir / 'checkpoints'} has ")
    for word in ("free", "bytes", "optimizer.moment_dtype", "--workdir"):
        assert word in ended.err
    assert left == []
