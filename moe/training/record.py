"""The record of a checkpoint: what each of its parts must read back as."""

from collections.abc import Mapping
import hashlib
import json
import math
from typing import Any

import jax
from jaxtyping import PyTree
import numpy as np

from moe.errors import DivergedError
from moe.training.digest import Summary, leaf_names, summaries

FORMAT = 2
# Top-level entries of the state that a format lacks.
NEW_SINCE = {1: ("guard",), 2: ()}
_PARTS = {"format", "leaves", "data", "meta", "metrics"}


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
        DivergedError: If a value of the state is not finite.
    """
    for name, leaf in zip(leaf_names(state), jax.tree.leaves(state), strict=True):
        if not isinstance(leaf, jax.Array):
            raise TypeError(f"state: {name} is a {type(leaf).__name__}, not a jax.Array.")
    leaves, found = describe(state), summaries(state)
    _check_finite(leaves, found)
    for name, summary in found.items():
        leaves[name]["digest"] = summary.digest
    return sign(
        {
            "format": FORMAT,
            "leaves": leaves,
            "data": sha256(data_state),
            "meta": sha256(meta),
            "metrics": finite_numbers(metrics),
        }
    )


def _check_finite(leaves: dict[str, dict], found: dict[str, Summary]) -> None:
    wrong = {name: summary.not_finite for name, summary in found.items() if summary.not_finite}
    if wrong:
        name, count = next(iter(wrong.items()))
        more = f", and {len(wrong) - 1} more leaves have such values" if len(wrong) > 1 else ""
        raise DivergedError(
            f"the state is not finite: {count} of the {math.prod(leaves[name]['shape'])} values "
            f"of {name} are NaN or infinite{more}. Such a state is never written; the checkpoints "
            "before it are as they were. Lower optimizer.learning_rate or clip the gradient."
        )


def finite_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Those metrics that are one finite number."""
    numbers = {key: float(value) for key, value in metrics.items() if np.ndim(value) == 0}
    return {key: value for key, value in numbers.items() if math.isfinite(value)}


def is_ours(record: Any) -> bool:
    """Whether a record was made here, in a format of today or not, and its checksum holds.

    Who changes a record can renew its checksum: what a format that is read here says is looked at, too.
    """
    if not is_signed(record) or not set(record) >= _PARTS or type(record["format"]) is not int:
        return False
    if not is_known(record):
        return True
    texts = all(isinstance(record[item], str) for item in ("data", "meta"))
    return texts and are_leaves(record["leaves"]) and are_metrics(record["metrics"])


def are_leaves(value: Any) -> bool:
    """Whether this is what `describe` tells of leaves, with a digest each."""
    return isinstance(value, dict) and all(
        isinstance(leaf, dict)
        and type(leaf.get("digest")) is int
        and isinstance(leaf.get("dtype"), str)
        and isinstance(leaf.get("shape"), list)
        and all(type(size) is int and size >= 0 for size in leaf["shape"])
        for leaf in value.values()
    )


def are_metrics(value: Any) -> bool:
    """Whether this is what `finite_numbers` makes."""
    return isinstance(value, dict) and all(
        isinstance(number, float) and math.isfinite(number) for number in value.values()
    )


def is_known(record: dict[str, Any]) -> bool:
    """Whether the format of a record is one that is read here."""
    return record["format"] in NEW_SINCE


def sign(content: dict[str, Any]) -> dict[str, Any]:
    """`content` with a checksum of itself."""
    return content | {"sha256": sha256(content)}


def is_signed(content: Any) -> bool:
    """Whether the checksum that `sign` added holds."""
    if not isinstance(content, dict):
        return False
    rest = {key: value for key, value in content.items() if key != "sha256"}
    try:
        return content.get("sha256") == sha256(rest)
    except RecursionError:  # deeper than anything that `sign` could write
        return False


def is_as_saved(value: Any, expected: str) -> bool:
    """Whether `data` or `meta` is a JSON object with the hash that the record has of it."""
    return isinstance(value, dict) and sha256(value) == expected


def first_difference(leaves: dict, abstract_state: PyTree, *, partial: bool) -> str | None:
    """The first leaf whose presence, shape or dtype differs, in words; None if all agree.

    Args:
        leaves: Of the record.
        abstract_state: Tree of `jax.ShapeDtypeStruct`.
        partial: Whether top-level entries that only the record has are no difference. Inside an
            entry that both have, every leaf counts: with one left out it would be another model.
    """
    wanted = describe(abstract_state)
    others = [name for name in leaves if name not in wanted]
    if partial:
        others = [name for name in others if name.split("/")[0] in abstract_state]
    names = list(wanted) + others
    for name in names:
        stored, asked = _leaf_text(leaves.get(name)), _leaf_text(wanted.get(name))
        if stored != asked:
            return f"{name} is {stored} in the checkpoint and {asked} here"
    return None


def added_entries(
    record: dict, abstract_state: Mapping[str, PyTree], fresh: Mapping[str, PyTree]
) -> dict[str, PyTree]:
    """Entries of a state that the format of a record lacks, on the shardings asked for.

    Args:
        record: Of a known format.
        abstract_state: Tree of `jax.ShapeDtypeStruct` with shardings.
        fresh: Arrays for such entries, by their name at the top level.

    Raises:
        TypeError: If the leaves of `fresh` are not those of `abstract_state`.
    """
    stored = {name.split("/")[0] for name in record["leaves"]}
    names = [
        name
        for name in NEW_SINCE[record["format"]]
        if name in abstract_state and name in fresh and name not in stored
    ]
    for name in names:
        if describe(fresh[name]) != describe(abstract_state[name]):
            raise TypeError(f"fresh: {name} has not the leaves of abstract_state.")
    return {
        name: jax.tree.map(
            lambda leaf, like: jax.device_put(leaf, like.sharding),
            fresh[name],
            abstract_state[name],
        )
        for name in names
    }


def as_read_back(value: dict) -> dict:
    """`value` after a round through JSON: lists for tuples, text for keys."""
    return json.loads(json.dumps(value))


def sha256(value: Any) -> str:
    """Of the JSON text with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def describe(tree: PyTree) -> dict[str, dict]:
    """Shape and dtype of each leaf by name."""
    leaves = zip(leaf_names(tree), jax.tree.leaves(tree), strict=True)
    return {name: {"shape": list(x.shape), "dtype": str(x.dtype)} for name, x in leaves}


def _leaf_text(leaf: dict | None) -> str:
    return "absent" if leaf is None else f"{leaf['dtype']}{leaf['shape']}"
