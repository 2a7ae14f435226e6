import collections
import itertools
import json

import jax
import numpy as np
import pytest

from moe.data import batches as batches_module
from moe.data.open import make_data
from moe.data.tokenizers import from_json
from moe.errors import CheckpointError, ConfigError, DataError


def take(batches, n):
    return list(itertools.islice(batches, n))


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


def joined(parts):
    """Puts the blocks of all processes together to global batches."""
    return [jax.tree.map(lambda *arrays: np.concatenate(arrays), *blocks) for blocks in parts]


def test_shapes_and_counts(section):
    data = make_data(section(), seed=0)
    batch = next(data.train_batches())
    assert [field.shape for field in batch[:6]] == [(4, 16)] * 5 + [(4,)]
    assert [field.dtype for field in batch[:6]] == [np.int32] * 4 + [np.bool_, np.int32]
    assert batch[6:] == (None,) * 6
    assert data.domains == ("long", "short")
    documents = sum(count.documents for split in data.counts.values() for count in split.values())
    assert documents == 260
    for split in data.counts.values():
        for count in split.values():
            assert count.tokens == count.bytes + count.documents  # one token a byte, one boundary


def test_resume_is_exact(section):
    data = make_data(section(), seed=3)
    batches = data.train_batches()
    take(batches, 7)
    state = json.loads(json.dumps(batches.get_state()))
    rest = take(batches, 9)
    again = make_data(section(), seed=3)  # another process, from the files
    resumed = again.train_batches(start_state=state)
    assert resumed.get_state() == state
    assert_same(rest, take(resumed, 9))
    assert resumed.get_state() == batches.get_state()
    batches.set_state(state)  # and back again in the same iterator
    assert_same(rest, take(batches, 9))


def test_state_counts_batches_consumed_not_read_ahead(section):
    batches = make_data(section(), seed=0).train_batches()
    assert batches.get_state()["next_row"] == 0
    take(batches, 3)
    assert batches.get_state()["next_row"] == 3 * 4


@pytest.mark.parametrize("count", [2, 4])
def test_process_count_does_not_change_global_batches(section, count):
    data = make_data(section(), seed=0)
    whole = take(data.train_batches(), 12)
    iterators = [data.train_batches(p, count) for p in range(count)]
    blocks = zip(*(take(iterator, 12) for iterator in iterators), strict=True)
    assert_same(whole, joined(blocks))
    states = [iterator.get_state() for iterator in iterators]
    assert all(state == states[0] for state in states)
    # A run of `count` processes goes on with one.
    alone = data.train_batches(start_state=states[0])
    assert_same(take(alone, 2), take(data.train_batches(), 14)[12:])


