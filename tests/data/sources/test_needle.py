from collections import Counter
import re
import subprocess
import sys

import pytest

from moe.data.sources.catalogue import find_entry
from moe.data.sources.needle import (
    Needle,
    NeedleConfig,
    make_example,
    make_haystack,
    read_haystacks,
)
from moe.errors import DataError
from tests.data.sources.tiny_packages import build, members, r_database, r_strings

FILE = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
WORDS = [f"{'abcdefghij'[i % 10] * (1 + i % 9)}{'é' * (i % 7 == 0)}" for i in range(4000)]
HAYSTACK = make_haystack(WORDS)
TIMES = {"train": 1, "test": 1, "test_2x": 2, "test_4x": 4}


@pytest.mark.parametrize("config", Needle.BUILDER_CONFIGS, ids=lambda config: config.name)
@pytest.mark.parametrize("split", TIMES)
def test_examples(config, split):
    for index in range(24):
        source, target, domain = make_example(config, HAYSTACK, split, index)
        assert re.fullmatch(r"\d{6}", target)
        assert source.count(target) == 1
        size = config.size * TIMES[split]
        assert size - 16 < len(source.encode()) <= size  # a word and its space may be missing
        passage, key = re.fullmatch(
            r"(.+)\nQ: What is the secret number of (\w+-\d+)\?\nA:", source
        ).groups()
        found = dict(re.findall(r"The secret number of (\w+-\d+) is (\d{6})\.", passage))
        assert len(found) == len(set(found.values())) == config.needles
        assert found[key] == target
        assert domain == f"quarter {1 + index % 4}"


def test_the_quarter_is_where_the_needle_is():
    config = NeedleConfig(name="x", size=1_000)
    places = []
    for index in range(200):
        source, target, domain = make_example(config, HAYSTACK, "train", index)
        words = source.split("\n")[0].replace(
            f"The secret number of {source.split()[-2][:-1]} is", "*"
        )
        before, _, after = words.partition(f"* {target}.")
        depth = len(before.split()) / (len(before.split()) + len(after.split()))
        assert int(4 * depth) == int(domain[-1]) - 1
        places.append(depth)
    assert min(places) < 0.05
    assert max(places) > 0.93


def test_rows_of_256_bytes_hold_the_default():
    config = find_entry("needle").config
    assert config == "240"
    example = make_example(Needle.BUILDER_CONFIGS[0], HAYSTACK, "train", 0)
    assert len(example.source.encode()) + len(example.target) + 3 <= 256


def test_passages_are_words_in_a_row():
    source, target, _ = make_example(Needle.BUILDER_CONFIGS[0], HAYSTACK, "train", 5)
    passage = re.sub(rf"The secret number of \S+ is {target}\. ?", "", source.split("\nQ:")[0])
    assert passage.strip() in " ".join(WORDS)


def test_words_with_digits_are_left_out():
    haystack = make_haystack(["in", "1814", "the", "2nd", "café"])
    assert haystack.words == ("in", "the", "café")
    assert haystack.ends.tolist() == [0, 3, 7, 13]


def test_too_small_a_haystack():
    with pytest.raises(DataError, match="have 500 bytes, too few for a passage of"):
        make_example(NeedleConfig(name="x", size=1_000), make_haystack(["word"] * 100), "train", 0)
    for size in (10, 95):
        with pytest.raises(DataError, match="fewer than 4"):
            make_example(NeedleConfig(name="x", size=size), HAYSTACK, "train", 0)


def test_the_whole_haystack_is_drawn_from():
    """Passages start at the first word and end at the last one, and nowhere else is out of reach."""
    haystack = make_haystack("abcdefghijklmnopqrst")
    config = NeedleConfig(name="x", size=110)
    found = Counter()
    for index in range(400):
        passage = make_example(config, haystack, "train", index).source.split("\nQ:")[0]
        found.update(re.sub(r"The secret number of \S+ is \d+\. ?", "", passage).split())
    assert set(found) == set("abcdefghijklmnopqrst")


def database(**novels: str) -> dict[str, bytes]:
    texts = ([title.replace("_", " "), "Chapter 1", text] for title, text in novels.items())
    return {FILE: r_database(*(r_strings(lines) for lines in texts))}


def test_test_passages_are_of_other_novels():
    files = database(EMMA="emma in 1815", NORTHANGER_ABBEY="abbey", PERSUASION="anne")
    found = {split: haystack.words for split, haystack in read_haystacks(members(files)).items()}
    assert found == {
        "train": ("EMMA", "Chapter", "emma", "in"),
        "valid": ("NORTHANGER", "ABBEY", "Chapter", "abbey"),
        "test": ("PERSUASION", "Chapter", "anne"),
    }


def test_prepared(tmp_path, monkeypatch):
    small = NeedleConfig(name="tiny", train=8, held_out=4)
    monkeypatch.setattr(Needle, "BUILDER_CONFIGS", (small,))
    monkeypatch.setattr(Needle, "builder_configs", {"tiny": small})
    files = database(
        EMMA="emma " * 600, NORTHANGER_ABBEY="abbey " * 600, PERSUASION="persuasion " * 600
    )
    entry = find_entry("needle")._replace(config="tiny")
    splits = build(entry, {"r-cran-janeaustenr": files}, tmp_path)
    assert {split: len(part) for split, part in splits.items()} == {
        "train": 8,
        **dict.fromkeys(("valid", "test", "test_2x", "test_4x"), 4),
    }
    for split, part in splits.items():
        word = {"train": "emma", "valid": "abbey"}.get(split, "persuasion")
        assert all(e["source"].split(word, 1)[1].count(e["target"]) <= 1 for e in part)
        assert all(e["source"].count(word) > 5 for e in part)
        assert Counter(e["domain"] for e in part) == {
            f"quarter {i}": len(part) // 4 for i in range(1, 5)
        }


def test_same_in_another_process():
    code = (
        "from moe.data.sources.needle import Needle, make_example as make\n"
        "from tests.data.sources.test_needle import HAYSTACK\n"
        "print([make(Needle.BUILDER_CONFIGS[0], HAYSTACK, 'valid', i) for i in range(5)])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    config = Needle.BUILDER_CONFIGS[0]
    assert run.stdout.strip() == str([make_example(config, HAYSTACK, "valid", i) for i in range(5)])
