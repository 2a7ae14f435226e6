from collections import Counter
import dataclasses
import itertools
import re
import subprocess
import sys

import pytest

from moe.data.sources.catalogue import Entry
from moe.data.sources.listops import (
    OPERATORS,
    Listops,
    ListopsConfig,
    arguments_of,
    length,
    make_expression,
    solve,
)
from moe.errors import DataError
from tests.data.sources.tiny_packages import build

SHORT, MEDIUM, LRA = Listops.BUILDER_CONFIGS


def rewrite(text: str) -> int:
    """Replaces innermost lists by their values until a digit is left: nothing shared with `solve`."""

    def value(match: re.Match) -> str:
        digits = [int(digit) for digit in match[2].split()]
        if match[1] == "MED":
            while len(digits) > 2:
                digits.remove(max(digits))
                digits.remove(min(digits))
            return str(sum(digits) // len(digits))
        return str({"MAX": max, "MIN": min, "SM": lambda x: sum(x) % 10}[match[1]](digits))

    while not text.isdecimal():
        text = re.sub(r"\[(\w+) ([\d ]+) \]", value, text)
    return int(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]", 5),  # of Tay et al. 2021
        ("[MED 1 4 ]", 2),
        ("[MED 9 0 3 4 ]", 3),
        ("[SM 9 9 [SM 5 5 ] ]", 8),
        ("7", 7),
    ],
)
def test_known_values(text, value):
    assert solve(text) == rewrite(text) == value


@pytest.mark.parametrize(
    ("config", "split", "number"),
    [(SHORT, "train", 400), (SHORT, "test_long", 100), (MEDIUM, "test", 40), (LRA, "valid", 5)],
)
def test_answers_are_solved_twice(config, split, number):
    for index in range(number):
        text, value, operator = make_expression(config, split, index)
        assert solve(text) == rewrite(text) == value == index % 10
        assert text.startswith(f"[{operator} ")
        signs = [(sign == "[") - (sign == "]") for sign in text]
        assert 1 < max(itertools.accumulate(signs)) <= config.deepest


def test_answers_and_operators_are_balanced():
    made = [make_expression(SHORT, "train", index) for index in range(400)]
    found = Counter((e.value, e.text.split()[0]) for e in made)
    assert found == {(value, f"[{o}"): 10 for value in range(10) for o in OPERATORS}
    assert len({e.text for e in made}) == 400


@pytest.mark.parametrize("config", [SHORT, MEDIUM])
def test_lengths_stay_in_bounds(config):
    for split, low, high in (
        ("train", config.shortest, config.longest),
        ("test_long", config.longest + 1, 2 * config.longest),
    ):
        texts = [make_expression(config, split, index).text for index in range(60)]
        sizes = [len(text.split()) for text in texts]
        assert low <= min(sizes) < max(sizes) <= high
        assert all(len(text) <= 3 * size for text, size in zip(texts, sizes, strict=True))


def test_arguments_are_all_that_give_the_value():
    for operator, number in itertools.product(OPERATORS, (2, 3)):
        expected = {value: set() for value in range(10)}
        for digits in itertools.product(range(10), repeat=number):
            expected[rewrite(f"[{operator} {' '.join(map(str, digits))} ]")].add(digits)
        found = arguments_of(operator, number)
        assert {
            v: {tuple(row.tolist()) for row in rows} for v, rows in enumerate(found)
        } == expected
        assert sum(map(len, found)) == 10**number


def test_length_of_a_shape():
    assert length(()) == 1
    assert length(((), ((), ()))) == len("[MAX 1 [MAX 2 3 ] ]".split())


def test_same_in_another_process():
    """Strings seed the draws, so a salted hash would show here."""
    code = (
        "from moe.data.sources.listops import Listops, make_expression as make\n"
        "print([make(Listops.BUILDER_CONFIGS[0], 'valid', i).text for i in range(5)])"
    )
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    here = [make_expression(SHORT, "valid", index).text for index in range(5)]
    assert run.stdout.strip() == str(here)
    assert here != [make_expression(SHORT, "test", index).text for index in range(5)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[MAX 1 2",
        "[MAX ]",
        "1 2",
        "]",
        "[SUM 1 2 ]",
        "[MAX 1 12 ]",
        "[MAX 1  2 ]",
        "[MAX 1 2 ] ]",
    ],
)
def test_no_expressions(text):
    with pytest.raises(DataError, match="is no ListOps expression"):
        solve(text)


def test_prepared(tmp_path, monkeypatch):
    small = dataclasses.replace(SHORT, name="tiny", train=40, held_out=20)
    assert isinstance(small, ListopsConfig)
    monkeypatch.setattr(Listops, "BUILDER_CONFIGS", (small,))
    monkeypatch.setattr(Listops, "builder_configs", {"tiny": small})
    entry = Entry(Listops.__module__, "Listops", "classification", "", "tiny")
    splits = build(entry, {}, tmp_path)
    assert {split: len(part) for split, part in splits.items()} == {
        "train": 40,
        "valid": 20,
        "test": 20,
        "test_long": 20,
    }
    for part in splits.values():
        assert all(rewrite(e["text"]) == int(e["label"]) for e in part)
        assert {e["domain"] for e in part} <= {*OPERATORS}
    texts = [e["text"] for part in splits.values() for e in part]
    assert len(set(texts)) == len(texts)
