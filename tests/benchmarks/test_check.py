"""The rule by which a new run is worse than the stored one, the table, and the errors."""

from pathlib import Path
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import rows, run, sections, table
from benchmarks.rows import Row, Section
from moe.errors import ConfigError

ROOT = Path(__file__).parents[2]


def noisy(ratio: float, *, rounds: int = 11, spread: float = 0.05, seed: int = 0) -> Row:
    """A row of lognormal times; the machine's mood moves both sides of a round alike."""
    rng = np.random.default_rng(seed)
    mood = rng.lognormal(0.0, 0.3, rounds)
    above = ratio * mood * rng.lognormal(0.0, spread, rounds)
    return Row("one", tuple(above), tuple(mood), bound=1.15)


def test_value_is_the_ratio_of_medians():
    row = rows.times("one", [0.3, 0.1, 0.2], [0.1, 0.4, 0.1])
    np.testing.assert_allclose(row.value, 2.0)
    np.testing.assert_allclose(row.above, (300.0, 100.0, 200.0))


def test_interval_holds_most_values_of_other_runs():
    values = [noisy(1.2, seed=seed).value for seed in range(200)]
    hits = 0
    for seed in range(1000, 1100):
        low, high = noisy(1.2, seed=seed).interval
        hits += low <= np.median(values) <= high
    assert hits >= 85  # of 100 intervals of 95%, by a bootstrap of few rounds


@pytest.mark.parametrize("spread", [0.0, 0.02, 0.1])
def test_noise_is_no_regression(spread):
    old = noisy(1.2, spread=spread, seed=0)
    told = [rows.regression(noisy(1.2, spread=spread, seed=s), old) for s in range(1, 101)]
    assert sum(text is not None for text in told) <= 1


def test_a_clear_regression_is_one():
    told = rows.regression(noisy(1.5, seed=1), noisy(1.2, seed=0))
    assert told is not None
    assert told.startswith("one: 1.")
    assert "was 1." in told


def test_a_small_regression_shows_only_where_there_is_little_noise():
    worse = 1.2 * 1.08
    quiet = rows.regression(noisy(worse, spread=0.005, seed=1), noisy(1.2, spread=0.005))
    loud = rows.regression(noisy(worse, spread=0.2, seed=1), noisy(1.2, spread=0.2))
    assert quiet is not None
    assert loud is None


def test_better_is_no_regression():
    assert rows.regression(noisy(0.9, seed=1), noisy(1.2, seed=0)) is None


def test_single_numbers_have_the_margin_alone():
    old = rows.single("one", 2.0, 2.5, "size")
    assert rows.regression(rows.single("one", 2.05, 2.5, "size"), old) is None
    assert rows.regression(rows.single("one", 2.07, 2.5, "size"), old) is not None
    none = rows.single("one", 0, 0, "count")
    assert rows.regression(rows.single("one", 1, 0, "count"), none) is not None


def test_shares_near_zero_may_move_by_a_hundredth():
    old = rows.single("one", 0.001, 0.02, "share")
    assert rows.regression(rows.single("one", 0.010, 0.02, "share"), old) is None
    assert rows.regression(rows.single("one", 0.012, 0.02, "share"), old) is not None


def test_what_cannot_be_compared_is_not():
    slow, fast = (rows.single("one", s, 20.0, "seconds") for s in (19.0, 5.0))
    assert rows.regression(slow, fast) is None
    assert rows.regression(Row("one", note="not installed"), noisy(1.2)) is None
    assert rows.regression(noisy(1.2), Row("one", note="not installed")) is None


def test_sections_are_compared_by_the_names_of_their_rows():
    old = {"a": Section((noisy(1.2), noisy(1.2)._replace(name="two")), {})}
    bad = noisy(3.0, seed=1)
    assert rows.pairs({"a": Section((bad,), {})}, old) == [(bad, noisy(1.2))]
    assert rows.pairs({"a": Section((bad._replace(name="three"),), {})}, old) == []
    assert rows.pairs({"b": Section((bad,), {})}, old) == []


