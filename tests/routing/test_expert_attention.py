import numpy as np

from moe.routing import expert_attention
from tests.routing.direct import gated, make_gate, parameter_gradients, random_tokens

TOKENS = random_tokens((2, 6, 12))
GATE = make_gate(expert_attention.ROUTER, 12, 5)
LOGITS = gated(GATE, TOKENS).logits


def kernels():
    return (np.asarray(p[...], np.float64) for p in (GATE.query, GATE.key, GATE.value))


def test_logits_equal_attention_written_as_loops():
    query, key, value = (TOKENS @ kernel for kernel in kernels())
    for b, s in np.ndindex(2, 6):
        for e in range(5):
            weights = np.exp(query[b, s, e] * key[b, s])
            expected = (weights * value[b, s]).sum() / weights.sum()
            np.testing.assert_allclose(LOGITS[b, s, e], expected, rtol=1e-4, atol=1e-6)


def test_logits_lie_between_the_values_of_their_token():
    *_, value = (TOKENS @ kernel for kernel in kernels())
    low, high = value.min(-1, keepdims=True), value.max(-1, keepdims=True)
    np.testing.assert_array_equal(LOGITS, np.clip(LOGITS, low - 1e-6, high + 1e-6))


def test_other_tokens_change_nothing():
    for t in range(6):
        alone = np.zeros_like(TOKENS)
        alone[1, t] = TOKENS[1, t]
        np.testing.assert_array_equal(gated(GATE, alone).logits[1, t], LOGITS[1, t])


def test_renumbering_all_three_kernels_renumbers_logits():
    order = np.array([3, 1, 4, 0, 2])
    gate = make_gate(expert_attention.ROUTER, 12, 5)
    for kernel in (gate.query, gate.key, gate.value):
        kernel[...] = kernel[...][:, order]
    np.testing.assert_allclose(gated(gate, TOKENS).logits, LOGITS[..., order], atol=1e-6)
    gate.value[...] = GATE.value[...]
    assert np.abs(gated(gate, TOKENS).logits - LOGITS[..., order]).max() > 0.1


def test_the_task_reaches_all_three_kernels():
    gradients = parameter_gradients(
        expert_attention.ROUTER, GATE, TOKENS, lambda r: (r.plan.gate**2).sum(), k=2
    )
    assert set(gradients) == {"query", "key", "value"}
    assert all(np.abs(g).max() > 1e-4 for g in gradients.values())
