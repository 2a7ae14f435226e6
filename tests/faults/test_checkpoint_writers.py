"""The process that writes checkpoints: killed, refused, leaving, or one of two: rows 3, 8, 24, 25."""

from pathlib import Path
import random
import shutil
import signal
import socket
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.training import inspection
from moe.training.checkpoint import Checkpointer
from tests.faults.harness import Child, steps_saved
from tests.training.tiny_checkpoints import flip_byte, sharding


def child(code: str, *arguments: object) -> Child:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return Child(command, {"JAX_PLATFORMS": "cpu"})


LOOP = """
    import sys, time
    import jax, jax.numpy as jnp, numpy as np
    from moe.training.checkpoint import Checkpointer
    directory, last = sys.argv[1], int(sys.argv[2])
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    make = jax.jit(lambda step: {"w": jax.random.normal(jax.random.key(step), (2**23,))})
    target = {"w": jax.ShapeDtypeStruct((2**23,), jnp.float32, sharding=one)}  # 32 MB
    with Checkpointer(directory) as checkpoints:
        restored = checkpoints.restore_newest(target, fresh={})
        start = 0
        if restored is not None:
            start = restored.step
            assert restored.data_state == {"next": start}
            assert np.array_equal(restored.state["w"], make(start)["w"])
        print("RESUMED", start, flush=True)
        for step in range(start + 1, last + 1):
            state = jax.block_until_ready(make(step))
            checkpoints.wait()
            print("SAVING", step, flush=True)
            checkpoints.save(step, state, {"next": step}, {})
"""


def kill_savers(workdir: Path, kills: int) -> None:
    draws, there = random.Random(3), 0
    for _ in range(kills):
        with child(LOOP, workdir / "checkpoints", 10**6) as saver:
            resumed = int(saver.wait_for("RESUMED").split()[1])
            assert resumed >= there
            for _ in range(2):
                saving = int(saver.wait_for("SAVING").split()[1])
            time.sleep(draws.uniform(0, 0.4))
            saver.signal(signal.SIGKILL)
            assert saver.finish(60).code == -signal.SIGKILL
            there = saving - 1  # the save before was waited for
    with child(LOOP, workdir / "checkpoints", 0) as last:
        ended = last.finish(120)
        assert ended.code == 0, ended.text
        assert int(ended.text.split("RESUMED")[1].split()[0]) >= there
    assert not [p for p in (workdir / "checkpoints").iterdir() if not p.name.isdigit()]
    for step in steps_saved(workdir):
        assert inspection.flaws(workdir / "checkpoints" / str(step)) == []
    assert not (workdir / "quarantine").exists()


def test_row_03_sigkill_in_async_save(tmp_path):
    """The step before is there and whole, whenever the kill comes; nothing half is left."""
    kill_savers(tmp_path, 3)


@pytest.mark.slow
def test_row_03_sigkill_in_async_save_eight_times(tmp_path):
    kill_savers(tmp_path, 8)


RAISING = """
    import resource, sys
    import jax, jax.numpy as jnp, numpy as np
    from moe.errors import ResourceError
    from moe.training.checkpoint import Checkpointer
    good = {"w": jax.random.normal(jax.random.key(0), (2**16,))}
    checkpoints = Checkpointer(sys.argv[1]).__enter__()
    checkpoints.save(1, good, {}, {})
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    for step in range(2, 12):
        try:
            checkpoints.save(step, good | {"odd": np.int32(1)}, {}, {})
        except TypeError as error:
            assert "odd is a int32" in str(error)
            print("refused", flush=True)
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))  # no room even for the first file
        try:
            checkpoints.save(step, good, {}, {})
            checkpoints.wait()
        except ResourceError as error:
            assert "EFBIG" in str(error) and "[1]" in str(error)
            print("full", flush=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    raise ValueError("the cause")  # without close: no thread may hold the process
"""


