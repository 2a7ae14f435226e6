"""The router-validation split: whole documents of train, and of nothing else."""

import itertools
import json

import numpy as np
import pytest

from moe.data.open import make_data
from moe.data.router_valid import ROUTER_VALID
from moe.data.sources import open_source
from moe.data.sources.types import Request
from moe.data.store import document_keys
from moe.data.text import TextData
from moe.errors import CheckpointError, ConfigError, DataError


def documents(data: TextData, split: str) -> list[bytes]:
    """The tokens of every document of a split, which are its identity."""
    ids, starts, domain = data.store.splits[split]
    found = zip(starts[:-1], starts[1:], domain, strict=True)
    return [ids[a:b].tobytes() for a, b, m in found if m >= 0]


def test_four_disjoint_splits_of_which_two_are_as_before(section):
    before = make_data(section(), seed=0)
    data = make_data(section(), seed=0, router_valid=True)
    for split in ("valid", "test"):
        assert documents(data, split) == documents(before, split)
        for ours, theirs in zip(data.eval_batches(split), before.eval_batches(split), strict=True):
            np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    parts = {split: set(documents(data, split)) for split in data.store.splits}
    assert set(parts) == {"train", "valid", "test", ROUTER_VALID}
    for one, two in itertools.combinations(parts.values(), 2):
        assert not one & two
    assert parts["train"] | parts[ROUTER_VALID] == set(documents(before, "train"))
    share = len(parts[ROUTER_VALID]) / len(set(documents(before, "train")))
    assert share == pytest.approx(0.05, abs=0.01)
    assert data.fingerprint != before.fingerprint


def test_batches_of_train_hold_no_token_of_it(section):
    """Each document starts with its domain and number: what is read in an epoch tells."""
    data = make_data(section(sequence_length=64), seed=0, router_valid=True)
    held_out = {text[:24] for text in documents(data, ROUTER_VALID)}
    rows = itertools.islice(data.train_batches(), 2 * data.num_rows("train") // 4)
    stream = b"".join(row.astype(np.uint16).tobytes() for batch in rows for row in batch.tokens)
    assert not any(start in stream for start in held_out)
    read = data.eval_batches(ROUTER_VALID)
    own = b"".join(b.tokens[b.valid].astype(np.uint16).tobytes() for b in read)
    assert any(start in own for start in held_out)


def test_counts_add_up(section):
    before = make_data(section(), seed=0).counts["train"]
    counts = make_data(section(), seed=0, router_valid=True).counts
    for name, whole in before.items():
        parts = zip(counts["train"][name], counts[ROUTER_VALID][name], strict=True)
        assert tuple(a + b for a, b in parts) == whole
        part = counts[ROUTER_VALID][name]
        assert part.tokens == part.bytes + part.documents


def test_batches_by_number_are_those_in_order(section):
    data = make_data(section(), seed=0, router_valid=True)
    in_order = list(data.eval_batches(ROUTER_VALID))
    assert len(in_order) == data.num_batches(ROUTER_VALID) > 1
    for index, batch in enumerate([*in_order, in_order[0]]):
        for ours, theirs in zip(data.eval_batch(ROUTER_VALID, index), batch, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    halves = [data.eval_batch(ROUTER_VALID, 1, p, 2).tokens for p in range(2)]
    np.testing.assert_array_equal(np.concatenate(halves), in_order[1].tokens)


def test_no_run_goes_on_with_other_training_text(section):
    state = make_data(section(), seed=0).train_batches().get_state()
    with pytest.raises(CheckpointError, match="fingerprint"):
        make_data(section(), seed=0, router_valid=True).train_batches(start_state=state)


def test_one_document_cannot_be_held_out(section, tmp_path):
    (tmp_path / "one.txt").write_text("A line of text.\n" * 200)
    files = str(tmp_path / "one.txt")
    with pytest.raises(DataError, match=r"prior\.every"):
        make_data(section(files=files), seed=0, router_valid=True)


def test_without_it_there_is_no_such_split(section):
    with pytest.raises(ConfigError, match="router_valid"):
        make_data(section(), seed=0).num_rows(ROUTER_VALID)


def test_documents_of_one_text_stay_together(tmp_path, section):
    """Repeated texts have one key; the cached keys are those of the source."""
    lines = [json.dumps({"text": f"text {i % 150} " * 9}) for i in range(450)]
    path = tmp_path / "many.jsonl"
    path.write_text("\n".join(lines))
    data = make_data(section(files=str(path)), seed=0, router_valid=True)
    assert not set(documents(data, "train")) & set(documents(data, ROUTER_VALID))
    source = open_source("files", Request("", tmp_path / "data", str(path), "text"))
    keys = document_keys(source, tmp_path / "data")
    assert len(keys) == len(data.store.splits["train"].domain)
    np.testing.assert_array_equal(document_keys(source, tmp_path / "data"), keys)
