import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import ConfigError
from moe.routing import balanced_groups, level_losses, losses, two_level
from moe.routing.report import layer_report
from tests.routing.cases import random_logits, stacked_report
from tests.routing.direct import routed

B, S, E, G = 3, 6, 8, 4
Y = E // G
LOGITS, GROUPS = random_logits((B, S, E)), random_logits((B, S, G), seed=1)
VALID = np.arange(S) < np.array([[6], [3], [0]])
TOKENS = int(VALID.sum())
group_balance_loss = jax.jit(level_losses.group_balance_loss, static_argnames="scope")
within_group_balance_loss = jax.jit(level_losses.within_group_balance_loss, static_argnames="scope")
balance_loss = jax.jit(losses.balance_loss, static_argnames=("scope", "counts"))
BOTH = [group_balance_loss, within_group_balance_loss]


def decide(logits=LOGITS, group_logits=GROUPS, valid=VALID, **options):
    inputs = {"group_logits": group_logits}
    options = {"k": 2, "groups_kept": 2, **options}
    return routed(two_level.ROUTER.route, logits, valid, inputs=inputs, **options)


def report(rows=slice(None), **options):
    routing = decide(LOGITS[rows], GROUPS[rows], VALID[rows], **options)
    return stacked_report(routing, VALID[rows])


def levels(rows=slice(None)):
    """Both losses from their definitions, token by token, in float64."""
    routing, valid = decide(), VALID[rows]
    expert = routing.plan.expert[rows][valid]
    a = np.exp(GROUPS[rows][valid], dtype=np.float64)
    a /= a.sum(-1, keepdims=True)
    b = np.exp(LOGITS[rows][valid].reshape(-1, G, Y), dtype=np.float64)
    b /= b.sum(-1, keepdims=True)
    f = np.array([(expert // Y == g).sum() for g in range(G)]) / expert.size
    within, visits = 0.0, expert.size  # a choice is a visit: one expert in each of two groups
    for g in range(G):
        here = (expert // Y == g).any(-1)
        if here.any():
            inside = np.array([(expert == g * Y + y).sum() for y in range(Y)]) / here.sum()
            within += here.sum() / visits * Y * (inside * b[here, g].mean(0)).sum()
    return G * (f * a.mean(0)).sum(), within


def test_values_follow_the_definitions():
    found = [loss(report(), total_tokens=TOKENS) for loss in BOTH]
    np.testing.assert_allclose(found, levels(), rtol=1e-5)


def test_rows_by_themselves():
    per_row = [np.array(levels(slice(b, b + 1))) * n for b, n in ((0, 6), (1, 3))]
    found = group_balance_loss(report(), total_tokens=TOKENS, scope="sequence")
    np.testing.assert_allclose(found, sum(per_row)[0] / TOKENS, rtol=1e-5)


def test_balanced_levels_cost_one_each():
    logits, groups = np.zeros((1, 8, E), np.float32), np.zeros((1, 8, G), np.float32)
    # Choices go round, by ties broken with steps too small to move a probability.
    for t in range(8):
        groups[0, t, [t % G, (t + 1) % G]] = 1e-6
        logits[0, t, np.arange(G) * Y + (t // G) % Y] = 1e-6
    valid = np.ones((1, 8), bool)
    even = stacked_report(decide(logits, groups, valid), valid)
    for loss in BOTH:
        np.testing.assert_allclose(loss(even, total_tokens=8), 1.0, rtol=1e-4)


def test_collapse_costs_the_number_of_groups_or_of_experts_in_one():
    logits = np.tile(np.array([20.0, 0.0], np.float32), (1, 4, G))
    groups = np.tile(np.array([40.0, 20.0, 0.0, 0.0], np.float32), (1, 4, 1))
    valid = np.ones((1, 4), bool)
    options = {"k": 1, "groups_kept": 1, "norm": "none"}
    one = stacked_report(decide(logits, groups, valid, **options), valid)
    np.testing.assert_allclose(group_balance_loss(one, total_tokens=4), G, rtol=1e-5)
    np.testing.assert_allclose(within_group_balance_loss(one, total_tokens=4), Y, rtol=1e-5)


@pytest.mark.parametrize("loss", BOTH)
def test_microbatches_add_up(loss):
    whole = report()
    counts = whole.row_requested.sum(axis=1)
    for scope in ("sequence", "global"):
        parts = [
            loss(report(rows), total_tokens=TOKENS, scope=scope, global_counts=jnp.asarray(counts))
            for rows in (slice(1), slice(1, 3))
        ]
        value = loss(whole, total_tokens=TOKENS, scope=scope)
        np.testing.assert_allclose(sum(parts), value, rtol=1e-5)


def test_each_loss_teaches_its_own_level():
    valid = jnp.asarray(VALID)

    def value(loss, logits, group_logits):
        routing = two_level.route(logits, valid, k=2, group_logits=group_logits, groups_kept=2)
        layer = layer_report(routing, routing.plan.valid, valid)
        return loss(jax.tree.map(lambda a: a[None], layer), total_tokens=TOKENS)

    grad = jax.jit(jax.grad(value, argnums=(1, 2)), static_argnums=0)
    arrays = jnp.asarray(LOGITS), jnp.asarray(GROUPS)
    of_experts, of_groups = grad(group_balance_loss, *arrays)
    assert not np.asarray(of_experts).any()
    assert np.abs(of_groups).max() > 1e-4
    of_experts, of_groups = grad(within_group_balance_loss, *arrays)
    assert np.abs(of_experts).max() > 1e-4
    assert not np.asarray(of_groups).any()


def test_groups_of_one_expert_are_the_flat_balance_loss():
    valid = np.ones((B, S), bool)
    routing = decide(0 * LOGITS, LOGITS, valid)
    flat = stacked_report(routing, valid)
    ours = group_balance_loss(flat, total_tokens=B * S)
    np.testing.assert_allclose(ours, balance_loss(flat, total_tokens=B * S), rtol=1e-5)
    np.testing.assert_allclose(within_group_balance_loss(flat, total_tokens=B * S), 1.0, rtol=1e-5)


def test_balanced_groups_are_balanced_by_construction():
    routing = routed(balanced_groups.ROUTER.route, 3 * LOGITS, VALID, k=4, groups=4)
    found = group_balance_loss(stacked_report(routing, VALID), total_tokens=TOKENS)
    np.testing.assert_allclose(found, 1.0, rtol=1e-5)


@pytest.mark.parametrize("loss", BOTH)
def test_an_empty_batch_costs_nothing_and_an_unknown_scope_is_refused(loss):
    assert not loss(report(slice(2, 3)), total_tokens=0)
    with pytest.raises(ConfigError, match="group_balance_scope='batch' is not one of"):
        loss(report(), total_tokens=TOKENS, scope="batch")
