"""Checkpoints as safetensors, and back: arrays by name, and JSON for all the rest.

Nothing that is read here can hold code. The digests of the leaves go along, so that a round trip is
bit for bit or an error.
"""

from collections.abc import Mapping
import json
from pathlib import Path
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from moe.errors import CheckpointError
from moe.training.checkpoint import Checkpointer
from moe.training.digest import digest, leaf_names
from moe.training.keeping import Scores
from moe.training.record import are_leaves, are_metrics, is_known, is_signed, sign
from moe.training.step_folder import read_record
from moe.training.stored import full_flaw, read_json, read_leaf
from moe.training.workdir import write_atomically

ARRAYS_FILE, RECORD_FILE = "model.safetensors", "record.json"
_FORMAT = 1
_MODEL = ("params", "router")  # entries of the state that make the model
_IMPLEMENTATIONS = {"key<fry>": "threefry2x32", "key<rbg>": "rbg", "key<urbg>": "unsafe_rbg"}
_STEPS = 2**63  # no more are counted
_DEEPEST = 100  # keys of a path
_SEQUENCE = 1  # the type of a key in Orbax's description of the tree
# What files that disagree with each other raise when they are read.
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
_EMPTY: dict[str, Any] = {"None": None, "Dict": {}, "List": [], "Tuple": []}


def to_safetensors(directory: Path, step: int, folder: Path, *, everything: bool = False) -> None:
    """Writes `model.safetensors` and `record.json` of a checkpoint into a new folder.

    Names have dots for slashes. Typed keys are stored as their uint32 data, which the record says.

    Args:
        directory: Of the checkpoints.
        step: Number.
        folder: Must not hold such files yet.
        everything: Also the step, the optimiser and all else that a run needs to go on.

    Raises:
        CheckpointError: If the checkpoint is damaged, or the folder in use or not writable.
    """
    source = directory / str(step)
    found, record = full_flaw(source), read_record(source)
    if found is not None or record is None or not is_known(record):
        raise CheckpointError(
            f"Checkpoint {step} in {directory} is not converted: {found or 'its format is not read here'}."
        )
    if (folder / ARRAYS_FILE).exists() or (folder / RECORD_FILE).exists():
        raise CheckpointError(f"{folder} holds a converted checkpoint already. Name a new folder.")
    kept = None if everything else _MODEL
    try:
        arrays, content = _contents(source, record, kept)
    except _UNREADABLE as error:
        raise CheckpointError(
            f"Checkpoint {step} in {directory} is not converted: it was changed by hand and does not "
            f"read back ({error!r})."
        ) from error
    content["step"] = step
    content["metrics"].update(Scores(directory, writes=False).of(step))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(arrays, folder / ARRAYS_FILE)
        write_atomically(folder / RECORD_FILE, json.dumps(sign(content), indent=1) + "\n")
        # The library makes its file for this user alone, whatever the umask says.
        shutil.copymode(folder / RECORD_FILE, folder / ARRAYS_FILE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} could not be written: {error}.") from error


