"""Scores against values worked out by hand, and against the libraries' own calls."""

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sklearn.metrics import f1_score

from moe.errors import ConfigError
from moe.evaluation import retrieval, scores, text_scores
from moe.evaluation.examples import Examples

REFERENCES = ["the cat sat on the mat, and left.", "a house by the sea", "we go home now"]
HYPOTHESES = ["the cat sat on a mat, and left.", "house by the sea", "they go home now"]


def examples(count: int = 4, **fields) -> Examples:
    rng = np.random.default_rng(0)
    sizes = np.arange(1.0, count + 1)
    made = Examples(
        np.arange(count), np.zeros(count, int), rng.random(count), sizes - 1, sizes, 2 * sizes
    )
    return made._replace(**fields)


def test_bleu_is_sacrebleus_for_each_language():
    english = text_scores.bleu(REFERENCES, HYPOTHESES, ["en"] * 3)
    expected = BLEU(tokenize="13a").corpus_score(HYPOTHESES, [REFERENCES]).score
    assert english.value == pytest.approx(expected)
    assert english.low < english.value < english.high
    assert english.n == 3
    chinese = ["\u6253\u5f00\u6587\u4ef6\u5939", "\u5173\u95ed\u7a97\u53e3"]
    wrong = ["\u6253\u5f00\u6587\u4ef6", "\u5173\u95ed\u7a97\u53e3"]
    found = text_scores.bleu(chinese, wrong, ["zh"] * 2).value
    assert found == pytest.approx(BLEU(tokenize="zh").corpus_score(wrong, [chinese]).score)
    assert found > 50.0  # as whole words of 13a, half of them would be wrong and no 4-gram right
    assert text_scores.bleu(chinese, wrong, ["en"] * 2).value < 50.0


def test_chrf_is_sacrebleus():
    found = text_scores.chrf(REFERENCES, HYPOTHESES)
    assert found.value == pytest.approx(CHRF().corpus_score(HYPOTHESES, [REFERENCES]).score)
    assert found.low < found.value < found.high


def test_texts_without_a_word_in_common():
    found = text_scores.bleu(["a b c d"], ["x"], ["en"])
    assert found == (0.0, 0.0, 0.0, 1)
    found = text_scores.chrf(["abc", "def"], ["abc", "xyz"])  # some resamples are all wrong
    assert found.low == 0.0
    assert found.high == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "match", "f1"),
    [
        ("The Cat!", "cat", 1.0, 1.0),
        ("a red cat", "an old red cat", 0.0, 0.8),  # 2 in common, of 2 and of 3 words
        ("cat cat", "cat", 0.0, 2 / 3),
        ("cat", "dog", 0.0, 0.0),
        ("the", "a", 1.0, 1.0),  # nothing is left of either
        ("the", "dog", 0.0, 0.0),
    ],
)
def test_answers_are_normalised_as_in_squad(reference, hypothesis, match, f1):
    assert text_scores.exact_match([reference], [hypothesis]).value == match
    assert text_scores.token_f1([reference], [hypothesis]).value == pytest.approx(f1)


def test_error_rates_weigh_by_length():
    words = text_scores.word_error_rate(["a b c", "d"], ["a c", "x y"])
    assert words.value == pytest.approx(3 / 4)  # one deleted; one substituted, one inserted
    letters = text_scores.character_error_rate(["abc", ""], ["abd", "x"])
    assert letters.value == pytest.approx(2 / 3)
    assert letters.n == 2


def test_accuracy_and_macro_f1():
    rng = np.random.default_rng(3)
    label, prediction = rng.integers(0, 3, 60), rng.integers(0, 4, 60)  # class 3 is nobody's label
    found = scores.task_scores("classify", examples(60, label=label, prediction=prediction))
    assert set(found) == {"loss/cross_entropy", "accuracy", "macro_f1"}
    assert found["accuracy"].value == pytest.approx((label == prediction).mean())
    expected = f1_score(label, prediction, average="macro", zero_division=0.0)
    assert found["macro_f1"].value == pytest.approx(expected)
    assert found["macro_f1"].low < expected < found["macro_f1"].high


def test_macro_f1_of_tables_is_that_of_the_examples():
    rng = np.random.default_rng(4)
    tables, expected = [], []
    for _ in range(5):
        label, prediction = rng.integers(0, 3, 20), rng.integers(0, 2, 20)
        table = np.zeros((3, 3), int)
        np.add.at(table, (label, prediction), 1)
        tables.append(table)
        expected.append(f1_score(label, prediction, average="macro", zero_division=0.0))
    np.testing.assert_allclose(scores.macro_f1_of(np.stack(tables)), expected)


def test_predictions_by_token():
    e = examples()
    found = scores.task_scores("language", e)
    assert found["bits_per_byte"].value == pytest.approx(e.nll.sum() / np.log(2) / e.bytes.sum())
    assert found["loss/cross_entropy"].value == pytest.approx(e.nll.sum() / e.count.sum())
    assert found["token_accuracy"].value == pytest.approx(e.correct.sum() / e.count.sum())


