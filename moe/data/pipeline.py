"""The code that decides which row is which, as a hash: part of every place in the data.

What this code makes of the same data under the same seed must be what it made when the run stopped.
Two kinds of modules: those that run after the fingerprint was taken are hashed here; what the others
make is in the fingerprint itself.
"""

import ast
from collections.abc import Iterator
import hashlib
import importlib.metadata
from pathlib import Path

# By kind of data. Every module of moe.data that these import stands here or in IN_FINGERPRINT.
IN_CODE: dict[str, tuple[str, ...]] = {
    "text": ("order", "pack", "text", "types"),
    "examples": (
        "order",
        "pack",
        "types",
        "example_data",
        "example_rows",
        "audio",
        "corrupt",
        "images",
    ),
}
# What these make or choose is hashed with the tokens or the examples, or stands in the state by name.
IN_FINGERPRINT = (
    "batches",  # splits, sizes and the weights, which stand in the state
    "cache",
    "checked",
    "examples",
    "features",
    "pipeline",
    "place",
    "reader",
    "readers",
    "router_valid",
    "sources",
    "store",
    "tokenizers",
)
_FOR_READERS = ("annotation", "returns", "type_comment")  # parts of nodes


def code_of(kind: str) -> str:
    """Hash of the modules that make rows of this kind, and the version of grain, which orders them.

    What a reader alone sees does not count: see `normalised`. Grain's shuffle and mixture are
    its own and may change from version to version; the streams of `numpy.random.RandomState` and
    `SeedSequence` are frozen by NumPy's policy, so its version is not part of this.

    Args:
        kind: of `IN_CODE`.
    """
    digest = hashlib.sha256()
    for name in IN_CODE[kind]:
        source = (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
        digest.update(f"{name} {normalised(source)}\n".encode())
    return f"{digest.hexdigest()[:16]} grain-{importlib.metadata.version('grain')}"


def normalised(source: str) -> str:
    """A text of what a Python source does, the same in every version of Python that can parse it.

    Comments, layout, docstrings, annotations, the words of errors, the order of imports and those that
    nothing else needs are not in it.
    """
    module = ast.parse(source).body
    imports = [node for node in module if isinstance(node, ast.Import | ast.ImportFrom)]
    rest = _text([node for node in module if node not in imports and not _is_text(node)])
    used = (text for node in imports for name, text in _imported(node) if f"id={name!r}" in rest)
    return "\n".join([*sorted(used), rest])


def _imported(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, str]]:
    """Each name that an import binds, and what it is."""
    start = f"{node.level} {node.module}" if isinstance(node, ast.ImportFrom) else ""
    for alias in node.names:
        yield alias.asname or alias.name.partition(".")[0], f"{start} {_text(alias)}"


def _text(node: object) -> str:
    if isinstance(node, list):
        return f"[{' '.join(map(_text, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.Raise):
        return "Raise"  # which rows there are is decided by the condition
    if isinstance(node, ast.AnnAssign) and node.value is not None:
        return _text(ast.Assign([node.target], node.value))
    fields = {name: value for name, value in ast.iter_fields(node) if value not in (None, [])}
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        fields["body"] = [part for part in node.body if not _is_text(part)]
    inner = (f"{name}={_text(value)}" for name, value in fields.items() if name not in _FOR_READERS)
    return f"{type(node).__name__}({' '.join(inner)})"


def _is_text(node: ast.stmt) -> bool:
    """Whether a statement is nothing but a string: a docstring."""
    return isinstance(node, ast.Expr) and (
        isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    )
