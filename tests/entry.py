"""Runs the entry points inside the test's own process, as a shell would."""

from collections.abc import Generator
import contextlib
import importlib
import io
from typing import NamedTuple
from unittest import mock

import jax
from jax.experimental.compilation_cache import compilation_cache
import pytest

from moe import cli

QUICKSTART = "--config=configs/quickstart.py"


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def run(program: str, *arguments: str) -> Ended:
    """`python3 PROGRAM.py ARGUMENTS`: exit code and what was printed."""
    module = importlib.import_module(program)
    module.FLAGS.unparse_flags()
    out, err = io.StringIO(), io.StringIO()
    argv = [f"{program}.py", *arguments]
    with (
        mock.patch("sys.argv", argv),
        mock.patch.object(module, "reuse_buffers"),  # settings of a whole process, not of a test
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        cli.run(module.main)
    return Ended(int(end.value.code or 0), out.getvalue(), err.getvalue())


@contextlib.contextmanager
def compiled_once(folder) -> Generator[dict[str, str]]:
    """What one run has compiled the next one loads, child processes too; yields their variables."""
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield {name.upper(): str(value) for name, value in settings.items()}
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def tiny_text(folder) -> None:
    """Two domains of text files under `folder`, 20 kB in all; `data_flags` reads them."""
    for domain, word in (
        ("code", "def f(x): return x\n"),
        ("prose", "A line of words, and so on.\n"),
    ):
        for i in range(8):
            (folder / f"{domain}{i}.txt").write_text(f"{domain} {i}\n" + word * (40 + 7 * i))


def data_flags(folder) -> list[str]:
    files = {domain: f"{folder}/{domain}*.txt" for domain in ("code", "prose")}
    return [
        "--config.data.name=files",
        f"--config.data.files={files}",
        f"--config.data.directory={folder / 'made'}",
        "--config.data.batch_size=8",
        "--config.data.sequence_length=32",
    ]


MODEL_FLAGS = [
    "--config.model.num_layers=2",
    "--config.model.width=16",
    "--config.model.heads=2",
    "--config.model.kv_heads=2",
    "--config.model.head_dim=8",
    "--config.model.mlp_width=32",
    "--config.model.expert_width=16",
    "--config.model.num_experts=8",
    "--config.router.k=2",
]