@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_evaluation_covers_every_target_once(section, split, count):
    data = make_data(section(), seed=0)
    parts = [list(data.eval_batches(split, p, count)) for p in range(count)]
    assert {len(part) for part in parts} == {data.num_batches(split)}
    assert {batch.tokens.shape for part in parts for batch in part} == {(4 // count, 16)}
    batches = joined(zip(*parts, strict=True))
    tokens = data.store.splits[split]
    seen = np.concatenate([batch.targets[batch.valid] for batch in batches])
    # Targets are all ids after the first, each document's boundary at its end.
    assert sorted(seen.tolist()) == sorted(tokens.ids[1:].tolist())
    for m, name in enumerate(data.domains):
        valid = sum(int(batch.valid[batch.domain == m].sum()) for batch in batches)
        assert valid == data.counts[split][name].tokens


def test_evaluation_does_not_depend_on_seed_or_weights(section):
    ours = make_data(section(), seed=0)
    theirs = make_data(section(weights={"short": 1.0}), seed=9)
    assert_same(list(ours.eval_batches("valid")), list(theirs.eval_batches("valid")))


def test_an_epoch_has_every_row_and_the_next_is_shuffled_anew(section):
    data = make_data(section(weights={"long": 1.0}, batch_size=1), seed=0)
    n = data.num_rows("train")
    rows = [batch.tokens.tobytes() for batch in take(data.train_batches(), 2 * n)]
    first, second = rows[:n], rows[n:]
    assert sorted(first) == sorted(second)
    assert first != second


def test_seeds_differ(section):
    ours = take(make_data(section(), seed=0).train_batches(), 3)
    theirs = take(make_data(section(), seed=1).train_batches(), 3)
    assert any((a.tokens != b.tokens).any() for a, b in zip(ours, theirs, strict=True))


def shares(data, n):
    domains = np.concatenate([batch.domain for batch in take(data.train_batches(), n)])
    counted = collections.Counter(domains.tolist())
    return {name: counted[m] / len(domains) for m, name in enumerate(data.domains)}


def test_weights_set_the_mixture(section):
    by_size = make_data(section(), seed=0)
    tokens = {name: count.tokens for name, count in by_size.counts["train"].items()}
    share = shares(by_size, 200)["long"]
    assert share == pytest.approx(tokens["long"] / sum(tokens.values()), abs=0.01)
    assert shares(make_data(section(weights={"long": 1, "short": 3}), seed=0), 200) == (
        pytest.approx({"long": 0.25, "short": 0.75}, abs=0.01)
    )
    assert shares(make_data(section(weights={"short": 2.0}), seed=0), 20)["short"] == 1


@pytest.mark.parametrize(
    ("changes", "seed", "key"),
    [
        ({}, 1, "seed"),
        ({"sequence_length": 8}, 0, "sequence_length"),
        ({"weights": {"short": 1.0}}, 0, "weights"),
        ({"tokenizer": "bpe", "vocab_size": 300}, 0, "fingerprint"),
    ],
)
def test_a_place_in_other_data_is_refused(section, changes, seed, key):
    state = make_data(section(), seed=0).train_batches().get_state()
    other = make_data(section(**changes), seed=seed)
    with pytest.raises(CheckpointError, match=key):
        other.train_batches(start_state=state)


def test_a_place_of_other_code_is_refused(section, monkeypatch):
    data = make_data(section(), seed=0)
    state = data.train_batches().get_state()
    assert state["code"] == data.code
    monkeypatch.setattr(batches_module, "code_of", lambda kind: f"other {kind}")
    with pytest.raises(CheckpointError, match=r"code was .* and is now 'other text'"):
        data.train_batches(start_state=state)


def test_other_text_or_a_broken_state_is_refused(section, corpus):
    data = make_data(section(), seed=0)
    state = data.train_batches().get_state()
    for broken in ({}, state | {"next_row": None}, state | {"next_row": -1}):
        with pytest.raises(CheckpointError):
            data.train_batches(start_state=broken)
    with corpus.open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(CheckpointError, match="fingerprint"):
        make_data(section(), seed=0).train_batches(start_state=state)


def test_saved_tokenizer_overrides_the_config(section):
    trained = make_data(section(tokenizer="bpe", vocab_size=300), seed=0)
    saved = from_json(trained.tokenizer.to_json())
    data = make_data(section(), seed=0, tokenizer=saved)
    assert data.tokenizer is saved
    assert data.fingerprint == trained.fingerprint
    assert_same(take(data.train_batches(), 2), take(trained.train_batches(), 2))


def test_bpe_and_bytes_agree_on_documents_and_bytes(section):
    ours = make_data(section(), seed=0).counts
    theirs = make_data(section(tokenizer="bpe", vocab_size=300), seed=0).counts
    for split, domains in ours.items():
        for name, count in domains.items():
            other = theirs[split][name]
            assert (count.documents, count.bytes) == (other.documents, other.bytes)
            assert other.tokens < count.tokens


def test_token_bytes_of_all_targets_are_the_bytes_of_the_text(section):
    data = make_data(section(tokenizer="bpe", vocab_size=300), seed=0)
    total = sum(
        int(data.tokenizer.token_bytes[batch.targets][batch.valid].sum())
        for batch in data.eval_batches("test")
    )
    assert total == sum(count.bytes for count in data.counts["test"].values())


def test_a_weight_needs_text_to_train_on():
    sizes = {"some": 3, "none": 0}
    with pytest.raises(DataError, match=r"weights\.none=0\.5, but train has no text of 'none'"):
        batches_module.mixing_weights({"some": 1, "none": 0.5}, sizes)
    assert batches_module.mixing_weights({"some": 2, "none": 0}, sizes) == {"some": 1}
    assert batches_module.mixing_weights(None, sizes) == {"some": 1}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"name": "stdlb"}, ConfigError, "'stdlb'.*'stdlib'"),
        ({"name": "files:x"}, ConfigError, "only tfds and mix take a name"),
        ({"name": "tfds", "files": None}, ConfigError, "tfds:lm1b"),
        ({"name": "stdlib"}, ConfigError, "data.files is set"),
        ({"files": None}, ConfigError, "needs data.files"),
        ({"tokenizer": "words"}, ConfigError, "'words'"),
        ({"tokenizer": "bpe"}, ConfigError, "data.vocab_size=None"),
        ({"batch_size": 0}, ConfigError, "data.batch_size=0"),
        ({"sequence_length": -1}, ConfigError, "data.sequence_length=-1"),
        ({"batch_size": 10**6}, DataError, "at least data.batch_size=1000000 rows.*and has"),
        ({"weights": {"lang": 1.0}}, ConfigError, "'lang'.*'long'"),
        ({"weights": {"long": -1.0}}, ConfigError, "data.weights.long=-1.0"),
        ({"weights": {"long": float("nan")}}, ConfigError, "data.weights.long=nan"),
        ({"weights": {"long": 0.0}}, ConfigError, "sum greater than 0"),
    ],
)
def test_bad_config(section, changes, error, message):
    with pytest.raises(error, match=message):
        make_data(section(**changes), seed=0)


def test_bad_calls(section):
    data = make_data(section(), seed=0)
    with pytest.raises(ConfigError, match="not divisible by the 3 processes"):
        data.train_batches(0, 3)
    with pytest.raises(ConfigError, match="no process 2 of 2"):
        data.eval_batches("valid", 2, 2)
    with pytest.raises(ConfigError, match=r"'vaild'.*'valid'"):
        data.eval_batches("vaild")


def test_default_directory_is_that_of_tfds(section, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "elsewhere"))
    make_data(section(directory=None), seed=0)
    assert (tmp_path / "elsewhere" / "tokens").is_dir()
