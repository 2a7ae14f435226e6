"""Measures of routing against loops over tokens, numbers worked out by hand and planted structure."""

import math

import numpy as np
import pytest

from moe.evaluation import routing_analysis as ra

L, B, S, K, E = 2, 3, 40, 2, 5
# Top-2 of the eight tokens whose co-activation and loads (7, 4, 3, 2) are worked out by hand.
GOLDEN = np.array([[0, 1], [0, 2], [0, 3], [1, 2], [2, 0], [0, 1], [3, 0], [0, 1]])[None, None]


def draw(seed: int, *, k: int = K, experts: int = E, shape: tuple = (L, B, S)) -> np.ndarray:
    """Different experts for each token, at random."""
    order = np.random.default_rng(seed).random((*shape, experts)).argsort(axis=-1)
    return order[..., :k].astype(np.int32)


def with_holes(seed: int) -> np.ndarray:
    """As dropping and padding leave them."""
    rng = np.random.default_rng(seed)
    choices = np.where(rng.random((L, B, S, K)) < 0.2, -1, draw(seed))
    choices[:, 0, :5] = -1
    return choices


def test_golden_coactivation():
    counts = ra.coactivation_counts(GOLDEN, 4)
    assert np.diagonal(counts[0]).tolist() == [7, 4, 3, 2]
    expected = [[1, 0.429, 0.286, 0.286], [0.75, 1, 0.25, 0], [0.667, 0.333, 1, 0], [1, 0, 0, 1]]
    np.testing.assert_allclose(ra.coactivation(counts)[0], expected, atol=5e-4)
    strongest = np.mean([3 / 7, 0.75, 2 / 3, 1])
    np.testing.assert_allclose(ra.strongest_partner(counts), [strongest])


def test_coactivation_counts_every_pair_of_a_token_once():
    """Consecutive pairs alone would miss the pair of first and third choice."""
    choices = np.array([[[[0, 1, 2], [2, 0, -1], [-1, -1, -1]]]])
    expected = [[2, 1, 2, 0], [1, 1, 1, 0], [2, 1, 2, 0], [0, 0, 0, 0]]
    counts = ra.coactivation_counts(choices, 4)
    np.testing.assert_array_equal(counts[0], expected)
    assert ra.coactivation(counts)[0, 3].tolist() == [0, 0, 0, 0]


def test_overlap_equals_a_loop_over_sets():
    one, two = with_holes(0), with_holes(1)
    sums = ra.overlap_counts(one, two, E)
    for layer in range(L):
        shared = reference = changed = tokens = 0
        for b in range(B):
            for s in range(S):
                x, y = ({int(e) for e in c[layer, b, s] if e >= 0} for c in (one, two))
                shared, reference = shared + len(x & y), reference + len(y)
                changed, tokens = changed + (x != y), tokens + bool(x | y)
        assert [int(a[layer]) for a in sums] == [shared, reference, changed, tokens]


def test_saturation_of_oneself_is_one_whatever_the_order():
    choices = with_holes(3)
    sums = ra.overlap_counts(choices[..., ::-1], choices, E)
    np.testing.assert_array_equal(ra.saturation(sums), 1.0)
    np.testing.assert_array_equal(ra.flip_rate(sums), 0.0)


def test_random_routers_share_k_of_e_choices():
    shape, k, experts = (1, 1, 20_000), 8, 32
    one, two = (draw(seed, k=k, experts=experts, shape=shape) for seed in (4, 5))
    share = ra.saturation(ra.overlap_counts(one, two, experts))
    # Hypergeometric overlap of each token.
    deviation = math.sqrt(k * (k / experts) * (1 - k / experts) * (experts - k) / (experts - 1)) / k
    np.testing.assert_allclose(share, k / experts, atol=5 * deviation / math.sqrt(shape[-1]))
    assert ra.flip_rate(ra.overlap_counts(one, two, experts)) > 0.99


def test_sums_of_batches_are_sums_of_the_whole():
    one, two = with_holes(6), with_holes(7)
    ids = np.random.default_rng(8).integers(0, 9, (B, S))
    whole = ra.overlap_counts(one, two, E)
    parts = [ra.overlap_counts(one[:, at], two[:, at], E) for at in (slice(0, 1), slice(1, B))]
    for a, b in zip(ra.add(*parts), whole, strict=True):
        np.testing.assert_array_equal(a, b)
    split = sum(ra.coactivation_counts(one[:, at], E) for at in (slice(0, 1), slice(1, B)))
    np.testing.assert_array_equal(split, ra.coactivation_counts(one, E))
    split = sum(ra.visit_counts(one[:, i : i + 1], ids[i : i + 1], 9, E) for i in range(B))
    np.testing.assert_array_equal(split, ra.visit_counts(one, ids, 9, E))


