"""From rows of a split to scores, by the numbers of examples."""

import jax
import numpy as np
import pytest

from moe.dispatch.reference import reference
from moe.evaluation import evidence
from moe.evaluation.decode import Decoding, decode, prompts_of, until
from moe.evaluation.examples import Examples
from moe.evaluation.text_scores import exact_match
from moe.model.build import model_spec
from moe.training.state import bind, make_skeleton
from tests import tiny
from tests.evaluation.example_data import TOKENIZER, text_examples

DOMAINS = ("en-es", "en-zh")
ROWS = [
    ("one", "uno", 0, 0),
    ("two", "\u4e8c", 1, 1),
    ("three", "tres", 0, 1),
    ("tea", "t\u00e9", 0, 0),
    ("one", "un", 0, 0),
    ("six", "seis", 0, 1),
]


def data(task: str = "seq2seq", **options):
    return text_examples(
        task, {"train": ROWS, "test": ROWS[1:] + ROWS[:1]}, domains=DOMAINS, **options
    )


def rows_in_reading_order(source) -> Examples:
    parts = []
    for batch in source.eval_batches("test"):
        real = batch.index >= 0
        ones = np.ones(real.sum())
        parts.append((batch.index[real], batch.domain[real], ones, ones, ones, 2 * ones))
    return Examples(*(np.concatenate(part) for part in zip(*parts, strict=True)))


@pytest.fixture(scope="module")
def model():
    spec = model_spec(tiny.config("model.num_layers=1"), TOKENIZER.vocab_size)
    skeleton = make_skeleton(spec)
    return bind(skeleton, *tiny.numbers(skeleton))


def test_every_example_is_decoded_once(model):
    source, decoding, key = data(), Decoding(length=3), jax.random.key(0)
    found = evidence.decode_split(model, reference, source, "test", decoding, key)
    assert sorted(found) == list(range(6))
    assert list(found) != sorted(found)  # in the order of reading
    for number, batch in enumerate(source.eval_batches("test")):
        # As one prompt: the boundary, the source, the boundary.
        new = decode(
            model, reference, prompts_of(batch), decoding, key, boundary=TOKENIZER.boundary
        )
        for i, tokens in zip(batch.index, new, strict=True):
            text = TOKENIZER.decode(until(tokens, TOKENIZER.boundary))
            assert i < 0 or found[int(i)] == text, number
    some = evidence.decode_split(model, reference, source, "test", decoding, key, examples=3)
    assert some == {i: found[i] for i in list(found)[:3]}
    first = evidence.decode_split(model, reference, source, "test", decoding, key, batches=1)
    assert first == {i: found[i] for i in list(found)[:4]}


def test_texts_are_scored_against_their_own_references():
    source = data()
    rows = rows_in_reading_order(source)
    right = {i: ROWS[(i + 1) % 6][1] for i in (5, 0, 3)}  # the split is moved by one
    found = evidence.split_scores("seq2seq", source, "test", rows, right)
    assert found["exact_match"] == exact_match(["a"] * 3, ["a"] * 3)
    assert found["chrf"].value == pytest.approx(100.0)
    wrong = evidence.split_scores("seq2seq", source, "test", rows, right | {1: "no"})
    assert wrong["exact_match"].value == 0.75
    assert wrong["exact_match"].n == 4
    assert set(evidence.split_scores("seq2seq", source, "test", rows)) == {
        "loss/cross_entropy",
        "token_accuracy",
    }


def test_scores_by_domain_have_the_rows_of_the_domain():
    source = data()
    rows = rows_in_reading_order(source)
    found = evidence.domain_scores("seq2seq", source, "test", rows, {0: "\u4e8c", 1: "x"})
    assert set(found) == set(DOMAINS)
    assert found["en-zh"]["exact_match"] == (1.0, 1.0, 1.0, 1)
    assert found["en-es"]["exact_match"].value == 0.0
    assert found["en-es"]["loss/cross_entropy"].n == 5
    spanish = evidence.rows_of(rows, rows.domain == 0)
    assert evidence.domain_scores("seq2seq", source, "test", spanish) == {}


def test_equal_sources_share_their_targets():
    source = data("match")
    rows = rows_in_reading_order(source)
    index = {int(i): n for n, i in enumerate(rows.index)}
    unit = np.eye(6)[: len(rows.index)]
    pair = np.stack([unit, unit], axis=1)
    uno, un = index[5], index[3]  # both are of the source `one`
    pair[[uno, un], 1] = pair[[un, uno], 1]
    found = evidence.split_scores("match", source, "test", rows._replace(embedding=pair))
    assert found["recall@1"].value == 1.0
    other = data("match", length=20)
    pair[[0, 1], 1] = pair[[1, 0], 1]
    worse = evidence.split_scores("match", other, "test", rows._replace(embedding=pair))
    assert worse["recall@1"].value < 1.0


def test_recognised_text_of_paths():
    source = data()
    blank = TOKENIZER.boundary
    rows = rows_in_reading_order(source)
    paths = np.full((6, 8), blank)
    for n, i in enumerate(rows.index):
        ids = TOKENIZER.encode_batch([ROWS[(int(i) + 1) % 6][1]])[0]
        paths[n, 1 : 1 + len(ids)] = ids
    valid = np.ones((6, 8), bool)
    rows = rows._replace(prediction=paths, valid=valid)
    assert evidence.split_scores("ctc", source, "test", rows)["character_error_rate"].value == 0.0
    valid[0, :2] = False  # a letter of the first row is not heard
    heard = evidence.split_scores("ctc", source, "test", rows)
    assert heard["word_error_rate"].value == pytest.approx(1 / 6)
