import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import ConfigError
from moe.routing import losses, relu, sparsity_losses, topk
from moe.routing.report import layer_report
from tests.routing.cases import random_logits, stacked_report
from tests.routing.direct import routed

B, S, E, K = 3, 6, 8, 2
LOGITS = random_logits((B, S, E))
VALID = np.arange(S) < np.array([[6], [3], [0]])
TOKENS = int(VALID.sum())
relu_l1_loss = jax.jit(sparsity_losses.relu_l1_loss)
relu_balance_loss = jax.jit(sparsity_losses.relu_balance_loss, static_argnames="scope")
heterogeneous_balance_loss = jax.jit(
    sparsity_losses.heterogeneous_balance_loss, static_argnames="factor"
)
LAMBDA = np.float32(0.25)


def report(logits=LOGITS, rows=slice(None)):
    state = {"state": {"lambda": LAMBDA}}
    routing = routed(relu.ROUTER.route, logits[rows], VALID[rows], inputs=state, k=K)
    return stacked_report(routing, VALID[rows])


def expected(logits, weigh=lambda fraction: fraction):
    """`sum_e weigh(f_e) R_e` over the valid tokens, in float64."""
    gates = np.maximum(logits.astype(np.float64), 0)[VALID]
    return (weigh((gates > 0).mean(0)) * gates.mean(0)).sum()


def test_l1_is_lambda_times_the_mean_sum_of_gates():
    value = relu_l1_loss(report(), total_tokens=TOKENS)
    np.testing.assert_allclose(value, LAMBDA * expected(LOGITS, np.ones_like), rtol=1e-5)


def test_balance_weighs_gates_by_how_many_tokens_use_them():
    value = relu_balance_loss(report(), total_tokens=TOKENS)
    np.testing.assert_allclose(value, LAMBDA * E / K * expected(LOGITS), rtol=1e-5)


def test_if_every_gate_is_positive_both_are_proportional():
    everywhere = report(np.abs(LOGITS) + 0.1)
    l1 = relu_l1_loss(everywhere, total_tokens=TOKENS)
    for scope in sparsity_losses.RELU_SCOPES:
        balance = relu_balance_loss(everywhere, total_tokens=TOKENS, scope=scope)
        np.testing.assert_allclose(balance, l1 * E / K, rtol=1e-5)


def test_balance_of_sequences_counts_each_row_by_itself():
    value = relu_balance_loss(report(), total_tokens=TOKENS, scope="sequence")
    total = 0.0
    for b, n in ((0, 6), (1, 3)):
        gates = np.maximum(LOGITS[b, :n].astype(np.float64), 0)
        total += ((gates > 0).mean(0) * gates.sum(0)).sum()
    np.testing.assert_allclose(value, LAMBDA * E / K * total / TOKENS, rtol=1e-5)
    parts = [
        relu_balance_loss(report(rows=slice(i, i + 1)), total_tokens=TOKENS, scope="sequence")
        for i in range(B)
    ]
    np.testing.assert_allclose(sum(parts), value, rtol=1e-5)


def test_balance_penalises_busy_experts_more_and_only_through_gates():
    valid = jnp.asarray(VALID)

    @jax.jit
    @jax.grad
    def gradient(x):
        state = {"lambda": jnp.asarray(LAMBDA)}
        routing = relu.route(x, valid, k=K, state=state)
        layer = layer_report(routing, routing.plan.valid, valid)
        stacked = jax.tree.map(lambda a: a[None], layer)
        return relu_balance_loss(stacked, total_tokens=TOKENS)

    f = (LOGITS > 0)[VALID].mean(0)
    slope = np.where((LOGITS > 0) & VALID[..., None], LAMBDA * E / K * f / TOKENS, 0.0)
    np.testing.assert_allclose(gradient(jnp.asarray(LOGITS)), slope, rtol=1e-5)


def test_an_empty_batch_costs_nothing():
    empty = report(rows=slice(2, 3))
    assert not relu_l1_loss(empty, total_tokens=0)
    assert not relu_balance_loss(empty, total_tokens=0)


def test_an_unknown_scope_is_refused():
    with pytest.raises(ConfigError, match="relu_balance_scope='global' is not one of"):
        relu_balance_loss(report(), total_tokens=TOKENS, scope="global")


def flat_report():
    return stacked_report(routed(topk.ROUTER.route, LOGITS, VALID, k=K), VALID)


def test_equal_experts_times_their_number_are_the_balance_loss():
    ours = heterogeneous_balance_loss(
        flat_report(), eta=jnp.ones(E), total_tokens=TOKENS, factor=float(E)
    )
    plain = jax.jit(losses.balance_loss)(flat_report(), total_tokens=TOKENS)
    np.testing.assert_allclose(ours, plain, rtol=1e-6)


def test_eta_weighs_experts_one_by_one():
    eta = np.where(np.arange(E) < 5, 1.0, 0.75).astype(np.float32)
    flat, counts = flat_report(), np.arange(1, E + 1, dtype=np.float32)[None]
    found = heterogeneous_balance_loss(
        flat, eta=jnp.asarray(eta), total_tokens=TOKENS, global_counts=jnp.asarray(counts)
    )
    P = flat.row_probs[0].sum(0) / TOKENS
    np.testing.assert_allclose(found, (eta * counts[0] / counts.sum() * P).sum(), rtol=1e-5)
