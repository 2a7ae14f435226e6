"""The Python standard library as a text data set: nothing to download, two domains.

`code` is every `.py` file of the library as installed with the interpreter, whole and unchanged.
`prose` is its documentation: all docstrings of one file joined, and the topics of `pydoc`'s help.
Docstrings stay inside the code too, because code without them is not what people write. A file and
its docstrings share a path and therefore a split, so nothing held out is seen in training.
"""

import ast
from collections.abc import Iterator
import contextlib
import io
import os
from pathlib import Path
import pydoc_data.topics
import sys
import sysconfig
import tempfile
import tokenize
import warnings

import tensorflow_datasets as tfds

from moe.data.sources.prepared import prepared_directory, read_prepared
from moe.data.sources.types import SPLITS, Request, Source, split_of
from moe.errors import DataError

_PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
_LARGEST_FILE = 512 * 1024  # bytes; larger ones are generated tables
_SHORTEST_PROSE = 32  # characters
_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "__pycache__"}  # other people's and no source
    | {"test", "tests", "idle_test"}
    | {"encodings", "pydoc_data"}  # tables of code points; the topics are read as prose
)
_LEFT_OUT_PREFIXES = ("test_", "_sysconfigdata", "config-")  # the last two describe one machine


class PythonStdlib(tfds.core.GeneratorBasedBuilder):
    """Code and documentation of the interpreter's standard library, held out by whole file.

    The config's name carries Python's minor version: interpreters do not share prepared data.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = (tfds.core.BuilderConfig(name=_PYTHON),)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="The Python standard library: code, and the prose of its documentation.",
            features=tfds.features.FeaturesDict(
                {
                    "text": tfds.features.Text(),
                    "domain": tfds.features.ClassLabel(names=["code", "prose"]),
                    "path": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing to download
        root = Path(sysconfig.get_paths()["stdlib"])
        return {split: self._generate_examples(root, split) for split in SPLITS}

    def _generate_examples(self, root: Path, split: str):
        for path in library_files(root):
            if split_of(path) != split:
                continue
            with tokenize.open(root / path) as file:  # honours the coding cookie
                code = file.read()
            yield f"code/{path}", {"text": code, "domain": "code", "path": path}
            prose = docstrings(code)
            if len(prose) >= _SHORTEST_PROSE:
                yield f"prose/{path}", {"text": prose, "domain": "prose", "path": path}
        for topic, text in sorted(pydoc_data.topics.topics.items()):
            path = f"pydoc_data/topics/{topic}"
            if split_of(path) == split:
                yield f"prose/{path}", {"text": text, "domain": "prose", "path": path}


def library_files(root: Path) -> Iterator[str]:
    """Yields the paths of the library's own `.py` files, relative to `root`, in sorted order."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not _left_out(name))
        for name in sorted(files):
            path = Path(folder, name)
            if not name.endswith(".py") or _left_out(name):
                continue
            if 0 < path.stat().st_size <= _LARGEST_FILE:
                yield path.relative_to(root).as_posix()


def _left_out(name: str) -> bool:
    return name in _LEFT_OUT or name.startswith(_LEFT_OUT_PREFIXES)


def docstrings(code: str) -> str:
    """Returns the docstrings of a module, its classes and functions, in their order in the file.

    Code that this interpreter cannot parse (templates of other versions) has none.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in the library's own strings
        try:
            tree = ast.parse(code)
        except SyntaxError:
            return ""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))  # a module has no line of its own
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def stdlib_source(request: Request) -> Source:
    """Prepares the data set where needed (seconds, no network) and opens it.

    Raises:
        DataError: the library's files are not there, or the directory cannot be written.
    """
    root = sysconfig.get_paths()["stdlib"]
    if not any(library_files(Path(root))):
        raise DataError(
            f"The standard library has no .py files in {root}: this interpreter ships it in "
            "another form. Use data.name=files or a Python built from source or by a distribution."
        )
    name = f"{PythonStdlib.name}/{_PYTHON}"
    if prepared_directory(name, request.directory) is None:
        _prepare(request.directory, name)
    return read_prepared(name, request.directory, "text")


def _prepare(directory: Path, name: str) -> None:
    tfds.disable_progress_bar()
    try:
        builder = PythonStdlib(data_dir=directory, config=_PYTHON, file_format="array_record")
        with (
            tempfile.TemporaryDirectory() as downloads,  # stays empty
            contextlib.redirect_stdout(io.StringIO()),  # it announces a download; there is none
        ):
            builder.download_and_prepare(download_dir=downloads)
    except OSError as error:
        # Another process may have prepared the same data and renamed it into place first.
        if prepared_directory(name, directory) is None:
            raise DataError(
                f"Cannot write the prepared data set to {directory}: {error}. "
                "Set data.directory to a directory that can be written."
            ) from error
