import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import ConfigError
from moe.routing import modality_pools, topk
from moe.routing.entropy_losses import by_modality
from tests.routing.cases import random_logits, report_of

B, S, E, K = 2, 6, 8, 2
LOGITS = random_logits((B, S, E))
VALID = np.ones((B, S), bool)
KIND = np.array([[0, 1, 1, 0, 0, 1], [1, 1, 1, 1, 0, 1]], np.int32)
POOLS = {"pools": (3, 4), "pool_shared": 1}


@functools.partial(jax.jit, static_argnames=("modalities", "pools", "pool_shared", "normalize"))
def _route(logits, valid, modality, **options):
    return modality_pools.route(logits, valid, k=K, modality=modality, **options)


def route(logits=LOGITS, kind=KIND, valid=VALID, **options):
    arrays = (jnp.asarray(x) for x in (logits, valid, kind))
    return jax.device_get(_route(*arrays, **options))


def test_a_token_chooses_the_best_of_its_pool_and_the_shared_experts():
    plan = route(**POOLS).plan
    allowed = {0: [0, 1, 2, 7], 1: [3, 4, 5, 6, 7]}
    for b, s in np.ndindex(B, S):
        inside = sorted(allowed[KIND[b, s]], key=lambda e, b=b, s=s: -LOGITS[b, s, e])[:K]
        assert plan.expert[b, s].tolist() == inside
        gate = np.exp(LOGITS[b, s, inside], dtype=np.float64)
        np.testing.assert_allclose(plan.gate[b, s], gate / gate.sum(), rtol=1e-5)
    assert plan.valid.all()


def test_isolated_pools_never_cross_and_shared_experts_see_every_kind():
    pull = LOGITS + 9 * np.eye(E, dtype=np.float32)[0] + 4 * np.eye(E, dtype=np.float32)[7]
    plan = route(pull, **POOLS).plan
    assert not ((plan.expert < 3) & (KIND == 1)[..., None]).any()
    assert not ((plan.expert >= 3) & (plan.expert < 7) & (KIND == 0)[..., None]).any()
    assert (plan.expert == 7).any(-1).all()


def test_one_pool_is_top_k_whatever_the_kind():
    ours, flat = route(), topk.route(jnp.asarray(LOGITS), jnp.asarray(VALID), k=K)
    np.testing.assert_array_equal(ours.plan.expert, flat.plan.expert)
    np.testing.assert_allclose(ours.plan.gate, flat.plan.gate, rtol=1e-6)
    np.testing.assert_allclose(ours.probs, flat.probs, rtol=1e-6)


@pytest.mark.parametrize("options", [{}, POOLS], ids=["one pool", "pools"])
def test_a_kind_that_does_not_exist_gets_no_expert(options):
    kind = np.where(np.arange(S) == 2, 5, KIND)
    routing = route(kind=kind, **options)
    np.testing.assert_array_equal(routing.plan.valid.all(-1), kind < 2)
    assert not routing.plan.gate[:, 2].any()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(routing))


def test_probs_cover_the_pool_and_their_entropy_has_a_finite_gradient():
    routing = route(**POOLS)
    np.testing.assert_allclose(routing.probs.sum(-1), 1.0, rtol=1e-5)
    assert not routing.probs[KIND == 1][:, :3].any()
    np.testing.assert_array_equal(routing.logits, LOGITS)

    @jax.jit
    @jax.grad
    def gradient(x):
        routing = modality_pools.route(
            x, jnp.asarray(VALID), k=K, modality=jnp.asarray(KIND), **POOLS
        )
        return sum(term.sum() for name, term in routing.terms.items() if "entropy" in name)

    found = np.asarray(gradient(jnp.asarray(LOGITS)))
    assert np.isfinite(found).all()
    assert np.abs(found).max() > 1e-2


def test_terms_are_told_apart_by_modality():
    valid = np.arange(S) < np.array([[S], [4]])
    routing = route(valid=valid, **POOLS)
    report = report_of(routing, valid)
    for m in (0, 1):
        here = (m == KIND) & valid
        p, chosen = routing.probs * here[..., None], routing.plan.expert[here]
        np.testing.assert_array_equal(report.row_terms["modality_tokens"][:, m], here.sum(1))
        np.testing.assert_allclose(report.row_terms["modality_probs"][:, m], p.sum(1), rtol=1e-5)
        entropy = -(p * np.log(np.where(p > 0, p, 1))).sum()
        np.testing.assert_allclose(
            report.row_terms["modality_entropy"][:, m].sum(), entropy, rtol=1e-5
        )
        load = report.row_terms["modality_load"][:, m].sum(0)
        np.testing.assert_array_equal(load, np.bincount(chosen.ravel(), minlength=E))
    # The losses of LIMoE find them.
    tokens, _, _ = jax.jit(by_modality)(jax.tree.map(lambda x: x[None], report))
    np.testing.assert_array_equal(tokens[0], [(valid & (m == KIND)).sum() for m in (0, 1)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modalities": 0}, "modalities=0 must be at least 1"),
        ({"pools": (8,)}, r"pools=\(8,\) has 1 entries for router\.modalities=2"),
        ({"pools": (4, 3)}, r"add up to model\.num_experts=8; their sum is 7"),
        ({"pools": (9, -1)}, "must be at least 0"),
        ({"pools": (7, 1)}, r"leave a modality 1 experts, fewer than router\.k=2"),
        ({"pool_shared": 1}, r"pool_shared=1 without router\.pools"),
        ({"k": 1}, r"k=1 .* never learn"),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        modality_pools.check(8, **{"k": K, **options})


def test_pools_that_fit_pass():
    modality_pools.check(8, k=K, **POOLS)
