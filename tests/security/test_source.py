"""No line of the program loads code from data: the names that would are looked for in its syntax tree."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PLACES = ("moe", "scripts", "configs", "benchmarks", "train.py", "eval.py")

# Modules that run what they read, or that a format older than ours would need.
MODULES = {
    *("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"),
    *("copyreg", "code", "codeop", "pty", "jsonpickle", "hickle", "msgpack", "yaml"),
}
# Modules that find code by name or path.
LOADERS = {"importlib", "runpy", "pkgutil", "imp", "zipimport"}
HARMLESS = "importlib.metadata."  # versions of packages
CALLS = {
    *("eval", "exec", "compile", "__import__"),
    *("os.system", "os.popen", "tempfile.mktemp", "torch.load", "jax.export.deserialize"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "getoutput", "getstatusoutput"),
}
# Methods whose safe form says so: name -> keyword that must be there, and its values (none: any).
KEYWORDS = {
    "np.load": ("allow_pickle", (False,)),
    "numpy.load": ("allow_pickle", (False,)),
    "jnp.load": ("allow_pickle", (False,)),
    ".extractall": ("filter", ("data",)),
    ".extract": ("filter", ("data",)),
}
BIND_ALL = "--bind_all"

# (file, what) -> why it may stand there.
ALLOWED = {
    ("moe/cli.py", "runpy"): "config files are Python by design: a run's author writes them",
    ("moe/sweep/load.py", "runpy"): "sweep and comparison files are Python by design",
    ("moe/config.py", "importlib"): "a config file imports the one beside it, by path",
    ("moe/data/packages.py", "importlib"): "find_spec looks whether pip is there",
    ("moe/data/sources/czech_speech.py", "importlib"): "find_spec looks whether soundfile is there",
    (
        "moe/data/sources/catalogue.py",
        "importlib",
    ): "modules of the table in the same file, no others",
    ("benchmarks/torch_side.py", "importlib"): "the peer's model class, a name written in the file",
    (
        "benchmarks/sections.py",
        "importlib",
    ): "the sections of the table in the same file, and versions",
    ("benchmarks/peer.py", "importlib"): "looks whether the peer is installed, and its version",
}


class Found(NamedTuple):
    what: str
    line: int


def forbidden(source: str) -> Iterator[Found]:
    """Everything in a source that is in one of the tables above."""
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call):
            yield from (Found(what, line) for what in _calls(node))
            continue
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value.startswith(BIND_ALL):
                yield Found(BIND_ALL, line)
            continue
        else:
            continue
        names = [name for name in names if not f"{name}.".startswith(HARMLESS)]
        for name in {name.split(".")[0] for name in names} & (MODULES | LOADERS):
            yield Found(name, line)
        yield from (Found(name, line) for name in names if name in CALLS)


def _calls(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    last = name.rpartition(".")[2]
    if name in CALLS or last in CALLS - {"compile"}:
        yield name
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    for key in (name, f".{last}" if "." in name else ""):
        wanted = KEYWORDS.get(key)
        if wanted is not None and _literal(given.get(wanted[0])) not in wanted[1]:
            yield f"{name} without {wanted[0]}={wanted[1][0]!r}"
    if _literal(given.get("shell")) not in (None, False):
        yield "shell=True"
    if "allow_pickle" in given and _literal(given["allow_pickle"]) is not False:
        yield "allow_pickle=True"


def _literal(node: ast.expr | None) -> object:
    """The value of a constant, None for nothing; of anything else its text, which no rule allows."""
    if node is None:
        return None
    return node.value if isinstance(node, ast.Constant) else f"({ast.unparse(node)})"


def files() -> list[Path]:
    found = [ROOT / place for place in PLACES]
    return [p for place in found for p in (place.rglob("*.py") if place.is_dir() else [place])]


def test_nothing_in_the_program_loads_code_from_data():
    assert len(files()) > 200
    found, used = [], set()
    for path in files():
        name = path.relative_to(ROOT).as_posix()
        for what, line in forbidden(path.read_text(encoding="utf-8")):
            if (name, what) in ALLOWED:
                used.add((name, what))
            else:
                found.append(f"{name}:{line}: {what}")
    assert not found, "\n".join(found)
    assert used == set(ALLOWED), f"no longer needed: {set(ALLOWED) - used}"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, cPickle as p",
        "from dill import loads",
        "from joblib.numpy_pickle import load",
        "import shelve",
        "import marshal",
        "import yaml",
        "import torch; torch.load('x')",
        "eval('1')",
        "exec('1')",
        "compile('1', '', 'eval')",
        "__import__('os')",
        "import builtins; builtins.eval('1')",
        "import os; os.system('ls')",
        "from os import system",
        "import subprocess; subprocess.run('ls', shell=True)",
        "import subprocess; subprocess.run('ls', shell=x)",
        "import subprocess; subprocess.getoutput('ls')",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=x)",
        "np.savez(path, x, allow_pickle=True)",
        "archive.extractall(folder)",
        "archive.extractall(folder, filter='fully_trusted')",
        "archive.extract(member)",
        "import tempfile; tempfile.mktemp()",
        "command = ['tensorboard', '--bind_all']",
        "import importlib.util",
        "from runpy import run_path",
    ],
)
def test_each_of_them_is_found(source):
    assert list(forbidden(source))


@pytest.mark.parametrize(
    "source",
    [
        "import importlib.metadata",
        "from importlib import metadata",
        "import re; re.compile('x')",
        "executable = lowered.compile()",
        "np.load(path, allow_pickle=False)",
        "archive.extractall(folder, filter='data')",
        "import ast; ast.literal_eval('1')",
        "model.eval_step(x)",
        "subprocess.run(['ls'], shell=False)",
        "'it may use --bind_all'",
    ],
)
def test_what_is_harmless_is_not(source):
    assert not list(forbidden(source))
