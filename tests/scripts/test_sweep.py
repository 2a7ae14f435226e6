from pathlib import Path
import subprocess
import sys

from tests.sweep.common import write_sweep

SCRIPT = Path(__file__).parents[2] / "scripts" / "sweep.py"


def run(*arguments):
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_bad_sweep_exits_2_and_leaves_nothing(tmp_path):
    path = write_sweep(tmp_path / "sweep.py", sampler="gird")
    done = run(f"--config={path}", f"--workdir={tmp_path / 'work'}")
    assert done.returncode == 2
    assert "the nearest is 'grid'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "work").exists()
