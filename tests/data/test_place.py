"""Places in the data: rows are counted once whatever reads them, and differences are refused by name."""

import ast
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from moe.data import batches as batches_module
from moe.data import pipeline
from moe.data.order import ENDLESS, Block, mixed, stack
from moe.data.pack import Row
from moe.data.place import FREE, IDENTITY, TrainBatches
from moe.errors import CheckpointError, ConfigError

DATA = Path(batches_module.__file__).parent
SAME = {
    "fingerprint": "f",
    "seed": 0,
    "sequence_length": 4,
    "weights": {"a": 0.25, "b": 0.75},
    "code": "c",
}


class Numbers:
    """Row n says that it is row n."""

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Row:
        none, some = np.zeros(1, np.int32), np.zeros(1, bool)
        return Row(np.array([index]), none, none, none, some, np.int32(0))


def open_batches(batch_size, block=0, blocks=1, same=SAME) -> TrainBatches:
    def read(row):
        rows = Block(Numbers(), ENDLESS, batch_size, block, blocks, row)
        starts = range(0, len(rows), rows.own)
        return (stack([rows[i] for i in range(start, start + rows.own)]) for start in starts)

    return TrainBatches(read, same, batch_size)


LEG = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(0, 4), st.booleans())


@settings(deadline=None)
@given(st.lists(LEG, min_size=1, max_size=6))
def test_any_sequence_of_batch_sizes_and_processes_covers_each_row_once(legs):
    """Each leg has a number of processes, rows for each, batches, and maybe hands on an old state."""
    state, seen = None, []
    for blocks, own, count, old in legs:
        size = blocks * own
        readers = [open_batches(size, block, blocks) for block in range(blocks)]
        for reader in readers:
            if state is not None:
                before = state.get(FREE)
                assert reader.set_state(state) == ({} if before == size else {FREE: [before, size]})
        for _ in range(count):
            seen += [int(i) for reader in readers for i in next(reader).tokens.ravel()]
        states = [reader.get_state() for reader in readers]
        assert all(found == states[0] for found in states)
        state = states[0]
        if old and state["next_row"] % size == 0:
            batch = state.pop("next_row") // size
            state = {key: value for key, value in state.items() if key != "code"}
            state["next_batch"] = batch
    assert seen == list(range(len(seen)))


@given(st.integers(0, ENDLESS // 2), st.integers(1, 64))
def test_a_place_far_away_is_as_exact(row, size):
    batches = open_batches(size)
    batches.go_to(row)
    assert next(batches).tokens.ravel().tolist() == list(range(row, row + size))
    assert batches.next_row == row + size


def test_the_order_is_of_the_seed_the_domain_and_the_epoch():
    """Of two domains with the same number of rows, each is in an order of its own."""
    n = 30

    def order(seed: int) -> list[list[int]]:
        parts = [[(m, i) for i in range(n)] for m in range(2)]
        stream = mixed(parts, [0.5, 0.5], seed)
        found = [stream[i] for i in range(4 * n)]
        return [[i for m, i in found if m == wanted] for wanted in range(2)]

    epochs = [rows[k : k + n] for seed in (0, 1) for rows in order(seed) for k in (0, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, list(range(n))]}) == 2 * 2 * 2 + 1
    assert order(0) == order(0)


def test_what_reads_ahead_is_closed_before_it_goes_elsewhere():
    class Ahead:
        closed = 0

        def __iter__(self):
            return self

        def __next__(self):
            return stack([Numbers()[0]])

        def close(self):
            self.closed += 1

    made = [Ahead(), Ahead()]
    left = iter(made)
    batches = TrainBatches(lambda row: next(left), SAME, 4)
    next(batches)
    batches.go_to(8)
    assert [one.closed for one in made] == [1, 0]
    next(batches)
    batches.close()
    batches.close()
    assert [one.closed for one in made] == [1, 1]


def changed(key):
    return {**SAME, key: {"a": 1.0} if key == "weights" else "other"}


@pytest.mark.parametrize("key", SAME)
def test_a_difference_is_refused_with_both_values_or_allowed_by_name(key):
    batches = open_batches(4)
    next(batches)
    state = batches.get_state()
    other = open_batches(4, same=changed(key))
    with pytest.raises(CheckpointError) as error:
        other.set_state(state)
    for said in (key, repr(SAME[key]), repr(changed(key)[key]), f"--allow_change={key}"):
        assert said in str(error.value)
    assert other.next_row == 0
    wrong = next(name for name in SAME if name != key)
    with pytest.raises(CheckpointError, match=key):
        other.set_state(state, [wrong])
    assert other.set_state(state, [key]) == {key: [SAME[key], changed(key)[key]]}
    assert next(other).tokens.ravel().tolist() == [4, 5, 6, 7]


def test_all_differences_are_named_at_once():
    state = open_batches(4).get_state()
    other = open_batches(8, same={**changed("seed"), "code": "d"})
    with pytest.raises(
        CheckpointError, match=r"seed was 0.*code was 'c'.*--allow_change=seed,code"
    ):
        other.set_state(state)
    changes = other.set_state(state, ["code", "seed", "batch_size"])
    assert changes == {"seed": [0, "other"], "code": ["c", "d"], "batch_size": [4, 8]}


def test_a_name_that_cannot_be_allowed():
    with pytest.raises(ConfigError, match=r"--allow_change=sed.*'seed'"):
        open_batches(4).set_state(open_batches(4).get_state(), ["sed"])


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"next_row": None},
        {"next_row": -1},
        {"next_row": True},
        {"next_row": 3.0},
        {"next_row": ENDLESS},
        {"next_batch": 1},
        {"next_batch": 1, "batch_size": "4"},
        {"next_batch": ENDLESS // 4, "batch_size": 4},
    ],
)
def test_a_place_that_is_no_number_is_refused(broken):
    with pytest.raises(CheckpointError, match="damaged"):
        open_batches(4).set_state(SAME | broken)


