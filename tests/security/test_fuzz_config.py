"""Configs, overrides and command lines that nobody meant."""

import contextlib
import functools
import json

from hypothesis import strategies as st
import pytest

from moe import cli, config
from moe.config import ConfigDict
from moe.config_values import OPTIONAL, apply_override
from moe.data.corrupt import corrupt
from moe.data.example_data import _corruption
from moe.errors import ConfigError, UserError
from moe.evaluation import matrix
from tests.security.fuzz import check, mutated_json, scalars, sizes, some, values

KEYS = sorted(config.dotted_keys(config.default_config()))
SECTIONS = sorted(config.default_config().keys())
LITERALS = [
    *(
        "",
        "none",
        "null",
        "True",
        "1e999",
        "-1e999",
        "nan",
        "inf",
        "0x10",
        "1_000",
        "10**9",
        "{}",
        "[]",
    ),
    *(
        "{1: 2}",
        "{'a': {}}",
        "()",
        "(1,",
        "'",
        '"',
        "\\",
        "\0",
        "b'x'",
        "...",
        "{1,2}",
        "1j",
        "-",
        "+1",
    ),
    *("[" * 200, "(" * 5000, "-" * 5000, "{'a':" * 150 + "1" + "}" * 150, "9" * 5000, "[[" * 3000),
    *(
        "-" * 100_000 + "1",
        "not " * 3000 + "1",
        "lambda: 1",
        "__import__('os')",
        "f'{1}'",
        "1 if 1 else 2",
        "\ud800",
        "sparse,,",
    ),
    *("{[]: 1}", "{{}}", "9" * 400 + "+1j", "9" * 400),
]
texts = (
    st.sampled_from(LITERALS)
    | st.text(max_size=30)
    | values.map(repr)
    | st.text("[](){}'\",:0123456789eE.-+jb \\\n", max_size=40)
)
keys = (
    st.sampled_from([*KEYS, *SECTIONS, *OPTIONAL, "router.name", "attention.name"])
    | st.text(max_size=10)
    | st.sampled_from(
        [".", "..", "", "seed.x", "model.", ".seed", "data.files.a", "__class__", "a" * 5000]
    )
)


@functools.cache
def complete() -> ConfigDict:
    return cli.complete_config(config.default_config())


@sizes(150)
def test_overrides(examples):
    def holds(pairs):
        cli.complete_config(config.default_config(), pairs)

    check(examples, holds, st.lists(st.tuples(keys, texts), min_size=1, max_size=3))


@some(400, 40_000)
def test_one_override(examples):
    def holds(pair):
        apply_override(ConfigDict(complete().to_dict()), *pair)

    check(examples, holds, st.tuples(keys, texts))


@pytest.mark.parametrize("text", LITERALS)
@pytest.mark.parametrize("key", ["seed", "model.pattern", "data.files", "model.dropout"])
def test_literals_that_a_parser_chokes_on(key, text):
    # Not by hypothesis, which raises the limit of recursion.
    with contextlib.suppress(UserError):
        apply_override(ConfigDict(complete().to_dict()), key, text)


def test_a_whole_number_that_no_float_holds():
    with pytest.raises(ConfigError, match=r"'model\.dropout' holds float"):
        cli.saved_config({"model": {"dropout": 10**400}})


@pytest.mark.parametrize("name", ["a.b", "__class__", 1, None])
def test_names_that_no_section_can_hold(name):
    pair = ("data.weights", repr({"text": {name: 1}}))
    with pytest.raises(ConfigError, match=r"'data\.weights'.* texts without dots"):
        apply_override(config.default_config(), *pair)


def test_a_stranger_names_what_no_section_can_hold():
    with pytest.raises(ConfigError, match=r"config\.json holds no config"):
        cli.saved_config({"data": {"weights": {"__class__": 1}}})


@pytest.mark.parametrize("key", ["checkpoint.every", "data.skip_bad", "seed", "task.name"])
def test_nothing_in_place_of_a_value(key):
    *sections, last = key.split(".")
    given = {last: {}}
    for section in sections:
        given = {section: given}
    with pytest.raises(ConfigError, match=f"{key!r} holds"):
        cli.saved_config(given)


def test_an_empty_section_has_the_defaults():
    assert cli.saved_config({"model": {}, "data": {}}) == complete()


def test_a_config_file_with_numbers_for_keys():
    given = config.default_config().unlock()
    given.data.weights = {1: 2.0}
    with pytest.raises(ConfigError, match="unknown config key 'sed'"):
        apply_override(given, "sed", "1")


@sizes(500)
def test_arguments(examples):
    arguments = st.one_of(
        st.text(max_size=20),
        st.tuples(keys, texts).map(lambda pair: f"--config.{pair[0]}={pair[1]}"),
        st.sampled_from(
            ["--config", "-config=", "--config=", "--config.=", "--config..x=1", "-", "--"]
        ),
    )
    check(examples, cli.split_overrides, st.lists(arguments, max_size=4))


@sizes(400)
def test_matrix(examples):
    text = st.text("routek.=;,\n 01", max_size=40) | st.text(max_size=20)
    check(examples, matrix.parse, text)


@sizes(150)
def test_a_config_of_somebody_else(examples):
    original = json.loads(json.dumps(complete().to_dict()))

    def holds(found):
        if isinstance(found, dict):
            cli.saved_config(found)

    check(examples, holds, mutated_json(original))


@sizes(150)
def test_every_key_with_another_value(examples):
    original = json.loads(json.dumps(complete().to_dict()))

    def holds(change):
        key, value = change
        *sections, last = key.split(".")
        changed = json.loads(json.dumps(original))
        node = changed
        for section in sections:
            node = node[section]
        node[last] = value
        cli.saved_config(changed)

    check(examples, holds, st.tuples(st.sampled_from(KEYS), values))


@sizes(60)
def test_presets(examples):
    names = st.text(max_size=20) | st.sampled_from(
        ["router=", "router=topk", "=", ":", "router=topk:x"]
    )

    def holds(argument):
        cli.load_config(f"configs/quickstart.py:{argument}")

    check(examples, holds, names)


@sizes(200)
def test_corruptions(examples):
    def holds(text):
        kind, severity = _corruption(text)
        corrupt(kind, "some words here", severity=severity, seed=0, index=0)

    numbers = st.floats().map(str) | st.text(max_size=5)
    check(
        examples,
        holds,
        st.tuples(st.sampled_from(["typos", "shuffle_words", "noise", ""]), numbers).map(":".join)
        | st.text(max_size=12),
    )


def test_a_config_error_is_one():
    """The rule itself: another error than one meant for people fails."""
    with pytest.raises(ZeroDivisionError):
        check(5, lambda _: 1 // 0, scalars)

    def refuse(_):
        raise ConfigError("no")

    check(5, refuse, scalars)
    with pytest.raises(AssertionError):
        check(5, lambda _: (_ for _ in ()).throw(UserError("")), scalars)
