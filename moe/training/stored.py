"""Stored leaves read one at a time, without the model that they belong to and without Orbax.

In a run of several processes Orbax's restore is for all of them at once; here one reads alone.
"""

from collections.abc import Iterator
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore

from moe.training import manifest
from moe.training.digest import digest
from moe.training.record import is_as_saved, is_known
from moe.training.step_folder import flaw, read_record


def read_leaf(folder: Path, name: str) -> np.ndarray:
    """One leaf of a step as it is stored: bfloat16 by `ml_dtypes`, keys as their uint32 data.

    Args:
        folder: `<directory>/<step>`.
        name: Of the record, `params/layers/gate/kernel`.

    Raises:
        ValueError: If it is missing or cannot be decoded.
    """
    base = {"driver": "file", "path": f"{folder / 'state'}/"}
    kvstore = {"driver": "ocdbt", "base": base, "path": name.replace("/", ".") + "/"}
    store = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, open=True, read=True)
    return store.result().read().result()


def read_json(folder: Path, item: str) -> Any:
    """`data` or `meta` of a step. Raises OSError or ValueError if it cannot be read."""
    return json.loads((folder / item / "metadata").read_bytes())


def leaf_flaw(folder: Path, name: str, leaf: dict[str, Any]) -> str | None:
    """What of a stored leaf is not as its record says; None if it reads back bit for bit.

    Args:
        folder: Of the step.
        name: Of the leaf.
        leaf: Its `shape`, `dtype` and `digest`.
    """
    try:
        array = read_leaf(folder, name)
    except (ValueError, OSError) as error:
        return f"{name} cannot be read: {str(error).splitlines()[0]}"
    is_key = leaf["dtype"].startswith("key<")
    if str(array.dtype) != ("uint32" if is_key else leaf["dtype"]):
        return f"{name} is {array.dtype}, not {leaf['dtype']}"
    if list(array.shape[:-1] if is_key else array.shape) != leaf["shape"]:
        return f"{name} has the shape {list(array.shape)}, not {leaf['shape']}"
    with jax.enable_x64(array.dtype.itemsize == 8):
        if digest({"leaf": jnp.asarray(array)})["leaf"] != leaf["digest"]:
            return f"the digest of {name} is not the one that was saved"
    return None


def content_flaws(folder: Path) -> Iterator[str]:
    """What of the leaves, `data` and `meta` of a step is not as saved."""
    record = read_record(folder)
    if record is None or not is_known(record):
        yield "it has no intact record of a format that is read here"
        return
    for item in ("data", "meta"):
        try:
            if not is_as_saved(read_json(folder, item), record[item]):
                yield f"the contents of {item} are not those that were saved"
        except (OSError, ValueError, RecursionError) as error:
            yield f"{item} cannot be read: {error}"
    for name, leaf in record["leaves"].items():
        found = leaf_flaw(folder, name, leaf)
        if found is not None:
            yield found


def full_flaw(folder: Path) -> str | None:
    """`flaw` with every byte read: by the manifest, or by the leaves where there is none."""
    found = flaw(folder, thorough=True)
    if found is None and not (folder / manifest.MANIFEST_FILE).exists():
        found = next(content_flaws(folder), None)
    return found
