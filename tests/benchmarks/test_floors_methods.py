"""Baselines beside the same sums done by hand or in plain Python."""

import bz2
from collections import Counter, defaultdict
import itertools
import math

import numpy as np
import pytest

from benchmarks.floors_methods import choose, classify, compress, result, translate

TEXTS = ("good good film", "bad film", "good plot", "bad bad plot bad", "fine bad good film")
LABELS = np.array([1, 0, 1, 0, 1])


def bayes_by_hand(text: str, kind: str) -> int:
    """log p(c) + log p(words | c) with one added to each count, words outside of train left out."""
    vocabulary = sorted(set(" ".join(TEXTS).split()))
    scores = []
    for label in (0, 1):
        own = [t.split() for t, one in zip(TEXTS, LABELS, strict=True) if one == label]
        score = math.log(len(own) / len(TEXTS))
        if kind == "multinomial":
            counts = Counter(word for words in own for word in words)
            below = counts.total() + len(vocabulary)
            known = [word for word in text.split() if word in vocabulary]
            score += sum(math.log((counts[word] + 1) / below) for word in known)
        else:
            for word in vocabulary:
                p = (sum(word in words for words in own) + 1) / (len(own) + 2)
                score += math.log(p if word in text.split() else 1 - p)
        scores.append(score)
    return int(np.argmax(scores))


@pytest.mark.parametrize("kind", ["bernoulli", "multinomial"])
def test_naive_bayes_by_hand(kind):
    method = getattr(classify, f"{kind}_bayes")
    asked = [
        "good",
        "bad",
        "film film bad good good",
        "plot",
        "film unseen",
        "bad bad good good film",
    ]
    got = method(TEXTS, LABELS, asked)
    assert list(got) == [bayes_by_hand(text, kind) for text in asked]
    assert set(got) == {0, 1}


def test_the_two_naive_bayes_differ():
    """Counts sway one of them, absences the other."""
    asked = "good bad bad bad"
    assert bayes_by_hand(asked, "multinomial") == 0
    assert list(classify.multinomial_bayes(TEXTS, LABELS, [asked])) == [0]


def test_tfidf_regression_learns_words():
    train = ([*TEXTS, *TEXTS], np.tile(LABELS, 2))
    got = classify.tfidf_regression(train, (TEXTS, LABELS), ["good", "so bad", "a good good film"])
    assert list(got) == [1, 0, 1]


