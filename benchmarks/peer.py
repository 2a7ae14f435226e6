"""The parent's end of `benchmarks/torch_side.py`: PyTorch in a process of its own, asked over a pipe.

Two frameworks in one process would fight over its threads and its allocator. The child waits
while the parent measures, and the other way round.
"""

from importlib import metadata, util
import json
import os
from pathlib import Path
import subprocess
import sys
import time
from typing import Any, Self

from benchmarks.timing import Timed

NEEDED = ("torch", "transformers")
MISSING = "not installed: python3 -m pip install -e '.[bench]'"
PAUSE = 0.02  # seconds after which threads of either side no longer spin for more work


def installed() -> bool:
    """Whether both packages are there; nothing is imported."""
    return all(util.find_spec(name) is not None for name in NEEDED)


def versions() -> str:
    """As `torch 2.13.0, transformers 5.0.0`."""
    return ", ".join(f"{name} {metadata.version(name)}" for name in NEEDED)


class Peer:
    """The child; a context manager that ends it."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("torch_side.py")
        quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        self._process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | quiet,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate()  # the end of its input ends it

    def ask(self, request: str, **values: Any) -> Any:
        """The child's answer.

        Raises:
            RuntimeError: it could not; with its last words.
        """
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"request": request, **values}) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the PyTorch process ended at {request!r}, code {process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"the PyTorch process failed at {request!r}: {answer['error']}")
        return answer["answer"]

    def timed(self, name: str) -> Timed:
        """Runs once what the child has by that name; the child takes the time."""

        def run() -> float:
            time.sleep(PAUSE)
            seconds = self.ask("run", name=name)
            time.sleep(PAUSE)
            return seconds

        return run