def test_a_check_of_nothing_fails(capsys):
    assert run.report([]) == 1
    assert "nothing was compared" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "bound", "least", "verdict"),
    [
        (1.1, 1.15, None, "pass"),
        (1.2, 1.15, None, "miss"),
        (0.8, 1.15, 0.85, "miss"),
        (1.2, None, None, ""),
        (0.0, 0.0, None, "pass"),
    ],
)
def test_verdict(value, bound, least, verdict):
    assert Row("one", (value,), (1.0,), bound, least).verdict == verdict


def test_rows_come_back_from_a_file_and_other_sections_stay(tmp_path):
    path = tmp_path / "rows.json"
    a, b = (Section((noisy(r, rounds=3),), {"commit": "c"}) for r in (1.0, 2.0))
    rows.save(path, {"a": a, "b": a})
    rows.save(path, {"b": b})
    assert rows.load(path) == {"a": a, "b": b}


@pytest.mark.parametrize("text", ["{", "[]", '{"a": {"rows": [{"value": 1}]}}'])
def test_a_file_that_holds_something_else(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="holds no results"):
        rows.load(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"no stored results .*--json="):
        rows.load(tmp_path / "rows.json")


def test_table_of_a_terminal_lines_up():
    absent = Row("a much longer name", note="not installed")
    lines = table.text((noisy(1.2), absent, rows.single("s", 0.123, 0.2, "share"))).splitlines()
    assert len({line.index("bound") for line in lines if "bound" in line}) == 1
    start = lines[0].index("value")
    assert [line[start:].split()[0] for line in lines[2:]] == ["-", "12.3%"]
    assert lines[2].endswith("not installed")
    assert "pass" in lines[3]
    assert "<= 20.0%" in lines[3]


def test_a_bound_both_ways_is_told():
    assert table.bounds(Row("one", bound=1.15, least=0.85)) == "0.85 to 1.15"


def test_table_goes_between_the_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    section = Section((noisy(1.2)._replace(note="a | b"),), {"commit": "abc", "rounds": 11})
    table.write(page, {"layer": section})
    text = page.read_text()
    assert text.startswith(f"before\n{table.BEGIN}\n### layer\n\ncommit abc; rounds 11\n\n| row |")
    assert text.endswith(f"\n{table.END}\nafter\n")
    assert "old" not in text
    assert "a \\| b |" in text
    widths = {line.replace("\\|", "").count("|") for line in text.splitlines() if "|" in line}
    assert widths == {len(table.HEADER) + 1}
    table.write(page, {"layer": section})
    assert page.read_text() == text


def test_a_page_without_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(ConfigError, match="put them back"):
        table.write(page, {})


def test_the_page_shows_what_is_stored():
    stored = rows.load(run.BASELINE) if run.BASELINE.exists() else {}
    shown = run.README.read_text().partition(table.BEGIN)[2].partition(table.END)[0]
    assert shown.strip() == table.markdown(stored)


def test_the_page_explains_every_section():
    page = run.README.read_text()
    assert [name for name in sections.SECTIONS if f"`{name}`" not in page] == []


def test_sections_in_their_order():
    assert sections.find(None) == list(sections.SECTIONS)
    assert sections.find(["skew", "layer"]) == ["layer", "skew"]


def test_an_unknown_section_exits_2_with_the_nearest_name():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "run.py", "--only=lyer"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "the nearest is 'layer'" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_measured_is_stored_at_once_and_compared(tmp_path, monkeypatch, capsys):
    store, asked = tmp_path / "rows.json", []

    def measure(name, repeats):
        asked.append((name, repeats))
        if name == "growth":
            raise RuntimeError("stopped")
        return [noisy(1.2)]

    monkeypatch.setattr(sections, "measure", measure)
    with pytest.raises(RuntimeError, match="stopped"):
        run.measure(["skew", "growth"], 3, store)
    assert asked == [("skew", 3), ("growth", 3)]
    stored = rows.load(store)
    assert list(stored) == ["skew"]
    assert {"machine", "versions", "commit", "command"} <= set(stored["skew"].origin)
    assert run.report(rows.pairs(stored, stored)) == 0
    worse = {"skew": stored["skew"]._replace(rows=(noisy(2.0, seed=1),))}
    assert run.report(rows.pairs(worse, stored)) == 1
    assert "one: 1.986 (" in capsys.readouterr().out