@pytest.mark.parametrize("key", ["code", "too_long"])
def test_a_state_of_an_older_format_says_nothing_of_what_came_later(key):
    same = SAME | {"too_long": "keep"}
    state = open_batches(4, same=same).get_state()
    with pytest.raises(CheckpointError, match=key):
        open_batches(4, same=same | {key: "other"}).set_state(state)
    del state[key]
    assert open_batches(4, same=same).set_state(state) == {}


def test_a_state_without_seed_is_refused():
    state = open_batches(4).get_state()
    del state["seed"]
    with pytest.raises(CheckpointError, match="seed was None and is now 0"):
        open_batches(4).set_state(state)


# ---- the code of the pipeline


def imported(name: str) -> set[str]:
    """Modules of moe.data that one imports when it is imported."""
    names = set()
    for node in ast.parse((DATA / f"{name}.py").read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module == "moe.data":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moe.data."):
            names.add(node.module.split(".")[2])
    return names


@pytest.mark.parametrize(("kind", "first"), [("text", "text"), ("examples", "example_data")])
def test_every_module_that_makes_rows_is_in_the_code_or_in_the_fingerprint(kind, first):
    found, new = set(), {first}
    while new:
        found |= new
        new = {name for one in new - {"sources"} for name in imported(one)} - found
    assert not set(pipeline.IN_CODE[kind]) & set(pipeline.IN_FINGERPRINT)
    assert found - set(pipeline.IN_FINGERPRINT) == set(pipeline.IN_CODE[kind])


def test_the_lists_name_modules():
    for name in (*pipeline.IN_FINGERPRINT, *sum(pipeline.IN_CODE.values(), ())):
        assert (DATA / f"{name}.py").exists() or (DATA / name).is_dir(), name


SOURCE = '''
"""A module."""

import math
from typing import NamedTuple

import numpy as np

from moe.errors import DataError

class Row(NamedTuple):
    """A row."""
    tokens: np.ndarray
    index: int = 0

def row(index: int, size=2) -> int:
    """Which one."""
    if index < 0:
        raise DataError(f"row {index}")
    found = index * 2  # twice
    return math.floor(found)
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Which one.", "Which row."),
        ('"""A module."""', ""),
        ('    """A row."""\n', ""),
        ("  # twice", ""),
        ('DataError(f"row {index}")', 'ValueError("no such row")'),
        ("from moe.errors import DataError", "from moe.errors import ConfigError, DataError"),
        ("return math.floor(found)", "return (\n        math.floor(found))"),
        ("index: int, size=2) -> int", "index, size: int = 2)"),
        ("found = ", "found: int = "),
        ("tokens: np.ndarray", 'tokens: "Array"'),
        ("index: int = 0", "index: np.int32 = 0"),
        ("import numpy as np", "from jaxtyping import Int"),
        (
            "import math\nfrom typing import NamedTuple",
            "from typing import NamedTuple\nimport math",
        ),
    ],
)
def test_words_annotations_and_layout_do_not_change_the_code(old, new):
    assert old in SOURCE
    assert pipeline.normalised(SOURCE.replace(old, new)) == pipeline.normalised(SOURCE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("* 2", "* 3"),
        ("index < 0", "index <= 0"),
        ("index * 2", "row(index)"),
        ("raise DataError", "return DataError"),
        ("size=2", "size=3"),
        ("size=2", "size"),
        ("    tokens: np.ndarray\n", ""),
        ("tokens: np.ndarray", "ids: np.ndarray"),
        ("index: int = 0", "index: int = 1"),
        ("index: int = 0", "index: int"),
        ("import math", "import cmath as math"),
        ("import math", "from moe import math"),
        ("from typing", "from .typing"),
        ('"""Which one."""', "index = abs(index)"),
        ("found = ", "found += "),
    ],
)
def test_what_it_does_changes_the_code(old, new):
    assert old in SOURCE
    assert pipeline.normalised(SOURCE.replace(old, new)) != pipeline.normalised(SOURCE)


def test_the_code_of_each_kind_is_of_all_its_modules(monkeypatch, tmp_path):
    """A change of what any of them does is seen, and one of its words is not."""
    for name in {*sum(pipeline.IN_CODE.values(), ())}:
        (tmp_path / f"{name}.py").write_text((DATA / f"{name}.py").read_text())
    before = {kind: pipeline.code_of(kind) for kind in pipeline.IN_CODE}
    monkeypatch.setattr(pipeline, "__file__", str(tmp_path / "pipeline.py"))
    for path in tmp_path.iterdir():
        path.write_text(f"{path.read_text()}\n# a comment\n")
    assert {kind: pipeline.code_of(kind) for kind in pipeline.IN_CODE} == before
    for path in tmp_path.iterdir():
        source = path.read_text()
        path.write_text(f"{source}\nADDED = 1\n")
        for kind, names in pipeline.IN_CODE.items():
            assert (pipeline.code_of(kind) != before[kind]) == (path.stem in names), (path, kind)
        path.write_text(source)


def test_the_code_has_the_version_of_grain_and_differs_by_kind(monkeypatch):
    text = pipeline.code_of("text")
    assert text.endswith(" grain-" + pipeline.importlib.metadata.version("grain"))
    assert text != pipeline.code_of("examples")
    monkeypatch.setattr(pipeline.importlib.metadata, "version", lambda name: "9")
    assert pipeline.code_of("text") == text.rpartition("-")[0] + "-9"


def test_identity_is_what_a_place_knows():
    assert set(SAME) < set(IDENTITY)
