"""Similarity of experts: what it must find, and what it must not be fooled by."""

import numpy as np
import pytest

from moe.evaluation import expert_similarity as es

E, D, P, F, T = 3, 6, 2, 5, 40


@pytest.fixture
def experts() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(E, D, P, F)), rng.normal(size=(E, F, D))


def test_cosines_of_router_columns():
    kernel = np.array([[1.0, 2.0, 0.0], [0.0, 0.0, -3.0]])  # columns (1,0), (2,0), (0,-3)
    found = es.router_similarity(np.stack([kernel, -kernel]))
    np.testing.assert_allclose(found, [[[1, 1, 0], [1, 1, 0], [0, 0, 1]]] * 2)
    np.testing.assert_allclose(es.mean_of_pairs(found), [1 / 3] * 2)
    np.testing.assert_allclose(es.mean_of_pairs(found[0]), 1 / 3)
    np.testing.assert_array_equal(es.router_similarity(np.zeros((2, 2))), 0.0)


def test_matching_sees_through_a_permutation_of_hidden_units(experts):
    wi, wo = experts
    order = np.array([3, 0, 4, 1, 2])
    wi[1], wo[1] = wi[0][..., order], wo[0][order]
    raw, matched = es.weight_similarity(wi, wo), es.weight_similarity(wi, wo, matched=True)
    assert raw[0, 1] < 0.6
    assert matched[0, 1] == pytest.approx(1.0)
    assert matched[0, 2] < 0.9
    for found in (raw, matched):
        np.testing.assert_allclose(found, found.T)
        np.testing.assert_allclose(np.diagonal(found), 1.0)
    assert (matched >= raw - 1e-12).all()
    flat = np.concatenate([wi.reshape(E, -1), wo.reshape(E, -1)], axis=1)
    np.testing.assert_allclose(raw, _cosine(flat))


def _cosine(flat: np.ndarray) -> np.ndarray:
    size = np.linalg.norm(flat, axis=1)
    return flat @ flat.T / np.outer(size, size)


def test_alignment_of_outputs_ignores_rotation_scale_and_shift():
    rng = np.random.default_rng(1)
    one, other = rng.normal(size=(2, T, D))
    rotation = np.linalg.qr(rng.normal(size=(D, D)))[0]
    found = es.linear_cka(np.stack([one, 3 * one @ rotation + 1, other, np.ones((T, D))]))
    np.testing.assert_allclose(found[0, 1], 1.0)
    assert found[0, 2] < 0.4
    np.testing.assert_array_equal(found[3], 0.0)
    gram = [x @ x.T for x in (one - one.mean(axis=0), other - other.mean(axis=0))]
    by_grams = (gram[0] * gram[1]).sum() / np.linalg.norm(gram[0]) / np.linalg.norm(gram[1])
    np.testing.assert_allclose(found[0, 2], by_grams)


def test_output_similarity_is_a_mean_over_tokens():
    one = np.array([[1.0, 0.0], [0.0, 2.0]])
    two = np.array([[3.0, 0.0], [1.0, 0.0]])
    np.testing.assert_allclose(es.output_similarity(np.stack([one, two])), [[1, 0.5], [0.5, 1]])
