"""Values of config keys: read from text, and checked against the type of what they replace."""

import ast
from collections.abc import Iterable
import math
import sys
from typing import Any

from moe.config import ConfigDict, dotted_keys, nearest
from moe.errors import ConfigError

LARGEST = int(sys.float_info.max)  # whole number that may stand for a float

# Keys that may be None, with the types of what else they hold.
OPTIONAL: dict[str, tuple[type, ...]] = {
    "model.logit_softcap": (float,),
    "attention.query_block": (int,),
    "dispatch.capacity_factor": (float,),
    "dispatch.eval_capacity_factor": (float,),
    "dispatch.group": (int,),
    "dispatch.buffer_factor": (float,),
    "data.vocab_size": (int,),
    "data.weights": (dict,),
    "data.files": (str, dict),
    "data.directory": (str,),
    "data.input_feature": (str,),
    "data.target_feature": (str,),
    "data.stride": (int,),
    "data.sample_rate": (int,),
    "data.corrupt": (str,),
    "evaluation.batches": (int,),
    "guards.spike_sigmas": (float,),
    "evaluation.primary": (str,),
    "evaluation.decode_examples": (int,),
    "evaluation.generalisation": (dict,),
}


def apply_override(config: ConfigDict, key: str, text: str) -> None:
    """Sets one value from the command line, keeping the type of what it replaces.

    Args:
        config: changed in place.
        key: dotted, without the leading `config.`.
        text: a Python literal, or the bare text of a string; `none` and `null` are None.

    Raises:
        ConfigError: no such key, or a value of another type.
    """
    *sections, last = key.split(".")
    node: Any = config
    for section in sections:
        node = node.get(section) if isinstance(node, ConfigDict) else None
    found = isinstance(node, ConfigDict) and last in node
    if not found or (isinstance(node[last], ConfigDict) and key not in OPTIONAL):
        raise ConfigError(
            f"unknown config key {key!r} (--config.{key}={text}); {nearest(key, dotted_keys(config))}."
        )
    value = _parse(key, text, node[last])
    with node.ignore_type():  # a mapping may give way to a text
        node[last] = value


def _parse(key: str, text: str, old: Any) -> Any:
    wanted = OPTIONAL.get(key, () if old is None else (type(old),))
    if wanted == (str,) and (key not in OPTIONAL or text.lower() not in ("none", "null")):
        return text
    special = {"none": None, "null": None, "true": True, "false": False}
    try:
        value = special[text.lower()] if text.lower() in special else ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, OverflowError):  # {[]: 1}; 9...9+1j
        value = text
    except (RecursionError, MemoryError) as error:
        raise ConfigError(
            f"config key {key!r} is given a value of {len(text)} characters that is nested too deeply to "
            f"be read: {text[:60]!r}... Give a plain value."
        ) from error
    if tuple in wanted and isinstance(value, str | list):
        value = tuple(value.split(",")) if isinstance(value, str) else tuple(value)
    if float in wanted and type(value) is int:
        value = float(value) if abs(value) <= LARGEST else math.inf  # as 1e999 is
    check_type(key, value, old)
    if isinstance(value, dict):
        _check_names(key, value)
    return value


def _check_names(key: str, mapping: dict[Any, Any]) -> None:
    """Raises ConfigError for a mapping that cannot be a section of a config."""
    for name, value in mapping.items():
        if not isinstance(name, str) or "." in name or name in dir(object):
            raise ConfigError(
                f"config key {key!r} is given a mapping with the key {name!r}, which cannot be part of a "
                "dotted key. Give keys that are texts without dots."
            )
        if isinstance(value, dict):
            _check_names(key, value)


def check_type(key: str, value: Any, old: Any) -> None:
    """Checks that `value` may stand where `old` stands.

    Args:
        key: dotted; those of `OPTIONAL` have types of their own.
        value: the new one. A whole number may stand for a float.
        old: the default; if it is None and the key is not of `OPTIONAL`, anything goes.

    Raises:
        ConfigError: a value of another type.
    """
    if key in OPTIONAL:
        valid: tuple[type, ...] = (*OPTIONAL[key], type(None))
    elif old is None:
        return
    else:
        valid = (type(old),)
    kind = dict if isinstance(value, ConfigDict) else type(value)
    if kind in valid or (kind is int and float in valid and abs(value) <= LARGEST):
        return
    names = " or ".join("None" if one is type(None) else one.__name__ for one in valid)
    raise ConfigError(
        f"config key {key!r} holds {names}; {value!r} is of type {kind.__name__}. "
        f"Give a value of type {names}."
    )


def check_known_keys(config: ConfigDict, schema: ConfigDict, free: tuple[str, ...]) -> None:
    """Refuses keys that the defaults do not have, and values of another type.

    Args:
        config: what a config file returned.
        schema: `default_config()`.
        free: sections whose keys are checked elsewhere (options of a router, text domains).
    """
    known = dict(_flat(schema))
    for key, value in _flat(config):
        if any(key.startswith(f + ".") for f in free):
            continue
        if isinstance(value, ConfigDict) and any(k.startswith(f"{key}.") for k in known):
            continue  # an empty section: all its keys get their defaults
        if key not in known:
            raise ConfigError(f"unknown config key {key!r}; {nearest(key, known)}.")
        check_type(key, value, known.get(key))


def _flat(config: ConfigDict, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, ConfigDict) and len(value):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