def test_visits_equal_a_loop():
    choices, ids = with_holes(9), np.random.default_rng(10).integers(0, 7, (B, S))
    expected = np.zeros((L, 7, E), int)
    for at in np.ndindex(L, B, S, K):
        if choices[at] >= 0:
            expected[at[0], ids[at[1], at[2]], choices[at]] += 1
    np.testing.assert_array_equal(ra.visit_counts(choices, ids, 7, E), expected)


def test_specialisation_rows_sum_to_k():
    choices, kinds = draw(11), np.random.default_rng(12).integers(0, 3, (B, S))
    tokens = np.bincount(kinds.ravel(), minlength=4)  # nobody is of the fourth kind
    counts = ra.visit_counts(choices, kinds, 4, E)
    shares = ra.specialisation(counts, tokens)
    np.testing.assert_allclose(shares.sum(axis=-1), np.broadcast_to([K, K, K, 0], (L, 4)))


def test_information_of_domains_with_experts_of_their_own_and_in_common():
    own = np.array([[[6, 6, 0, 0], [0, 0, 6, 6]]])
    common = np.array([[[3, 1, 2, 4], [6, 2, 4, 8]]])
    np.testing.assert_allclose(ra.mutual_information(own), math.log(2))
    np.testing.assert_allclose(ra.mean_divergence(own), math.log(2))
    np.testing.assert_allclose(ra.mutual_information(common), 0, atol=1e-12)
    np.testing.assert_allclose(ra.mean_divergence(common), 0, atol=1e-12)


def test_divergence_of_two_equal_domains_is_their_information():
    """JS with equal weights is I(domain; expert); domains without text count for nothing."""
    rng = np.random.default_rng(13)
    counts = rng.integers(1, 50, (L, 2, E)).astype(float)
    counts *= 1000 / counts.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(ra.mean_divergence(counts), ra.mutual_information(counts))
    silent = np.concatenate([counts, np.zeros((L, 1, E))], axis=1)
    np.testing.assert_allclose(ra.mean_divergence(silent), ra.mean_divergence(counts))
    full = ra.divergence(silent)
    np.testing.assert_allclose(full, full.swapaxes(1, 2))
    np.testing.assert_array_equal(full[:, 2], 0.0)


def test_planted_domains_show_and_shuffled_ones_do_not():
    rng = np.random.default_rng(14)
    domain = rng.integers(0, 2, (1, 4000))
    choices = (2 * domain + rng.integers(0, 2, domain.shape))[None, ..., None]
    for kinds, expected in ((domain, math.log(2)), (rng.permutation(domain[0])[None], 0.0)):
        counts = ra.visit_counts(choices, kinds, 2, 4)
        np.testing.assert_allclose(ra.mutual_information(counts), expected, atol=2e-3)


def test_position_bins_are_equal_parts_of_the_row():
    positions = np.arange(10)[None]
    assert ra.position_bins(positions, 5).tolist() == [[0, 0, 1, 1, 2, 2, 3, 3, 4, 4]]
    assert ra.position_bins(positions, 3)[0].max() == 2


def test_vocabulary_specialisation_of_hash_and_random_routing():
    rng = np.random.default_rng(15)
    ids = rng.integers(0, 20, (1, 20_000))
    tokens = np.bincount(ids.ravel(), minlength=21)
    hashed = (ids % 4)[None, ..., None]
    random = rng.integers(0, 4, (1, *ids.shape, 1))
    for choices, expected, tolerance in ((hashed, 1.0, 0), (random, 0.25, 0.03)):
        counts = ra.visit_counts(choices, ids, 21, 4)
        found = ra.vocabulary_specialisation(counts, tokens, top=5)
        np.testing.assert_allclose(found, expected, atol=tolerance)


def test_vocabulary_specialisation_ignores_rare_ids():
    """Id 2 came once and went to expert 1: certain, and it says nothing."""
    tokens = np.array([20, 10, 1])
    counts = np.array([[[15, 5], [4, 6], [0, 1]]])
    found = ra.vocabulary_specialisation(counts, tokens, top=1)
    np.testing.assert_allclose(found, [(0.75 + 0.6) / 2])
    np.testing.assert_allclose(
        ra.vocabulary_specialisation(counts, tokens, top=1, least=1), [(0.75 + 1) / 2]
    )
    np.testing.assert_array_equal(ra.vocabulary_specialisation(counts, tokens, least=50), [0])


