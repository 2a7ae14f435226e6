"""The record of a checkpoint: what each of its parts must read back as."""

from collections.abc import Mapping
import hashlib
import json
import math
from typing import Any

import jax
from jaxtyping import PyTree
import numpy as np

from moe.training.digest import digest, leaf_names

_FORMAT = 1


def make_record(
    state: PyTree, data_state: dict, meta: dict, metrics: Mapping[str, Any]
) -> dict[str, Any]:
    """JSON that names every leaf with shape, dtype and digest; `sha256` is that of all the rest.

    Args:
        state: Tree of `jax.Array`.
        data_state: As read back.
        meta: As read back.
        metrics: Only finite numbers are recorded.

    Raises:
        TypeError: If a leaf is not a `jax.Array`; its name is in the message.
    """
    for name, leaf in zip(leaf_names(state), jax.tree.leaves(state), strict=True):
        if not isinstance(leaf, jax.Array):
            raise TypeError(f"state: {name} is a {type(leaf).__name__}, not a jax.Array.")
    leaves = _describe(state)
    for name, value in digest(state).items():
        leaves[name]["digest"] = value
    numbers = {key: float(value) for key, value in metrics.items() if np.ndim(value) == 0}
    record = {
        "format": _FORMAT,
        "leaves": leaves,
        "data": sha256(data_state),
        "meta": sha256(meta),
        "metrics": {key: value for key, value in numbers.items() if math.isfinite(value)},
    }
    return record | {"sha256": sha256(record)}


def is_intact(record: dict) -> bool:
    """Whether this is a record of this format whose checksum holds."""
    rest = {key: value for key, value in record.items() if key != "sha256"}
    return rest.get("format") == _FORMAT and record.get("sha256") == sha256(rest)


def first_difference(leaves: dict, abstract_state: PyTree, *, partial: bool) -> str | None:
    """The first leaf whose presence, shape or dtype differs, in words; None if all agree.

    Args:
        leaves: Of the record.
        abstract_state: Tree of `jax.ShapeDtypeStruct`.
        partial: Whether top-level entries that only the record has are no difference. Inside an
            entry that both have, every leaf counts: with one left out it would be another model.
    """
    wanted = _describe(abstract_state)
    others = [name for name in leaves if name not in wanted]
    if partial:
        others = [name for name in others if name.split("/")[0] in abstract_state]
    names = list(wanted) + others
    for name in names:
        stored, asked = _leaf_text(leaves.get(name)), _leaf_text(wanted.get(name))
        if stored != asked:
            return f"{name} is {stored} in the checkpoint and {asked} here"
    return None


def as_read_back(value: dict) -> dict:
    """`value` after a round through JSON: lists for tuples, text for keys."""
    return json.loads(json.dumps(value))


def sha256(value: dict) -> str:
    """Of the JSON text with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _describe(tree: PyTree) -> dict[str, dict]:
    leaves = zip(leaf_names(tree), jax.tree.leaves(tree), strict=True)
    return {name: {"shape": list(x.shape), "dtype": str(x.dtype)} for name, x in leaves}


def _leaf_text(leaf: dict | None) -> str:
    return "absent" if leaf is None else f"{leaf['dtype']}{leaf['shape']}"
