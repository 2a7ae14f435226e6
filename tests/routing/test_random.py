import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from moe.routing import random
from tests.routing.cases import Case, random_logits

N = 20000


def experts(k):
    return Case("random", k).route(random_logits((4, N // 4, 8))).plan.expert.reshape(N, k)


def test_every_expert_is_equally_likely_at_every_rank():
    drawn = experts(3)
    for rank in range(3):
        assert chisquare(np.bincount(drawn[:, rank], minlength=8)).pvalue > 1e-4


def test_every_pair_is_equally_likely():
    drawn = np.sort(experts(2), axis=-1)
    counts = [
        ((drawn[:, 0] == a) & (drawn[:, 1] == b)).sum()
        for a, b in itertools.combinations(range(8), 2)
    ]
    assert sum(counts) == N
    assert chisquare(counts).pvalue > 1e-4


def test_gates_are_equal_probabilities_uniform_and_logits_unread():
    a, b = (Case("random", 4).route(random_logits(seed=seed)) for seed in (0, 1))
    np.testing.assert_array_equal(a.plan.expert, b.plan.expert)
    np.testing.assert_array_equal(a.plan.gate, 0.25)
    np.testing.assert_allclose(a.probs, 1 / 8, rtol=1e-6)
    assert not a.logits.any()


def test_no_key_is_an_error():
    with pytest.raises(ValueError, match="pass a key"):
        random.route(jnp.zeros((1, 1, 4)), jnp.ones((1, 1), bool), k=1)