def test_causal_gap_is_nats_a_token():
    assert ra.causal_gap(330.0, 300.0, 100.0) == pytest.approx(0.3)
    assert ra.causal_gap(0.0, 0.0, 0.0) == 0.0


def test_nothing_counted_is_nothing_measured():
    none = np.full((L, B, S, K), -1)
    sums = ra.overlap_counts(none, none, E)
    counts = ra.visit_counts(none, np.zeros((B, S), int), 3, E)
    for value in (
        ra.saturation(sums),
        ra.flip_rate(sums),
        ra.strongest_partner(ra.coactivation_counts(none, E)),
        ra.mutual_information(counts),
        ra.mean_divergence(counts),
        ra.specialisation(counts, np.zeros(3)),
    ):
        np.testing.assert_array_equal(value, 0.0)


def test_information_share_of_kinds_that_experts_tell_apart_in_part():
    own = np.array([[[6, 6, 0, 0], [0, 0, 2, 2]], [[3, 1, 0, 0], [6, 2, 0, 0]]])
    np.testing.assert_allclose(ra.information_share(own), [1.0, 0.0], atol=1e-12)
    noisy = np.array([[[3, 1], [1, 3]]])
    expected = 1 + 0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)  # binary symmetric channel
    np.testing.assert_allclose(ra.information_share(noisy), [expected])
    np.testing.assert_array_equal(ra.information_share(np.array([[[3, 1], [0, 0]]])), [0.0])


def test_shuffled_kinds_are_the_same_kinds_elsewhere():
    kind = np.array([0, 1, 2, 3, 4, 5])
    mask = np.array([True, False, True, True, False, True])
    draws = np.array([0.9, 0.0, 0.1, 0.5, 0.0, 0.2])
    # held: 0 2 3 5; by their draws: 2 5 3 0
    np.testing.assert_array_equal(ra.shuffled(kind, mask, draws), [2, 1, 5, 3, 4, 0])


def test_few_samples_inform_by_chance_and_the_control_shows_how_much():
    rng = np.random.default_rng(0)
    n, M, experts = 400, 4, 8
    choices = rng.integers(0, experts, (1, n, 1, 1)).astype(np.int32)
    kind = rng.integers(0, M, n)
    mixed = ra.shuffled(kind, np.ones(n, bool), rng.random(n))
    found, control = (
        ra.mutual_information(ra.visit_counts(choices, k[:, None], M, experts))
        for k in (kind, mixed)
    )
    bias = (M - 1) * (experts - 1) / (2 * n)
    np.testing.assert_allclose(found, bias, rtol=0.6)
    np.testing.assert_allclose(control, bias, rtol=0.6)
    own = ra.mutual_information(ra.visit_counts(kind[None, :, None, None], kind[:, None], M, M))
    shares = np.bincount(kind) / n
    np.testing.assert_allclose(own, -(shares * np.log(shares)).sum())


def test_favourites_equal_a_loop_over_ids():
    choices, ids = with_holes(14), np.random.default_rng(15).integers(0, 6, (B, S))
    counts = ra.visit_counts(choices, ids, 7, E)  # nobody is of the seventh id
    found = ra.favourites(counts, least=30, top=3)
    for layer in range(L):
        c = counts[layer]
        for e in range(E):
            lifts = {
                v: (c[v, e] / c[v].sum()) / (c[:, e].sum() / c.sum())
                for v in range(7)
                if c[v].sum() >= 30
            }
            best = sorted((v for v in lifts if lifts[v] > 1), key=lambda v: -lifts[v])[:3]
            listed = found.ids[layer, e]
            assert listed[listed >= 0].tolist() == best
            np.testing.assert_array_equal(found.counts[layer, e, : len(best)], c[best, e])
            np.testing.assert_allclose(found.lift[layer, e, : len(best)], [lifts[v] for v in best])


def test_favourites_of_equal_lift_are_the_frequent_ones():
    counts = np.array([[[20, 0], [50, 0], [30, 0], [0, 100], [3, 0]]])
    found = ra.favourites(counts, least=10, top=4)
    assert found.ids[0].tolist() == [[1, 2, 0, -1], [3, -1, -1, -1]]
    assert found.counts[0].tolist() == [[50, 30, 20, 0], [100, 0, 0, 0]]
    np.testing.assert_allclose(found.lift[0, 0], [203 / 103] * 3 + [0])
