import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import ConfigError
from moe.routing import query_key, topk
from tests.routing.direct import gated, make_gate, parameter_gradients, random_tokens, routed

TOKENS = random_tokens((2, 16, 12))


def test_one_identity_head_is_the_linear_router():
    gate = make_gate(query_key.ROUTER, 12, 8, key_dim=12)
    gate.query[...] = jnp.eye(12)[:, None]
    kernel = np.asarray(gate.keys[...])[:, 0].T / np.sqrt(12)
    logits = gated(gate, TOKENS).logits
    np.testing.assert_allclose(logits, TOKENS @ kernel, atol=1e-5)
    linear = routed(topk.route, TOKENS @ kernel, k=2)
    np.testing.assert_array_equal(
        routed(query_key.ROUTER.route, logits, k=2).plan.expert, linear.plan.expert
    )


def test_heads_are_averaged():
    gate = make_gate(query_key.ROUTER, 12, 8, heads=3, key_dim=5)
    query, keys = (np.asarray(p[...], np.float64) for p in (gate.query, gate.keys))
    heads = [TOKENS @ query[:, h] @ keys[:, h].T / np.sqrt(5) for h in range(3)]
    np.testing.assert_allclose(gated(gate, TOKENS).logits, np.mean(heads, 0), atol=1e-5)


@pytest.mark.parametrize("heads", [1, 4])
def test_logits_start_at_unit_scale(heads):
    gate = make_gate(query_key.ROUTER, 64, 32, heads=heads)
    assert gate.keys.shape == (32, heads, 64 // heads)
    logits = gated(gate, random_tokens((4, 64, 64))).logits
    assert 0.8 < logits.std() < 1.25


def test_renumbering_keys_renumbers_logits():
    gate = make_gate(query_key.ROUTER, 12, 8, heads=2)
    logits, order = gated(gate, TOKENS).logits, np.random.default_rng(0).permutation(8)
    gate.keys[...] = gate.keys[...][order]
    np.testing.assert_allclose(gated(gate, TOKENS).logits, logits[..., order], atol=1e-6)


def test_the_task_reaches_queries_and_keys():
    gate = make_gate(query_key.ROUTER, 12, 8, heads=2)
    gradients = parameter_gradients(
        query_key.ROUTER, gate, TOKENS, lambda r: (r.plan.gate**2).sum(), k=2
    )
    assert set(gradients) == {"query", "keys"}
    assert all(np.abs(g).max() > 1e-3 for g in gradients.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 0}, r"heads=0 must be at least 1"),
        ({"key_dim": -2}, r"key_dim=-2 not negative"),
        ({"normalize": "sum"}, "'sum' is not one of"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        query_key.check(8, k=2, **options)
