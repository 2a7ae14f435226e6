"""The sweep file: read, and checked before anything starts.

`get_config()` of a sweep file returns a ConfigDict (`ConfigDict(convert_dict=False)`, because the
keys of `space` and `overrides` have dots) with the keys of `DEFAULTS`.
"""

from collections.abc import Iterator, Mapping, Sequence
import copy
import math
from pathlib import Path
import runpy
from typing import Any

import ml_collections
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from moe import cli
from moe import config as config_lib
from moe.config_values import apply_override
from moe.errors import ConfigError
from moe.sweep.space import DIRECTIONS, PRUNERS, SAMPLERS, Sweep, grid_values, to_text

DEFAULTS: dict[str, Any] = {
    "name": None,  # of the study in the storage; None: the sweep file's name
    "base": None,  # path of the base config, with an optional `:argument`
    "overrides": {},  # dotted key -> value, for all trials
    "space": {},  # dotted key -> {"values": [...]}, {"low", "high", "log"} or {"low", "high", "step"}
    "sampler": "grid",
    "trials": None,  # points to try; a grid has its own number
    "pruner": "none",
    "seeds": (0,),
    "metric": "bits_per_byte",
    "split": "valid",
    "direction": "minimize",
    "sampler_seed": 0,
}
LEAF_KEYS = ("values", "low", "high", "log", "step")


def load_sweep(path: str, overrides: Sequence[tuple[str, str]] = ()) -> Sweep:
    """Reads and checks a sweep file and its base config.

    Args:
        path: a Python file with `get_config()`, or `file.py:argument`.
        overrides: (dotted key, text) pairs from the command line, added to the file's.

    Raises:
        ConfigError: a missing file, an unknown key, or a space that cannot be searched.
    """
    given = read_file(path, DEFAULTS, ("overrides", "space"))
    file = Path(path.partition(":")[0])
    space = {key: _distribution(key, leaf) for key, leaf in given["space"].items()}
    if not space:
        raise ConfigError(
            f"{path}: space is empty. Give at least one config key and its values, for example "
            '{"router.k": {"values": [1, 2, 4]}}.'
        )
    fixed = {key: to_text(value) for key, value in given["overrides"].items()} | dict(overrides)
    _check_keys(given, space, fixed)
    base = _check_base(given["base"], fixed, space)
    return Sweep(
        name=str(given["name"] or file.stem),
        base=given["base"],
        overrides=fixed,
        space=space,
        sampler=_one_of("sampler", given["sampler"], SAMPLERS),
        points=_count_points(given, space),
        pruner=_one_of("pruner", given["pruner"], PRUNERS),
        seeds=check_seeds(given["seeds"]),
        metric=str(given["metric"]),
        split=str(given["split"]),
        direction=_one_of("direction", given["direction"], DIRECTIONS),
        sampler_seed=int(given["sampler_seed"]),
        steps=base.steps,
        evaluate_every=base.evaluation.every,
    )


def read_file(path: str, defaults: Mapping[str, Any], dicts: Sequence[str]) -> dict[str, Any]:
    """What `get_config()` of a file returns, with defaults for the keys that it leaves out.

    Args:
        path: a Python file, or `file.py:argument`.
        defaults: every key that there is.
        dicts: keys that hold a dict.

    Raises:
        ConfigError: no such file or function, or a key that there is not.
    """
    file, _, argument = path.partition(":")
    if not Path(file).is_file():
        raise ConfigError(f"--config={path}: there is no file {file!r}.")
    get_config = runpy.run_path(file).get("get_config")
    if not callable(get_config):
        raise ConfigError(f"--config={path}: {file} defines no function get_config().")
    config = get_config(argument) if argument else get_config()
    if not isinstance(config, ml_collections.ConfigDict | Mapping):
        raise ConfigError(f"--config={path}: get_config() returned no ConfigDict.")
    return _with_defaults(path, dict(config.items()), defaults, dicts)


def _with_defaults(
    path: str, given: dict[str, Any], defaults: Mapping[str, Any], dicts: Sequence[str]
) -> dict[str, Any]:
    for key in given:
        if key not in defaults:
            raise ConfigError(
                f"{path}: a sweep has no key {key!r}; {config_lib.nearest(key, defaults)}."
            )
    for key in dicts:
        if key in given and not isinstance(given[key], Mapping):
            raise ConfigError(
                f"{path}: {key} is {given[key]!r}; it must be a dict, which "
                "ConfigDict(convert_dict=False) keeps as it is, dots in its keys too."
            )
    if not isinstance(given.get("base"), str):
        raise ConfigError(f"{path}: base={given.get('base')!r} must be the path of a config file.")
    return copy.deepcopy(dict(defaults)) | given


def _distribution(key: str, leaf: Any) -> BaseDistribution:
    where = f"space[{key!r}]"
    if not isinstance(leaf, Mapping):
        raise ConfigError(f'{where}={leaf!r} must be a dict such as {{"values": [1, 2, 4]}}.')
    for name in leaf:
        if name not in LEAF_KEYS:
            raise ConfigError(
                f"{where} has no key {name!r}; {config_lib.nearest(name, LEAF_KEYS)}."
            )
    if "values" in leaf:
        if len(leaf) > 1:
            raise ConfigError(f"{where}={dict(leaf)} has values and a range: keep one of them.")
        return CategoricalDistribution(_values(where, leaf["values"]))
    return _range(where, dict(leaf))