def test_regression_takes_the_strength_that_is_best_on_valid():
    """Valid has another slope than train: which strength wins shows in the predictions."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 2)).astype(np.float32)
    y = (x[:, 0] + 0.5 > 0).astype(int)
    asked = rng.normal(size=(500, 2)).astype(np.float32)
    without = classify.regression((x, y), (x[:0], y[:0]), asked)
    best = classify.regression((x, y), (asked, (asked[:, 0] + 0.5 > 0).astype(int)), asked)
    truth = asked[:, 0] + 0.5 > 0
    assert np.mean(best == truth) >= np.mean(without == truth) > 0.9


def test_majority_and_centroid():
    assert list(classify.majority(np.array([2, 0, 2, 1]), 3)) == [2, 2, 2]
    train = np.array([[0.0, 0], [0, 2], [10, 10], [10, 12]])
    got = classify.nearest_centroid(train, np.array([0, 0, 1, 1]), np.array([[4.0, 5], [6, 7]]))
    assert list(got) == [0, 1]


def test_pixels_are_rows_of_shares():
    rows = classify.pixels([np.full((2, 2, 1), 255, np.uint8), np.zeros((2, 2, 1), np.uint8)])
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, [[1] * 4, [0] * 4])


def test_standardise_uses_train_alone():
    train, other = classify.standardise(np.array([[0.0], [2.0]]), np.array([[3.0]]))
    np.testing.assert_allclose(train, [[-1], [1]], atol=1e-5)
    np.testing.assert_allclose(other, [[2]], atol=1e-5)


def test_sound_is_mean_and_deviation_by_band():
    rate = 8000
    steady = np.sin(2 * np.pi * 1000 * np.arange(rate) / rate)
    beating = steady * (np.arange(rate) // 800 % 2)
    still, moving = (classify.sound((8000 * x).astype(np.int16), rate) for x in (steady, beating))
    assert still.shape == (80,)
    mean, deviation = np.split(still, 2)
    peak = mean.argmax()
    assert deviation[peak] < 0.1
    assert np.split(moving, 2)[1][peak] > 1
    assert np.isfinite(classify.sound(np.ones(5, np.int16), rate)).all()


def model1_by_hand(pairs, iterations):
    """Counts in dictionaries, one link at a time (Brown et al. 1993, equations 16 and 17)."""
    words = {f for _, target in pairs for f in target}
    t = defaultdict(lambda: 1 / len(words))
    for _ in range(iterations):
        counts, totals = defaultdict(float), defaultdict(float)
        for source, target in pairs:
            for f in target:
                below = sum(t[f, e] for e in ["", *source])
                for e in ["", *source]:
                    counts[f, e] += t[f, e] / below
                    totals[e] += t[f, e] / below
        t = defaultdict(float, {(f, e): c / totals[e] for (f, e), c in counts.items()})
    return t


CLASSIC = [("the house", "das Haus"), ("the book", "das Buch"), ("a book", "ein Buch")]
PAIRS = [(a.split(), b.split()) for a, b in CLASSIC]


@pytest.mark.parametrize("iterations", [1, 5])
def test_model1_is_that_of_one_link_at_a_time(iterations):
    table = translate.model1(*zip(*PAIRS, strict=True), iterations=iterations, keep=9)
    want = model1_by_hand(PAIRS, iterations)
    got = {(f, e): chance for e, found in table.best.items() for f, chance in found}
    assert got.keys() == set(want)
    for key, chance in got.items():
        np.testing.assert_allclose(chance, want[key], rtol=1e-9)


def test_model1_finds_the_words_of_the_classic_corpus():
    table = translate.model1(*zip(*PAIRS, strict=True), iterations=30)
    got = {e: table.best[e][0][0] for e in ("the", "house", "book", "a")}
    assert got == {"the": "das", "house": "Haus", "book": "Buch", "a": "ein"}
    assert translate.translate("a house".split(), table) == ["ein", "Haus"]
    for found in table.best.values():
        assert sum(chance for _, chance in found) == pytest.approx(1)


def test_repeated_words_count_each_time():
    pairs = [(["x", "x"], ["y", "z"]), (["x"], ["y"])]
    table = translate.model1(*zip(*pairs, strict=True), iterations=3, keep=9)
    for e, found in table.best.items():
        for f, chance in found:
            # A source word twice has twice the share, so each link is one of the plain sum.
            np.testing.assert_allclose(chance, model1_by_hand(pairs, 3)[f, e], rtol=1e-9)


def test_words_outside_of_the_table_stay_and_case_is_second():
    table = translate.Table({"the": (("das", 1.0),), "God": (("Gott", 1.0),)})
    got = translate.translate(["The", "god", "Zorn", "God"], table)
    assert got == ["das", "Gott", "Zorn", "Gott"]


def test_viterbi_finds_the_best_of_all_sequences():
    table = translate.Table(
        {
            "a": (("p", 0.6), ("q", 0.4)),
            "b": (("r", 0.5), ("s", 0.3), ("t", 0.2)),
            "c": (("u", 0.7), ("p", 0.3)),
        }
    )
    model = translate.bigrams([["q", "t", "u"], ["q", "s", "p"], ["p", "t", "p"], ["q", "r"]])
    words = ["a", "b", "c", "b"]

    def score(chosen):
        ends = zip([None, *chosen], [*chosen, None], strict=True)
        chances = [dict(table.best[e])[f] for e, f in zip(words, chosen, strict=True)]
        return sum(map(math.log, chances)) + sum(translate.log_chance(model, *x) for x in ends)

    every = [[]]
    for word in words:
        every = [[*path, f] for path in every for f, _ in table.best[word]]
    best = max(every, key=score)
    assert translate.translate(words, table, model) == best
    assert best != translate.translate(words, table)


def test_bigram_chances_sum_to_one():
    model = translate.bigrams([["a", "b"], ["a"], ["b", "b", "a"]])
    outside = len(model.singles)  # the one added count of all unseen words together
    for first in ("a", "b", None):
        known = sum(math.exp(translate.log_chance(model, first, x)) for x in ("a", "b", None))
        assert known + 0.1 / (model.total + outside + 1) == pytest.approx(1)


@pytest.mark.parametrize(
    "text", ["Open the file, then (maybe) close it.", "打开文件。", "打开 文件。再关闭。"]
)
def test_words_join_to_what_they_were_split_from(text):
    joined = translate.join_words(translate.split_words(text))
    assert joined.replace("( ", "(") == text.replace("打开 ", "打开")


def test_memory_answers_with_the_most_alike():
    train = ["open the file", "close the window", "save the file now"]
    answers = ["A", "B", "C"]
    assert translate.memory(train, answers, ["close window", "open file", "now save"]) == list(
        "BAC"
    )


def kneser_ney_by_hand(texts, length):
    """p(symbol | context) by recursion over dictionaries of tuples."""
    pad = (compress.END,) * length
    rows = [(*pad, *text, compress.END) for text in texts]
    ends = [(row, i) for row in rows for i in range(length, len(row))]
    counts = {length: Counter(row[i - length + 1 : i + 1] for row, i in ends)}
    for n in range(length - 1, 0, -1):
        counts[n] = Counter(gram[1:] for gram in counts[n + 1])

    def chance(context, symbol):
        n = len(context) + 1
        below = chance(context[1:], symbol) if context else 1 / compress.SYMBOLS
        following = {g: c for g, c in counts[n].items() if g[:-1] == context}
        if not following:
            return below
        once, twice = (sum(c == k for c in counts[n].values()) for k in (1, 2))
        d = once / (once + 2 * twice) if once else 0.5
        kept = max(0, following.get((*context, symbol), 0) - d)
        return (kept + d * len(following) * below) / sum(following.values())

    return chance


TRAIN = (b"abracadabra", b"abra", b"cad", b"", b"abrac")


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_kneser_ney_by_hand(length):
    orders = compress.kneser_ney(TRAIN, length)
    chance = kneser_ney_by_hand(TRAIN, length)
    asked = (b"abrad", b"", b"xyz", b"cadabra")
    pad = (compress.END,) * (length - 1)
    for text, bits in zip(asked, compress.ngram_bits(orders, asked), strict=True):
        row = (*pad, *text, compress.END)
        steps = range(len(pad), len(row))
        want = -sum(math.log2(chance(row[i - len(pad) : i], row[i])) for i in steps)
        assert bits == pytest.approx(want)


def test_chances_of_the_next_byte_sum_to_one():
    chance = kneser_ney_by_hand(TRAIN, 3)
    for context in ((compress.END, ord("a")), (ord("a"), ord("b")), (ord("x"), ord("a"))):
        assert sum(chance(context, s) for s in range(compress.SYMBOLS)) == pytest.approx(1)


def test_keys_of_seven_symbols_do_not_collide():
    """The longest keys: 63 bits, the highest symbol everywhere."""
    row = np.full(9, compress.END, np.uint64)
    row[1] = 255
    keys = compress.ngram_keys(row, np.arange(6, 9), 7)
    assert keys[0] != keys[1]
    assert keys[2] == int("100000000" * 7, 2)
    with pytest.raises(ValueError, match="8 symbols"):
        compress.kneser_ney(TRAIN, 8)


def test_a_longer_history_predicts_repetition_better():
    text = b"the quick brown fox jumps over the lazy dog " * 20
    short, long = (compress.ngram_bits(compress.kneser_ney([text], n), [text]) for n in (1, 5))
    assert long[0] < short[0] / 3


def test_what_was_seen_before_compresses_better():
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, 2000, np.uint8).tobytes()
    for name, run in compress.COMPRESSORS.items():
        assert compress.compressed_bits(data, run) > 7.9, name
    xz = compress.COMPRESSORS["xz"]
    assert compress.compressed_bits(data, xz, before=data) < 0.5
    want = 8 * len(bz2.compress(data, 9)) / 2000
    assert compress.compressed_bits(data, compress.COMPRESSORS["bz2"]) == want


def test_recall_counts_equal_scores_by_chance():
    scores = [np.array([1.0, 1, 1, 1]), np.array([3.0, 1, 2]), np.array([0.0, 5, 0, 0])]
    np.testing.assert_allclose(choose.recall(scores, [[2], [0], [3]]), [0.25, 1, 0])
    np.testing.assert_allclose(choose.recall(scores, [[2], [1], [3]], k=2), [0.5, 0, 1 / 3])
    np.testing.assert_allclose(choose.recall([np.zeros(10)], [[7]], k=5), [0.5])


@pytest.mark.parametrize("k", [1, 2, 3])
def test_recall_is_the_share_of_all_orders(k):
    scores, right = np.array([2.0, 1, 1, 1, 0, 1]), [1, 3, 4]
    hits = []
    for order in itertools.permutations(range(6)):
        ranked = sorted(order, key=lambda i: -scores[i])  # stable: the order among equal ones
        hits.append(bool(set(ranked[:k]) & set(right)))
    np.testing.assert_allclose(choose.recall([scores], [right], k), [np.mean(hits)])


def test_wrong_words_are_different_and_wrong():
    words = list("abcdef")
    right = [["a"], ["b", "c"], ["f"]] * 20
    drawn = choose.wrong_words(right, words, 4)
    for own, found in zip(right, drawn, strict=True):
        assert len(set(found)) == 3
        assert not set(found) & set(own)
    assert set(itertools.chain(*drawn)) == set(words)
    assert drawn == choose.wrong_words(right, words, 4)
    with pytest.raises(ValueError, match="too few"):
        choose.wrong_words([["a", "b", "c", "d"]], words, 4)


def test_overlap_prefers_the_word_with_like_definitions():
    train = [
        ("a small domestic feline", "cat"),
        ("a loyal canine animal", "dog"),
        ("feline", "cat"),
    ]
    scores = choose.overlap(train, ["feline pet", "loyal"], [("dog", "cat"), ("ox", "dog")])
    assert [int(one.argmax()) for one in scores] == [1, 1]
    assert scores[0][0] == scores[1][0] == 0  # no word in common; no definition in train


def test_histogram_and_nearest():
    red, blue = (np.zeros((4, 4, 3), np.uint8) for _ in range(2))
    red[..., 0], blue[..., 2] = 255, 200
    dark = red.copy()
    dark[..., 0] = 210
    rows = choose.histogram([red, blue])
    np.testing.assert_allclose(rows.sum(1), 1)
    assert list(choose.nearest(rows, choose.histogram([dark, blue]))) == [0, 1]


def test_name_likeness_is_greatest_for_the_same_name():
    names = ["red apple", "green apple", "dog face"]
    scores = choose.name_likeness(["dog", "green apple", "red apples"], names)
    assert list(scores.argmax(1)) == [2, 1, 0]


def test_rows_of_the_tables():
    floors = [result.accuracy("toy", "test", "majority", np.ones(2000, bool))]
    floors.append(result.Floor("toy", "test", "table", "BLEU", result.exact(12.345, 7)))
    assert result.cells(floors[0])[-3:] == ("1.000", "1.000 to 1.000", "2,000")
    assert result.cells(floors[1])[-3:] == ("12.3", "-", "7")
    assert "| toy | test | table | BLEU | 12.3 | - | 7 | abc |" in result.markdown(floors, "abc")
    assert result.text(floors).splitlines()[0].split() == list(result.HEADER)