def test_row_24_exception_in_save(tmp_path):
    """The cause is shown, the last checkpoint is whole, and the process ends at once."""
    with child(RAISING, tmp_path / "checkpoints") as raising:
        while (line := raising.wait_for("")) != "Traceback (most recent call last):\n":
            assert line, raising.text
        failed = time.monotonic()
        ended = raising.finish(120)
    assert time.monotonic() - failed < 20, ended.text
    assert ended.code == 1
    assert "ValueError: the cause" in ended.text
    assert ended.text.count("refused") == ended.text.count("full") == 10
    assert steps_saved(tmp_path) == [1]
    assert inspection.flaws(tmp_path / "checkpoints" / "1") == []


LAST = """
    import sys
    import jax
    from moe.training.checkpoint import Checkpointer
    def main():
        with Checkpointer(sys.argv[1]) as checkpoints:
            checkpoints.save(1, {"w": jax.random.normal(jax.random.key(1), (2**22,))}, {}, {})
            if sys.argv[2] == "exit":
                sys.exit(0)
            if sys.argv[2] == "error":
                raise ValueError
    main()
"""


def test_row_25_exit_right_after_last_save(tmp_path):
    """The last save is there with its manifest, however the program is left."""
    ways = {"return": 0, "exit": 0, "error": 1}
    for way, code in ways.items():
        with child(LAST, tmp_path / way / "checkpoints", way) as program:
            assert program.finish(120).code == code
    for way in ways:
        folder = tmp_path / way / "checkpoints" / "1"
        assert inspection.flaws(folder) == []
        assert (folder / "manifest.json").is_file()
        target = {"w": jax.ShapeDtypeStruct((2**22,), jnp.float32, sharding=sharding(1))}
        with Checkpointer(folder.parent, read_only=True) as checkpoints:
            found = checkpoints.restore("latest", target).state["w"]
        np.testing.assert_array_equal(found, jax.random.normal(jax.random.key(1), (2**22,)))


TWO = """
    import sys
    import jax, jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec
    from moe import cli
    from moe.training.checkpoint import Checkpointer
    directory, address, process = sys.argv[1], sys.argv[2], int(sys.argv[3])
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(address, 2, process, coordinator_bind_address=address)
    rows = NamedSharding(jax.sharding.Mesh(jax.devices(), "fsdp"), PartitionSpec("fsdp"))
    target = {"w": jax.ShapeDtypeStruct((256, 64), jnp.float32, sharding=rows)}
    def main(argv):
        with Checkpointer(directory, keep_latest=9) as checkpoints:
            if argv[4] == "write":
                for step in (1, 2, 3):
                    draw = lambda: jax.random.normal(jax.random.key(step), (256, 64))
                    make = jax.jit(draw, out_shardings=rows)
                    checkpoints.save(step, {"w": make()}, {"next": step}, {})
                return
            print("restored", checkpoints.restore_newest(target, fresh={}).step, flush=True)
    cli.run(main)
"""


def two_processes(directory: Path, what: str) -> list[tuple[int, str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-c", textwrap.dedent(TWO), str(directory), address]
    with Child([*command, "0", what], {}) as first, Child([*command, "1", what], {}) as second:
        ended = [child.finish(120) for child in (first, second)]
    return [(end.code, end.text) for end in ended]


@pytest.mark.slow
def test_row_08_two_processes_take_the_same_branch(tmp_path):
    """Damage that only one of them meets, with and without a manifest; then a move that fails."""
    directory = tmp_path / "checkpoints"
    assert [code for code, _ in two_processes(directory, "write")] == [0, 0]
    for step in (2, 3):
        payload = max(
            (directory / str(step)).rglob("ocdbt.process_1/d/*"), key=lambda p: p.stat().st_size
        )
        flip_byte(payload, payload.stat().st_size // 2)
    (directory / "2" / "manifest.json").unlink()
    for code, text in two_processes(directory, "restore"):
        assert code == 0, text
        assert "restored 1" in text
    assert steps_saved(tmp_path) == [1]
    assert sorted(p.name for p in (tmp_path / "quarantine").iterdir()) == ["2-1", "3-1"]
    (directory / "5").mkdir()
    shutil.rmtree(tmp_path / "quarantine")
    (tmp_path / "quarantine").write_text("in the way")
    for code, text in two_processes(directory, "restore"):
        assert code == 4, text
        assert "has to be moved" in text