def _values(where: str, values: Any) -> list[Any]:
    if not isinstance(values, list | tuple) or not values:
        raise ConfigError(f"{where}: values={values!r} must be a list with at least one value.")
    plain = [to_text(v) if isinstance(v, list | tuple) else v for v in values]
    if not all(v is None or isinstance(v, bool | int | float | str) for v in plain):
        raise ConfigError(f"{where}: values={values!r} must be numbers, texts, booleans or None.")
    if min(len(set(plain)), len({to_text(v) for v in plain})) < len(plain):
        raise ConfigError(f"{where}: values={values!r} has one value twice: name each once.")
    return plain


def _range(where: str, leaf: dict[str, Any]) -> BaseDistribution:
    low, high = _number(where, leaf, "low"), _number(where, leaf, "high")
    log, step = leaf.get("log", False), leaf.get("step")
    if low > high:
        raise ConfigError(f"{where}: low={low} is above high={high}: swap them.")
    if log and low <= 0:
        raise ConfigError(f"{where}: low={low} has no logarithm: log=True needs low > 0.")
    if log and step is not None:
        raise ConfigError(f"{where}: log=True and step={step} exclude each other: keep one.")
    if step is not None and _number(where, leaf, "step") <= 0:
        raise ConfigError(f"{where}: step={step} must be greater than 0.")
    size = 1 if step is None else step
    if isinstance(low, int) and isinstance(high, int) and isinstance(size, int):
        return IntDistribution(low, low + (high - low) // size * size, log=bool(log), step=size)
    if step is not None:
        # Optuna wants `high` on the grid, which rounding may miss by a little.
        high = float(f"{low + math.floor((high - low) / step + 1e-9) * step:.12g}")
    return FloatDistribution(float(low), float(high), log=bool(log), step=step and float(step))


def _number(where: str, leaf: dict[str, Any], name: str) -> int | float:
    value = leaf.get(name)
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if not plain or not abs(value) < 2**63 or not math.isfinite(value):
        raise ConfigError(
            f"{where}: {name}={value!r} must be a finite number; a range is given by low and high."
        )
    return value


def _check_keys(
    given: Mapping[str, Any], space: Mapping[str, Any], fixed: Mapping[str, str]
) -> None:
    for key in fixed:
        if key in space:
            raise ConfigError(
                f"{key!r} is in space and fixed to {fixed[key]!r} by an override: keep one of them."
            )
    if "seed" in space or "seed" in fixed:
        raise ConfigError(f"the seed is set by seeds={given['seeds']!r}: take it out of the space.")


def _check_base(
    base: str, fixed: Mapping[str, str], space: Mapping[str, BaseDistribution]
) -> config_lib.ConfigDict:
    """Loads the base config and tries every key and value of the space on it, one at a time.

    The options of a router are keys only under that router, so each is tried under every router
    of the space. Combinations are left to the trials: one that cannot work is a failed trial.
    """
    names = space.get("router.name")
    routers = names.choices if isinstance(names, CategoricalDistribution) else [None]
    configs = [cli.load_config(base, [*fixed.items(), *_router(name)]) for name in routers]
    for key, distribution in space.items():
        if key != "router.name":
            for value in _probes(distribution):
                _try_on_any(configs, key, to_text(value))
    return configs[0]


def _router(name: Any) -> list[tuple[str, str]]:
    return [] if name is None else [("router.name", str(name))]


def _probes(distribution: BaseDistribution) -> Iterator[Any]:
    if isinstance(distribution, CategoricalDistribution):
        yield from distribution.choices
    elif isinstance(distribution, IntDistribution | FloatDistribution):
        yield from (distribution.low, distribution.high)


def _try_on_any(configs: Sequence[config_lib.ConfigDict], key: str, text: str) -> None:
    refused = None
    for config in configs:
        try:
            apply_override(copy.deepcopy(config), key, text)
        except ConfigError as error:
            refused = error
        else:
            return
    if refused is not None:
        raise ConfigError(f"space[{key!r}]: {refused}") from refused


def _count_points(given: Mapping[str, Any], space: Mapping[str, BaseDistribution]) -> int:
    trials = given["trials"]
    if given["sampler"] == "grid":
        size = math.prod(len(grid_values(key, d)) for key, d in space.items())
        if trials not in (None, size):
            raise ConfigError(
                f"trials={trials!r} but the grid has {size} points: leave trials out, or set "
                "sampler='random'."
            )
        return size
    if isinstance(trials, bool) or not isinstance(trials, int) or trials < 1:
        raise ConfigError(
            f"trials={trials!r} must be a whole number of at least 1 with sampler={given['sampler']!r}."
        )
    return trials


def check_seeds(seeds: Any) -> tuple[int, ...]:
    """Different whole numbers, none below 0; raises ConfigError for anything else."""
    if (
        not isinstance(seeds, list | tuple)
        or not seeds
        or not all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in seeds)
        or len(set(seeds)) < len(seeds)
    ):
        raise ConfigError(
            f"seeds={seeds!r} must be a list of different whole numbers, none below 0."
        )
    return tuple(seeds)


def _one_of(key: str, value: Any, valid: Sequence[str]) -> str:
    if value not in valid:
        raise ConfigError(
            f"{key}={value!r} is none of {', '.join(valid)}; {config_lib.nearest(str(value), valid)}."
        )
    return value