def _contents(
    source: Path, record: dict[str, Any], kept: tuple[str, ...] | None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of a step and what goes beside them, of the entries `kept` or of all.

    Raises:
        LookupError: as all of `_UNREADABLE`, for files that do not agree with each other.
    """
    leaves = {
        name: leaf
        for name, leaf in record["leaves"].items()
        if kept is None or name.split("/")[0] in kept
    }
    arrays = {_dotted(name): np.asarray(read_leaf(source, name), order="C") for name in leaves}
    if len(arrays) != len(leaves):
        raise LookupError("leaves have names that differ only in `.` and `/`")
    return arrays, {
        "format": _FORMAT,
        "leaves": leaves,
        "tree": [node for node in _tree(source) if kept is None or node["path"][0][0] in kept],
        "data": read_json(source, "data"),
        "meta": read_json(source, "meta"),
        "metrics": dict(record["metrics"]),
    }


def from_safetensors(folder: Path, directory: Path) -> tuple[int, dict[str, Any]]:
    """Writes the checkpoint that a folder of `to_safetensors` holds; returns its step and `meta`.

    Args:
        folder: With `model.safetensors` and `record.json`.
        directory: Of the checkpoints; the caller holds the lock of its workdir.

    Raises:
        CheckpointError: If the folder is damaged or the step is there already.
    """
    record, arrays = _read(folder)
    step, leaves = record["step"], record["leaves"]
    if set(arrays) != {_dotted(name) for name in leaves}:
        odd = sorted(set(arrays) ^ {_dotted(name) for name in leaves})
        raise CheckpointError(f"{folder}: {ARRAYS_FILE} and {RECORD_FILE} differ in {odd[:3]}.")
    read = {name: _device_array(folder, name, arrays, leaf) for name, leaf in leaves.items()}
    try:
        state = _nest(folder, record["tree"], read)
        same = sorted(leaf_names(state)) == sorted(leaves)
    except _UNREADABLE as error:
        raise CheckpointError(f"{folder}: the tree in {RECORD_FILE} is none: {error!r}.") from error
    if not same:
        raise CheckpointError(f"{folder}: the tree in {RECORD_FILE} is not that of its leaves.")
    with Checkpointer(directory, keep_latest=2**31) as checkpointer:
        if not checkpointer.save(
            step,
            state,
            record["data"],
            record["meta"],
            record["metrics"],
        ):
            raise CheckpointError(
                f"There is a checkpoint {step} in {directory} already. Name another workdir, or "
                "move that step away."
            )
    return step, record["meta"]


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    try:
        record = json.loads((folder / RECORD_FILE).read_bytes())
        arrays = load_file(folder / ARRAYS_FILE)
    except (*_UNREADABLE, SafetensorError) as error:
        raise CheckpointError(f"{folder} is no converted checkpoint: {error}.") from error
    if not is_signed(record) or record.get("format") != _FORMAT:
        raise CheckpointError(
            f"{folder / RECORD_FILE} is damaged or of another format: its checksum is wrong. "
            "Convert the checkpoint again."
        )
    if not _is_whole(record):
        raise CheckpointError(
            f"{folder / RECORD_FILE} has parts that no conversion writes: it was changed by hand. "
            "Convert the checkpoint again."
        )
    return record, arrays


def _is_whole(record: dict[str, Any]) -> bool:
    """Whether a record has the parts that `to_safetensors` writes: its checksum can be renewed."""
    step, tree = record.get("step"), record.get("tree")
    return (
        type(step) is int
        and 0 <= step < _STEPS
        and are_leaves(record.get("leaves"))
        and are_metrics(record.get("metrics"))
        and all(isinstance(record.get(item), dict) for item in ("data", "meta"))
        and isinstance(tree, list)
        and all(map(_is_node, tree))
    )


def _is_node(node: Any) -> bool:
    """Whether this is a path of a key or more with a kind, as `_tree` tells."""
    if not isinstance(node, dict) or not isinstance(node.get("kind"), str):
        return False
    path = node.get("path")
    return (
        isinstance(path, list)
        and 0 < len(path) < _DEEPEST
        and all(isinstance(key, list) and len(key) == 2 for key in path)
        and all(isinstance(key, str) and type(kind) is int for key, kind in path)
    )


def _device_array(
    folder: Path, name: str, arrays: Mapping[str, np.ndarray], leaf: Mapping[str, Any]
) -> jax.Array:
    """The array of a leaf; raises CheckpointError if it is not the one that was converted."""
    host = arrays[_dotted(name)]
    if jax.dtypes.canonicalize_dtype(host.dtype) != host.dtype:
        raise CheckpointError(f"{folder}: {name} is {host.dtype}; set JAX_ENABLE_X64=1.")
    array = jnp.asarray(host)
    if leaf["dtype"].startswith("key<"):
        if leaf["dtype"] not in _IMPLEMENTATIONS:
            raise CheckpointError(
                f"{folder}: {name} is a {leaf['dtype']}, which is not known here."
            )
        try:
            array = jax.random.wrap_key_data(array, impl=_IMPLEMENTATIONS[leaf["dtype"]])
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{folder}: {name} is no {leaf['dtype']}: {error}.") from error
    same = str(array.dtype) == leaf["dtype"] and list(array.shape) == leaf["shape"]
    if not same or digest({"leaf": array})["leaf"] != leaf["digest"]:
        raise CheckpointError(
            f"{folder / ARRAYS_FILE} is damaged: {name} is not the array that was converted. "
            "Convert the checkpoint again."
        )
    return array


def _dotted(name: str) -> str:
    return name.replace("/", ".")


def _tree(source: Path) -> list[dict[str, Any]]:
    """Path and kind of every node without children: `{"path": [[key, type], ...], "kind": text}`."""
    described = json.loads((source / "state" / "_METADATA").read_bytes())["tree_metadata"]
    return [
        {
            "path": [[str(key["key"]), key["key_type"]] for key in node["key_metadata"]],
            "kind": node["value_metadata"]["value_type"],
        }
        for node in described.values()
    ]


def _nest(folder: Path, tree: list[dict[str, Any]], state: Mapping[str, jax.Array]) -> dict:
    """The state as dicts and lists, which Orbax stores as it does named tuples and tuples."""
    root: dict[str, Any] = {}
    sequences: set[tuple[str, ...]] = set()
    for entry in tree:
        keys = tuple(key for key, _ in entry["path"])
        sequences |= {keys[:i] for i, (_, kind) in enumerate(entry["path"]) if kind == _SEQUENCE}
        node = root
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        name = "/".join(keys)
        if name not in state and entry["kind"] not in _EMPTY:
            raise CheckpointError(f"{folder}: {RECORD_FILE} has a {entry['kind']} at {name}.")
        node[keys[-1]] = state[name] if name in state else _EMPTY[entry["kind"]]
    return _with_lists(root, (), sequences)


def _with_lists(node: Any, path: tuple[str, ...], sequences: set[tuple[str, ...]]) -> Any:
    if not isinstance(node, dict):
        return node
    children = {key: _with_lists(value, (*path, key), sequences) for key, value in node.items()}
    if path in sequences:
        return [children[key] for key in sorted(children, key=int)]
    return children
