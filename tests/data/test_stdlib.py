import ast
import pathlib
import sysconfig
from typing import Any

from ml_collections import ConfigDict
import pytest
import tensorflow_datasets as tfds

from moe.data.open import make_data
from moe.data.sources import stdlib
from moe.data.sources.types import SPLITS, Request, split_of
from moe.errors import DataError


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def data(directory):
    section = {"name": "stdlib", "batch_size": 4, "sequence_length": 64}
    return make_data(ConfigDict(section | {"directory": str(directory)}), seed=0)


@pytest.fixture(scope="module")
def examples(data, directory):
    """Returns the prepared examples of each split, as text."""
    del data  # it prepares them
    (info,) = directory.glob("python_stdlib/python3.*/1.0.0/dataset_info.json")
    builder: Any = tfds.builder_from_directory(info.parent)
    domains = builder.info.features["domain"]
    return {
        split: [
            (domains.int2str(int(e["domain"])), e["path"].decode(), e["text"].decode())
            for e in builder.as_data_source(split)
        ]
        for split in SPLITS
    }


def test_sizes(data):
    assert data.domains == ("code", "prose")
    assert data.counts["train"]["code"].bytes > 4_000_000
    assert data.counts["train"]["prose"].bytes > 1_000_000
    assert all(data.counts[split][name].bytes > 20_000 for split in SPLITS for name in data.domains)
    assert next(data.train_batches()).tokens.max() <= 256


def test_held_out_by_whole_file(examples):
    paths = {split: {path for _, path, _ in examples[split]} for split in SPLITS}
    assert not paths["train"] & paths["valid"]
    assert not paths["train"] & paths["test"]
    assert not paths["valid"] & paths["test"]
    for split in SPLITS:  # code and its docstrings are on the same side
        assert all(split_of(path) == split for path in paths[split])
    keys = [(domain, path) for split in SPLITS for domain, path, _ in examples[split]]
    assert len(keys) == len(set(keys))
    assert {("code", "ast.py"), ("prose", "ast.py"), ("prose", "pydoc_data/topics/while")} <= {
        *keys
    }


def test_router_validation_takes_a_file_with_its_docstrings(data, directory, examples):
    section = {"name": "stdlib", "batch_size": 4, "sequence_length": 64}
    section |= {"directory": str(directory)}
    carved = make_data(ConfigDict(section), seed=0, router_valid=True)
    held_out = carved.store.splits["router_valid"].domain >= 0
    met = [(path, held) for (_, path, _), held in zip(examples["train"], held_out, strict=True)]
    assert {path for path, held in met if held}.isdisjoint(path for path, held in met if not held)
    assert 0.03 < held_out.mean() < 0.07
    assert all(carved.counts["router_valid"][name].documents for name in data.domains)


def test_code_is_the_file_and_prose_its_docstrings(examples):
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    texts = {(d, p): t for split in SPLITS for d, p, t in examples[split]}
    code = texts["code", "functools.py"]
    assert code == (root / "functools.py").read_text(encoding="utf-8")
    prose = texts["prose", "functools.py"]
    assert ast.get_docstring(ast.parse(code)) in prose
    assert "import" not in prose.split("\n")[0]


def test_only_the_library_itself(examples):
    paths = {path for split in SPLITS for _, path, _ in examples[split]}
    parts = {part for path in paths for part in path.split("/")}
    assert not parts & {"site-packages", "dist-packages", "test", "tests", "encodings"}
    assert not any(path.startswith("/") for path in paths)


def test_prepared_once(data, directory):
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    section = {"name": "stdlib", "batch_size": 2, "sequence_length": 32}
    again = make_data(ConfigDict(section | {"directory": str(directory)}), seed=1)
    assert again.fingerprint == data.fingerprint
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before


def test_two_processes_prepare_at_once(tmp_path, monkeypatch):
    """The second starts and ends while the first generates: the first takes what is there."""
    request = Request("", tmp_path, None, "text")
    files = ["os.py", "ast.py", "abc.py"]
    calls = []

    def library_files(root):
        calls.append(root)
        if len(calls) == 2:  # the first call looks whether there are files at all
            stdlib.stdlib_source(request)
        return iter(files)

    monkeypatch.setattr(stdlib, "library_files", library_files)
    source = stdlib.stdlib_source(request)
    assert len(calls) > 5
    assert {"code", "prose"} == {document.domain for document in source.documents("valid")}
    assert not list(tmp_path.glob("**/incomplete*"))


def test_docstrings_in_order_of_the_file():
    code = '"""Module."""\nclass A:\n    """Class."""\n    def f(self):\n        """Method."""\n'
    code += 'async def g():\n    """Function."""\n    "not one"\n'
    assert stdlib.docstrings(code) == "Module.\n\nClass.\n\nMethod.\n\nFunction."
    assert stdlib.docstrings("x = 1\n") == ""
    assert stdlib.docstrings("print 'two'\n") == ""
    assert stdlib.docstrings('x = "\\d"\n"""No."""\n') == ""


def test_directory_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(stdlib, "library_files", lambda root: iter(["ast.py"]))
    blocked = tmp_path / "file"
    blocked.write_text("")
    section = {"name": "stdlib", "batch_size": 4, "sequence_length": 64}
    with pytest.raises(DataError, match=r"Cannot write .*data\.directory"):
        make_data(ConfigDict(section | {"directory": str(blocked)}), seed=0)
    assert blocked.read_text() == ""


def test_interpreter_without_files(tmp_path, monkeypatch):
    monkeypatch.setattr(stdlib, "library_files", lambda root: iter([]))
    section = {"name": "stdlib", "batch_size": 4, "sequence_length": 64}
    with pytest.raises(DataError, match=r"no \.py files"):
        make_data(ConfigDict(section | {"directory": str(tmp_path)}), seed=0)
    assert not list(tmp_path.iterdir())
