"""The sections by name; each is measured in a process of its own."""

from concurrent.futures import ProcessPoolExecutor
from importlib import import_module, metadata
import multiprocessing
import os
from pathlib import Path
import platform
import shlex
import subprocess
import sys
from typing import Any

from benchmarks.rows import Row
from moe.config import nearest
from moe.errors import ConfigError

ROOT = Path(__file__).parent.parent
# name -> module with `measure(repeats) -> list[Row]`
SECTIONS = {
    "layer": "benchmarks.layer",
    "skew": "benchmarks.skew",
    "growth": "benchmarks.growth",
    "memory": "benchmarks.memory",
    "step": "benchmarks.step",
    "input": "benchmarks.input_wait",
    "language_model": "benchmarks.language_model",
    "compile": "benchmarks.compile_time",
    "guards": "benchmarks.guards",
}
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "transformers")


def find(names: list[str] | None) -> list[str]:
    """The names of sections to measure, all for None, in the order of SECTIONS.

    Raises:
        ConfigError: no section has that name.
    """
    for name in names or ():
        if name not in SECTIONS:
            raise ConfigError(
                f"--only={name}: no section has that name; {nearest(name, SECTIONS)}. There are "
                f"{', '.join(SECTIONS)}."
            )
    return [name for name in SECTIONS if names is None or name in names]


def measure(name: str, repeats: int) -> list[Row]:
    """The rows of a section, from a fresh process: what ran before it has left nothing behind."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(in_process, name, repeats).result()


def in_process(name: str, repeats: int) -> list[Row]:
    """As `measure`, in this process, with the allocator as in training and no compilation cache."""
    import jax

    from moe.parallel.host_memory import reuse_buffers

    reuse_buffers()
    jax.config.update("jax_enable_compilation_cache", False)
    os.chdir(ROOT)  # configs are named from there
    return import_module(SECTIONS[name]).measure(repeats)


def origin(repeats: int) -> dict[str, Any]:
    """Where numbers come from: machine, versions, commit, command."""
    command = shlex.join(["python3", "benchmarks/run.py", *sys.argv[1:]])
    return {
        "machine": machine(),
        "versions": f"Python {platform.python_version()}, " + ", ".join(_versions()),
        "commit": commit(),
        "command": f"`{command}`",
        "rounds": repeats,
    }


def machine() -> str:
    """Processor and how many cores of it this process may use."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores of {named[0] if named else model}"


def commit() -> str:
    """Of the working tree; `+` where files differ from it."""
    told = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True
    )
    return told.stdout.strip() or "unknown"


def _versions() -> list[str]:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return found
