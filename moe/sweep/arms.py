"""The file of a comparison: named arms, each a config of its own, all trained with the same seeds.

`get_config()` returns a ConfigDict (`ConfigDict(convert_dict=False)`, because the keys of overrides have
dots) with the keys of `DEFAULTS`. A new arm is one more entry of `arms`.
"""

from collections.abc import Mapping, Sequence
import copy
import json
from pathlib import Path
import re
from typing import Any, NamedTuple

from moe import cli
from moe.config import ConfigDict, nearest
from moe.errors import ConfigError
from moe.model.build import model_spec
from moe.routing.table import ROUTERS
from moe.sweep.load import check_seeds, read_file
from moe.sweep.space import to_text

DEFAULTS: dict[str, Any] = {
    "name": None,  # title of the page; None: the file's name
    "base": None,  # path of the base config
    "overrides": {},  # dotted key -> value, for all arms
    "arms": {},  # name -> (argument of the base config, {dotted key: value}) or a dict of ARM_KEYS
    "reference": None,  # the arm that speeds and differences are relative to
    "seeds": (0, 1, 2),
    "in_domain": None,  # domain of the loss; None is all text
    "out_of_domain": None,  # domain that no arm is trained on; None: there is none
}
ARM_KEYS = ("argument", "overrides", "group")


class Arm(NamedTuple):
    """One thing that is compared.

    Attributes:
        name: of its folder and its row.
        config: path of the base config, with `:argument`.
        overrides: dotted key -> text.
        group: kind, which figures colour.
        router: name in the table, "" for a dense model.
        causality: of the router, "" for a dense model.
        settings: the complete config of its runs but the seed, as JSON gives it back.
    """

    name: str
    config: str
    overrides: Mapping[str, str]
    group: str
    router: str
    causality: str
    settings: dict[str, Any]


class Comparison(NamedTuple):
    """A checked comparison file."""

    name: str
    base: str
    arms: tuple[Arm, ...]
    reference: str
    seeds: tuple[int, ...]
    task: str
    in_domain: str | None
    out_of_domain: str | None


def load_comparison(path: str, overrides: Sequence[tuple[str, str]] = ()) -> Comparison:
    """Reads a comparison file and checks the config of every arm.

    Args:
        path: a Python file with `get_config()`, or `file.py:argument`.
        overrides: (dotted key, text) pairs from the command line, for all arms.

    Raises:
        ConfigError: a missing file, an unknown key, or an arm whose config cannot work.
    """
    given = read_file(path, DEFAULTS, ("overrides", "arms"))
    if not given["arms"]:
        raise ConfigError(
            f'{path}: arms is empty. Name at least one, for example {{"dense": ("dense", {{}})}}.'
        )
    shared = {key: to_text(value) for key, value in given["overrides"].items()} | dict(overrides)
    if "seed" in shared:
        raise ConfigError(f"the seed is set by seeds={given['seeds']!r}: do not override it.")
    arms = tuple(_arm(given["base"], n, arm, shared) for n, arm in given["arms"].items())
    names = [arm.name for arm in arms]
    reference = given["reference"] or names[0]
    if reference not in names:
        raise ConfigError(
            f"{path}: reference={reference!r} is no arm; {nearest(reference, names)}."
        )
    tasks = {arm.settings["task"]["name"] for arm in arms}
    if len(tasks) > 1:
        raise ConfigError(
            f"{path}: arms of the tasks {', '.join(sorted(tasks))} have losses of different things. "
            "Compare one task at a time."
        )
    return Comparison(
        name=str(given["name"] or Path(path.partition(":")[0]).stem),
        base=given["base"],
        arms=arms,
        reference=reference,
        seeds=check_seeds(given["seeds"]),
        task=tasks.pop(),
        in_domain=given["in_domain"],
        out_of_domain=given["out_of_domain"],
    )


def _arm(base: str, name: str, given: Any, shared: Mapping[str, str]) -> Arm:
    if not re.fullmatch(r"[\w.=+-]+", name):
        raise ConfigError(
            f"arms[{name!r}]: a name is letters, digits and any of . = + - _, as it names a folder."
        )
    entry = _entry(name, given)
    config = base + (f":{entry['argument']}" if entry["argument"] else "")
    overrides = {**shared, **{key: to_text(value) for key, value in entry["overrides"].items()}}
    try:
        complete = cli.load_config(config, list(overrides.items()))
        sparse = is_sparse(complete)
    except ConfigError as error:
        raise ConfigError(f"arms[{name!r}]: {error}") from error
    router = complete.router.name if sparse else ""
    return Arm(
        name,
        config,
        overrides,
        entry["group"],
        router,
        ROUTERS[router].causality if sparse else "",
        settings_of(complete),
    )


def _entry(name: str, given: Any) -> dict[str, Any]:
    if isinstance(given, Sequence) and not isinstance(given, str) and len(given) == 2:
        given = {"argument": given[0], "overrides": given[1]}
    if not isinstance(given, Mapping) or set(given) - set(ARM_KEYS):
        raise ConfigError(
            f"arms[{name!r}]={given!r} must be (argument, overrides) or a dict of {', '.join(ARM_KEYS)}."
        )
    return {"argument": "", "overrides": {}, "group": "other"} | dict(given)


def is_sparse(config: ConfigDict) -> bool:
    """Whether the model has a router; raises ConfigError for a model that cannot be built."""
    spec = model_spec(config, vocab_size=1, classes=int(config.task.name == "classify"))
    return spec.sparse_layers > 0


def settings_of(config: ConfigDict) -> dict[str, Any]:
    """What runs of one arm share: all keys but the seed, as JSON gives them back."""
    values = copy.deepcopy(config.to_dict())
    del values["seed"]
    return json.loads(json.dumps(values))


def difference(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> str | None:
    """The first dotted key that both settings have with another value; None if there is none."""
    for key in ours.keys() & theirs.keys():
        one, two = ours[key], theirs[key]
        if isinstance(one, Mapping) and isinstance(two, Mapping):
            found = difference(one, two, f"{prefix}{key}.")
            if found is not None:
                return found
        elif one != two:
            return prefix + key
    return None
