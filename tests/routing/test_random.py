import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from moe.routing import random

N = 20000


def experts(k, num_experts=8, seed=0):
    logits, valid = jnp.zeros((4, N // 4, num_experts)), jnp.ones((4, N // 4), bool)
    plan = random.route(logits, valid, k=k, key=jax.random.key(seed)).plan
    return np.asarray(plan.expert).reshape(N, k)


@pytest.mark.parametrize("k", [1, 3])
def test_every_expert_is_equally_likely_at_every_rank(k):
    drawn = experts(k)
    for rank in range(k):
        assert chisquare(np.bincount(drawn[:, rank], minlength=8)).pvalue > 1e-4


def test_every_pair_is_equally_likely():
    drawn = np.sort(experts(2), axis=-1)
    counts = [
        ((drawn[:, 0] == a) & (drawn[:, 1] == b)).sum()
        for a, b in itertools.combinations(range(8), 2)
    ]
    assert sum(counts) == N
    assert chisquare(counts).pvalue > 1e-4


def test_gates_are_equal_and_probabilities_uniform():
    routing = random.route(
        jnp.full((1, 3, 8), 7.0), jnp.ones((1, 3), bool), k=4, key=jax.random.key(0)
    )
    np.testing.assert_array_equal(routing.plan.gate, 0.25)
    np.testing.assert_allclose(routing.probs, 1 / 8, rtol=1e-6)
    assert not np.asarray(routing.logits).any()


def test_content_of_the_logits_is_not_read():
    key, valid = jax.random.key(0), jnp.ones((2, 5), bool)
    a = random.route(jnp.zeros((2, 5, 8)), valid, k=2, key=key)
    b = random.route(jax.random.normal(key, (2, 5, 8)), valid, k=2, key=key)
    np.testing.assert_array_equal(a.plan.expert, b.plan.expert)


def test_no_key_is_an_error():
    with pytest.raises(ValueError, match="pass a key"):
        random.route(jnp.zeros((1, 1, 4)), jnp.ones((1, 1), bool), k=1)
