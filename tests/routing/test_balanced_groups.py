import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import ConfigError
from moe.routing import balanced_groups, topk
from tests.routing.cases import random_logits

B, S, E = 2, 6, 8
LOGITS = random_logits((B, S, E))
VALID = np.ones((B, S), bool)


@functools.partial(jax.jit, static_argnames=("k", "groups", "normalize"))
def _route(logits, valid, **options):
    return balanced_groups.route(logits, valid, **options)


def route(logits=LOGITS, **options):
    return jax.device_get(_route(jnp.asarray(logits), jnp.asarray(VALID), **options))


@pytest.mark.parametrize(("k", "groups"), [(4, 2), (4, 4), (6, 2)])
def test_every_token_takes_equally_many_experts_of_every_group(k, groups):
    skewed = LOGITS + np.linspace(9, -9, E, dtype=np.float32)
    group = route(skewed, k=k, groups=groups).plan.expert // (E // groups)
    for g in range(groups):
        np.testing.assert_array_equal((group == g).sum(-1), k // groups)


def test_it_takes_the_best_of_each_group_and_weighs_by_the_one_softmax():
    routing = route(k=4, groups=2)
    grouped = LOGITS.reshape(B, S, 2, 4)
    best = np.argsort(-grouped, axis=-1)[..., :2] + np.array([0, 4])[:, None]
    np.testing.assert_array_equal(routing.plan.expert, best.reshape(B, S, 4))
    p = np.exp(LOGITS, dtype=np.float64)
    p /= p.sum(-1, keepdims=True)
    np.testing.assert_allclose(
        routing.plan.gate, np.take_along_axis(p, best.reshape(B, S, 4), -1), rtol=1e-5
    )
    np.testing.assert_allclose(routing.terms["group_probs"], p.reshape(B, S, 2, 4).sum(-1), 1e-5)
    np.testing.assert_allclose(routing.terms["within_probs"].reshape(B, S, 2, 4).sum(-1), 1, 1e-5)


@pytest.mark.parametrize("normalize", ["none", "renormalize"])
def test_one_group_is_top_k(normalize):
    ours = route(k=2, groups=1, normalize=normalize).plan
    flat = topk.route(jnp.asarray(LOGITS), jnp.asarray(VALID), k=2, normalize=normalize).plan
    np.testing.assert_array_equal(ours.expert, flat.expert)
    np.testing.assert_allclose(ours.gate, flat.gate, rtol=1e-6)


def test_renumbering_groups_and_experts_inside_them_renumbers_the_choices():
    rng = np.random.default_rng(0)
    a = route(k=4, groups=2).plan
    for _ in range(10):
        order = rng.permuted(np.arange(E).reshape(2, 4), axis=1)[rng.permutation(2)].reshape(-1)
        b = route(LOGITS[..., order], k=4, groups=2).plan
        np.testing.assert_array_equal(np.sort(order[b.expert], -1), np.sort(a.expert, -1))
        np.testing.assert_allclose(np.sort(b.gate, -1), np.sort(a.gate, -1), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 3}, r"groups=3 must .* divide model\.num_experts=8"),
        ({"groups": 4}, r"k=2 must be a multiple of router\.groups=4"),
        ({"normalize": "sum"}, "normalize='sum' is not one of"),
        ({"k": 1, "groups": 1, "normalize": "renormalize"}, r"k=1 .* would never learn"),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        balanced_groups.check(8, **{"k": 2, **options})
