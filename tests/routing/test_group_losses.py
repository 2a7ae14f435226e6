import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import ConfigError
from moe.routing import deepseek_v2, group_losses, losses
from moe.routing.report import layer_report
from tests.routing.cases import random_logits

VALID = np.arange(6) < np.array([[6], [3], [5], [0]])
LOGITS = random_logits((4, 6, 8))


@functools.partial(jax.jit, static_argnames=("k", "groups", "kept"))
def report_of(logits, valid, k=3, groups=4, kept=2):
    """Two layers, one of which sees the experts in another order and twice as sure."""

    def layer(x):
        routing = deepseek_v2.route(x, valid, k=k, groups=groups, groups_kept=kept)
        return layer_report(routing, routing.plan.valid, valid)

    return jax.tree.map(lambda *x: jnp.stack(x), layer(logits), layer(2 * logits[..., ::-1]))


@functools.partial(jax.jit, static_argnames="scope")
def device(report, total_tokens, scope="sequence", global_counts=None):
    return group_losses.device_balance_loss(
        report, total_tokens=total_tokens, scope=scope, global_counts=global_counts
    )


@functools.partial(jax.jit, static_argnames="scope")
def communication(report, total_tokens, scope="sequence"):
    return group_losses.communication_balance_loss(report, total_tokens=total_tokens, scope=scope)


def by_hand(logits, valid, k, groups, kept, scope):
    """Both losses of one layer from the paper's sums, token by token, in float64."""
    plan = jax.device_get(
        deepseek_v2.route(jnp.asarray(logits), jnp.asarray(valid), k=k, groups=groups,
                          groups_kept=kept).plan
    )  # fmt: skip
    E = logits.shape[-1]
    probs = np.exp(logits.astype(np.float64))
    probs /= probs.sum(-1, keepdims=True)
    rows = [[b] for b in range(len(logits))] if scope == "sequence" else [range(len(logits))]
    result = np.zeros(2)
    for members in rows:
        tokens = [(b, t) for b in members for t in range(logits.shape[1]) if valid[b, t]]
        T = len(tokens)
        if not T:
            continue
        f, P, sent = np.zeros(E), np.zeros(E), np.zeros(groups)
        for b, t in tokens:
            P += probs[b, t] / T
            f[plan.expert[b, t]] += E / (k * T)
            sent[list({e // (E // groups) for e in plan.expert[b, t]})] += groups / (kept * T)
        P_group = P.reshape(groups, -1).sum(-1)
        f_group = f.reshape(groups, -1).mean(-1)
        result += np.array([(f_group * P_group).sum(), (sent * P_group).sum()]) * T
    return result / valid.sum()


@pytest.mark.parametrize("scope", ["sequence", "microbatch"])
def test_losses_are_the_sums_of_the_paper(scope):
    report = report_of(LOGITS, VALID)
    layers = [by_hand(x, VALID, 3, 4, 2, scope) for x in (LOGITS, 2 * LOGITS[..., ::-1])]
    expected = np.mean(layers, axis=0)
    np.testing.assert_allclose(device(report, 14, scope), expected[0], rtol=1e-5)
    np.testing.assert_allclose(communication(report, 14, scope), expected[1], rtol=1e-5)


def planted(choices, probs, groups=2):
    """One row with these choices `[T K]`; every token has the same probabilities."""
    choices = np.asarray(choices)
    T, k = choices.shape
    counts = np.bincount(choices.ravel(), minlength=4).astype(np.float32)
    reached = np.zeros(groups, np.float32)
    for row in choices:
        reached[list({e // (4 // groups) for e in row})] += 1 / k
    report = jax.tree.map(
        lambda x: x[:1], report_of(random_logits((1, T, 4)), np.ones((1, T), bool), k=2)
    )
    return report._replace(
        row_tokens=jnp.full((1, 1), float(T)),
        row_requested=jnp.asarray(counts)[None, None],
        row_probs=T * jnp.asarray(probs, jnp.float32)[None, None],
        row_terms={"groups_reached": jnp.asarray(reached)[None, None]},
    )


def test_both_are_one_at_balance_and_grow_with_a_favoured_group():
    even = planted([[0, 2], [1, 3], [0, 3], [1, 2]], [0.25] * 4)
    np.testing.assert_allclose(device(even, 4), 1.0, rtol=1e-6)
    np.testing.assert_allclose(communication(even, 4), 1.0, rtol=1e-6)
    one_group = planted([[0, 1]] * 4, [0.5, 0.5, 0, 0])
    np.testing.assert_allclose(device(one_group, 4), 2.0, rtol=1e-6)
    # Every token goes to one of the two groups that it may reach: half the traffic, all in one.
    np.testing.assert_allclose(communication(one_group, 4), 1.0, rtol=1e-6)


def test_groups_balance_where_experts_do_not():
    report = planted([[0, 2]] * 4, [0.5, 0, 0.5, 0])
    np.testing.assert_allclose(device(report, 4), 1.0, rtol=1e-6)
    experts = jax.jit(losses.balance_loss)(report, total_tokens=4)
    np.testing.assert_allclose(experts, 2.0, rtol=1e-6)


@pytest.mark.parametrize("scope", losses.SCOPES)
def test_groups_of_one_expert_are_the_loss_of_experts(scope):
    report = report_of(LOGITS, VALID, groups=8, kept=4)
    expected = jax.jit(functools.partial(losses.balance_loss, scope=scope))(report, total_tokens=14)
    np.testing.assert_allclose(device(report, 14, scope), expected, rtol=1e-6)


def test_unequal_microbatches_add_up_to_the_whole_batch():
    whole = report_of(LOGITS, VALID)
    row = np.arange(4)[:, None]
    parts = [report_of(LOGITS, VALID & part) for part in (row < 1, row >= 1)]
    counts = whole.row_requested.sum(axis=1)
    for value, pieces in (
        (device(whole, 14), [device(p, 14) for p in parts]),
        (device(whole, 14, "global"), [device(p, 14, "global", counts) for p in parts]),
        (communication(whole, 14), [communication(p, 14) for p in parts]),
    ):
        np.testing.assert_allclose(sum(pieces), value, rtol=1e-5)


def test_an_empty_batch_costs_nothing():
    empty = report_of(LOGITS, np.zeros((4, 6), bool))
    assert device(empty, 0) == 0
    assert communication(empty, 0) == 0


@pytest.mark.parametrize("loss", [device, communication])
def test_gradient_flows_through_probabilities_alone(loss):
    report = report_of(LOGITS, VALID)

    def value(requested, probs, terms):
        changed = report._replace(row_requested=requested, row_probs=probs, row_terms=terms)
        return loss(changed, 14)

    arguments = (report.row_requested, report.row_probs, report.row_terms)
    counts, probs, terms = jax.grad(value, argnums=(0, 1, 2))(*arguments)
    assert not np.asarray(counts).any()
    assert not np.asarray(terms["groups_reached"]).any()
    assert np.abs(probs).max() > 1e-3
    # Linear in the probabilities, so that the gradient is the loss itself, taken apart.
    np.testing.assert_allclose((probs * report.row_probs).sum(), loss(report, 14), rtol=1e-5)


def test_unknown_scope_is_refused():
    report = report_of(LOGITS, VALID)
    with pytest.raises(ConfigError, match="'global' is not one of sequence, microbatch"):
        communication(report, 14, "global")
    with pytest.raises(ConfigError, match="'batch' is not one of"):
        device(report, 14, "batch")
