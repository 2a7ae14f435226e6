"""From the command line to a checked config, and from an exception to an exit code."""

from collections.abc import Callable, Sequence
import contextlib
import os
import runpy
import sys
import traceback
from typing import Any

from absl import flags
import jax
import ml_collections

from moe import config as config_lib
from moe.config import ConfigDict
from moe.config_rules import check_numbers
from moe.config_values import apply_override, check_known_keys, check_type
from moe.errors import ConfigError, UserError
from moe.model.attention_table import find_attention
from moe.parallel import distributed
from moe.routing.table import router_options
from moe.training.leaving import leave_in_time


def load_config(path: str, overrides: Sequence[tuple[str, str]] = ()) -> ConfigDict:
    """The config of a file with the overrides of the command line, every key filled in and checked.

    Args:
        path: a Python file with `get_config()`, or `file.py:argument` for `get_config(argument)`.
        overrides: pairs of a dotted key and a value in text.

    Raises:
        ConfigError: a missing file, an unknown key, a value of another type or outside its range.
    """
    file, _, argument = path.partition(":")
    if not os.path.isfile(file):
        raise ConfigError(f"--config={path}: there is no file {file!r}.")
    get_config = runpy.run_path(file).get("get_config")
    if not callable(get_config):
        raise ConfigError(f"--config={path}: {file} defines no function get_config().")
    config = get_config(argument) if argument else get_config()
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(f"--config={path}: get_config() returned no ConfigDict.")
    return complete_config(config, overrides)


def saved_config(saved: dict[str, Any], overrides: Sequence[tuple[str, str]] = ()) -> ConfigDict:
    """`complete_config` of what a config.json holds, which may be a stranger's: values, never code.

    The paths among its values, `data.files` and `data.directory`, are of this machine, and are read.

    Raises:
        ConfigError: also for what no config file could have made.
    """
    try:
        config = ConfigDict(saved)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"config.json holds no config of a run: {error}. Give the workdir of a run of train.py."
        ) from error
    return complete_config(config, overrides)


def complete_config(config: ConfigDict, overrides: Sequence[tuple[str, str]] = ()) -> ConfigDict:
    """Fills in options of what has a name, applies overrides, checks what needs nothing but the config."""
    sections = config.to_dict()
    model = sections.get("model")
    if isinstance(model, dict) and isinstance(model.get("pattern"), list):  # as JSON gives it back
        model["pattern"] = tuple(model["pattern"])
    config = ConfigDict(sections)
    check_known_keys(
        config,
        config_lib.default_config(),
        free=(*NAMED, "data.files", "data.weights", "evaluation.generalisation"),
    )
    _fill_missing(config, config_lib.default_config())
    for section in NAMED:
        check_type(f"{section}.name", config[section].get("name"), "")
    for key, text in overrides:
        section, _, last = key.partition(".")
        if section in NAMED and last == "name":
            _switch(config, section, text)
    for section in NAMED:
        _fill(config, section)
    config.lock()
    for key, text in overrides:
        apply_override(config, key, text)
    check_numbers(config)
    return config


def _fill_missing(config: ConfigDict, schema: ConfigDict) -> None:
    """Keys that the run of an older version had no value for get their default."""
    for key, value in schema.items():
        if key not in config:
            config[key] = value
        elif (
            isinstance(value, ConfigDict)
            and key not in NAMED
            and isinstance(config[key], ConfigDict)
        ):
            _fill_missing(config[key], value)


def _router_keys(name: str) -> dict[str, Any]:
    return {"k": 1, "jitter": 0.0, **router_options(name)}


def _attention_keys(name: str) -> dict[str, Any]:
    return find_attention(name).options


# Sections that choose by `name`: their keys with defaults by that name, and what survives another name.
NAMED: dict[str, tuple[Callable[[str], dict[str, Any]], tuple[str, ...]]] = {
    "router": (_router_keys, ("k",)),
    "attention": (_attention_keys, ()),
}


def _switch(config: ConfigDict, section: str, name: str) -> None:
    """Another name: its options start from its defaults."""
    if name != config[section].name:
        keys, kept = NAMED[section]
        values = keys(name) | {key: config[section][key] for key in kept}
        config_lib.replace_section(config, section, {"name": name, **values})


def _fill(config: ConfigDict, section: str) -> None:
    given = config[section].to_dict()
    known = {"name": "", **NAMED[section][0](given["name"])}
    for key in given:
        if key in known:
            check_type(f"{section}.{key}", given[key], known[key])
        else:
            raise ConfigError(
                f"{section}.{key}={given[key]!r}: {section} {given['name']!r} has no such option; "
                f"{config_lib.nearest(key, known)}."
            )
    config_lib.replace_section(config, section, {**known, **given})


def split_overrides(argv: Sequence[str]) -> tuple[list[str], str | None, list[tuple[str, str]]]:
    """Separates `--config=...` and `--config.key=value` from the other arguments.

    Of what is given twice the last wins, as with other flags: a script that ends in "$@" can be overridden.
    """
    rest, path, overrides = [], None, []
    for argument in argv:
        name, has_value, value = argument.partition("=")
        name = name.removeprefix("-").removeprefix("-")
        if not argument.startswith("-") or name.split(".")[0] != "config":
            rest.append(argument)
        elif not has_value:
            raise ConfigError(f"{argument}: write --{name}=VALUE in one argument.")
        elif name == "config":
            path = value
        else:
            overrides.append((name.removeprefix("config."), value))
    return rest, path, overrides


def parse_flags(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """Parses absl flags; a mistake is a ConfigError. `--help` prints them and ends the program."""
    if {"-h", "-help", "--help"} & set(argv):
        print(sys.modules["__main__"].__doc__ or "")  # noqa: T201
        print("--config.KEY=VALUE changes one key of the config; the last of several wins.\n")  # noqa: T201
        print(values.get_help(include_special_flags=False).strip())  # noqa: T201
        raise SystemExit(0)
    try:
        left = values(list(argv))
    except flags.Error as error:
        raise ConfigError(f"{error}.") from error
    if len(left) > 1:
        raise ConfigError(f"unexpected argument {left[1]!r}: flags are written --name=value.")


def require_flags(**given: object) -> None:
    """Raises ConfigError for a flag that was not given."""
    for name, value in given.items():
        if value is None:
            raise ConfigError(f"--{name}=... is missing; --help lists the flags.")


def run(main: Callable[[list[str]], int | None]) -> None:
    """Runs an entry point; an error meant for the user becomes one paragraph and its exit code."""
    code = 1  # of errors that are not meant for the user
    try:
        code = main(sys.argv) or 0
    except UserError as error:
        code = error.exit_code
        with contextlib.suppress(OSError):  # the code is told where the words find no room
            told = [f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())]
            print(*told, sep="\n", file=sys.stderr)  # noqa: T201
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
    finally:
        leave_in_time(code)
    distributed.leave_on_failure(code)
    sys.exit(code)