def test_texts_are_scored_where_there_are_some():
    without = scores.task_scores("seq2seq", examples())
    assert set(without) == {"loss/cross_entropy", "token_accuracy"}
    found = scores.task_scores("seq2seq", examples(), REFERENCES, HYPOTHESES)
    assert {"bleu", "chrf", "exact_match", "token_f1"} <= set(found)
    assert found["exact_match"].value == pytest.approx(2 / 3)  # articles do not count
    spoken = scores.task_scores("ctc", examples(), REFERENCES, HYPOTHESES)
    assert set(spoken) == {"character_error_rate", "word_error_rate"}


def matched(sources, targets, query, candidate, **more):
    embedding = np.stack([np.asarray(query, float), np.asarray(candidate, float)], axis=1)
    e = examples(len(sources), embedding=embedding)
    return scores.task_scores("match", e, targets, sources=sources, **more)


def test_recall_counts_wrong_candidates_that_are_nearer():
    angles = np.deg2rad([0.0, 30.0, 90.0])
    unit = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    candidate = 7.0 * unit[[1, 0, 2]]  # the first two are swapped; lengths do not matter
    found = matched("abc", "xyz", unit, candidate)
    assert found["recall@1"].value == pytest.approx(1 / 3)
    assert found["recall@5"].value == found["recall_back@10"].value == 1.0
    assert "choice_accuracy" not in found  # of 3 candidates there is no choice among 4


def test_equal_targets_are_right_for_each_other():
    query = np.eye(3)
    candidate = np.eye(3)[[0, 0, 2]]  # what is said of `b` is said of `a` too
    pairs = retrieval.make_pairs(np.stack([query, candidate], axis=1), "abc", "xxz")
    assert pairs.candidate.shape == (2, 3)
    np.testing.assert_array_equal(retrieval.ranks(pairs), [0, 1, 0])
    back = retrieval.make_pairs(np.stack([query, candidate], axis=1), "abc", "xxz", backward=True)
    np.testing.assert_array_equal(retrieval.ranks(back), [0, 0, 0])  # `a` is right for both x


def test_embeddings_that_are_all_alike_find_nothing():
    same = np.ones((6, 2))
    found = matched("abcdef", "uvwxyz", same, same)
    assert found["recall@1"].value == found["recall@5"].value == 0.0
    assert found["recall@10"].value == 1.0
    assert found["choice_accuracy"].value == 0.0


def test_choice_among_four_is_chance_for_random_embeddings(monkeypatch):
    monkeypatch.setattr(retrieval, "_BLOCK", 64)
    rng = np.random.default_rng(5)
    keys = range(1000)
    embedding = rng.normal(size=(1000, 2, 8))
    pairs = retrieval.make_pairs(embedding, keys, keys)
    hits = retrieval.choices(pairs, 4)
    assert hits.mean() == pytest.approx(0.25, abs=0.04)
    np.testing.assert_array_equal(hits, retrieval.choices(pairs, 4))
    assert not np.array_equal(hits, retrieval.choices(pairs, 4, seed=1))
    twin = retrieval.make_pairs(embedding[:, [0, 0]], keys, keys)
    assert retrieval.choices(twin, 4).all()
    assert (retrieval.ranks(twin) == 0).all()


def test_ranks_are_those_of_a_sort(monkeypatch):
    monkeypatch.setattr(retrieval, "_BLOCK", 3)
    rng = np.random.default_rng(6)
    embedding = rng.normal(size=(10, 2, 4))
    sources, targets = rng.integers(0, 7, 10).tolist(), rng.integers(0, 5, 10).tolist()
    pairs = retrieval.make_pairs(embedding, sources, targets)
    unit = embedding / np.linalg.norm(embedding, axis=-1, keepdims=True)
    for i, rank in enumerate(retrieval.ranks(pairs)):
        right = {t for s, t in zip(sources, targets, strict=True) if s == sources[i]}
        first = [targets.index(t) for t in dict.fromkeys(targets)]
        order = sorted(first, key=lambda j: -unit[i, 0] @ unit[j, 1])
        assert rank == next(n for n, j in enumerate(order) if targets[j] in right)


@pytest.mark.parametrize(
    ("path", "labels"),
    [([1, 1, 9, 1, 2, 2], [1, 1, 2]), ([9, 9], []), ([3, 3, 3], [3]), ([9, 4, 9, 9, 5], [4, 5])],
)
def test_a_path_of_ctc_without_repeats_and_blanks(path, labels):
    assert scores.ctc_ids(np.array(path), None, 9).tolist() == labels
    padded = np.array([*path, 7, 7])
    assert scores.ctc_ids(padded, np.arange(len(padded)) < len(path), 9).tolist() == labels


def test_the_score_that_counts():
    assert scores.primary_score("match") == "recall@5"
    assert scores.primary_score("seq2seq", "bleu") == "bleu"
    with pytest.raises(ConfigError, match=r"evaluation.primary='belu'.*bleu"):
        scores.primary_score("seq2seq", "belu")
    assert set(scores.PRIMARY.values()) <= set(scores.SCORES)
