import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import ConfigError
from moe.routing import losses
from moe.routing.report import layer_report
from tests.routing.cases import (
    GOLDEN_LOGITS,
    GOLDEN_VALID,
    Case,
    one_choice,
    random_logits,
    stacked_report,
)

balance_loss = jax.jit(losses.balance_loss, static_argnames="scope")
z_loss = jax.jit(losses.z_loss)
sequence_balance_loss = jax.jit(losses.sequence_balance_loss)

TOPK = Case("topk", 3, {"normalize": "renormalize"})
VALID = np.arange(6) < np.array([[6], [3], [5], [0], [1]])


def golden(case):
    return stacked_report(case.route(GOLDEN_LOGITS), GOLDEN_VALID)


def two_layers(seed=0, rows=slice(None)):
    """Reports of a two-layer model on five rows of which one is empty, or on some of the rows."""
    reports = [
        stacked_report(
            TOPK.route(random_logits((5, 6, 8), seed + i)[rows], VALID[rows]), VALID[rows]
        )
        for i in (0, 1)
    ]
    return jax.tree.map(lambda *x: np.concatenate(x), *reports)


@pytest.mark.parametrize("scope", losses.SCOPES)
@pytest.mark.parametrize(
    ("case", "value"),
    [(Case("switch", 1), 1.3113), (Case("topk", 2, {"normalize": "none"}), 1.1812)],
    ids=str,
)
def test_balance_worked_out_in_float64(case, value, scope):
    loss = balance_loss(golden(case), scope, total_tokens=8)
    np.testing.assert_allclose(loss, value, atol=5e-5)


def test_z_and_sequence_balance_worked_out_in_float64():
    np.testing.assert_allclose(z_loss(golden(Case("switch", 1)), total_tokens=8), 6.0829, atol=5e-5)
    report = golden(Case("deepseek_v3", 2))
    np.testing.assert_array_equal(report.row_ranked[0, 0] * 4 / 16, [1.75, 1, 0.75, 0.5])
    np.testing.assert_allclose(sequence_balance_loss(report, total_rows=1), 1.0662, atol=5e-5)


def report_of(probs, expert):
    """A layer whose tokens have these probabilities and one choice each."""
    return stacked_report(one_choice(probs, expert), np.ones(np.shape(expert), bool))


@pytest.mark.parametrize("scope", losses.SCOPES)
def test_balance_is_one_when_uniform_and_E_when_collapsed(scope):
    balance = functools.partial(balance_loss, scope=scope, total_tokens=8)
    uniform = report_of(np.full((1, 8, 4), 0.25), np.arange(8)[None] % 4)
    np.testing.assert_allclose(balance(uniform), 1.0, rtol=1e-6)
    collapsed = report_of(np.eye(4)[np.zeros((1, 8), int)], np.zeros((1, 8), int))
    np.testing.assert_allclose(balance(collapsed), 4.0, rtol=1e-6)


def test_two_domains_are_balanced_together_and_not_apart():
    expert = np.array([[0, 1, 0, 1], [2, 3, 2, 3]])  # each sequence uses half of the experts
    halves = np.array([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    report = report_of(np.repeat(halves[:, None], 4, axis=1), expert)
    for scope, value in {"global": 1.0, "microbatch": 1.0, "sequence": 2.0}.items():
        loss = balance_loss(report, scope, total_tokens=8)
        np.testing.assert_allclose(loss, value, rtol=1e-6)


def test_layers_that_collapse_onto_different_experts_do_not_cancel():
    layers = [report_of(np.eye(4)[np.full((1, 8), e)], np.full((1, 8), e)) for e in range(4)]
    report = jax.tree.map(lambda *x: np.concatenate(x), *layers)
    np.testing.assert_allclose(balance_loss(report, "global", total_tokens=8), 4.0, rtol=1e-6)


def test_sequence_balance_counts_scores_and_not_what_a_bias_made_of_them():
    logits = random_logits((2, 16, 8))
    plain = Case("deepseek_v3", 3).route(logits, state={"bias": np.zeros(8, np.float32)})
    steered = Case("deepseek_v3", 3).route(logits, state={"bias": np.arange(8, dtype=np.float32)})
    valid = np.ones((2, 16), bool)
    a, b = (stacked_report(r, valid) for r in (plain, steered))
    loss = functools.partial(sequence_balance_loss, total_rows=2)
    assert loss(a) == loss(b)
    balance = functools.partial(balance_loss, scope="sequence", total_tokens=32)
    assert abs(balance(a) - balance(b)) > 1e-3


def terms(report, counts=None):
    """Every loss whose microbatches must add up, on totals of the whole step."""
    tokens, rows = int(VALID.sum()), int(VALID.any(axis=1).sum())
    return {
        "global": balance_loss(report, "global", total_tokens=tokens, global_counts=counts),
        "sequence": balance_loss(report, "sequence", total_tokens=tokens),
        "z": z_loss(report, total_tokens=tokens),
        "rows": sequence_balance_loss(report, total_rows=rows),
    }


def test_unequal_microbatches_add_up_to_the_whole_batch():
    whole = two_layers()
    counts = whole.row_requested.sum(axis=1)
    parts = [
        terms(two_layers(rows=slice(a, b)), counts) for a, b in itertools.pairwise([0, 1, 3, 5])
    ]
    for name, value in terms(whole).items():
        np.testing.assert_allclose(sum(p[name] for p in parts), value, rtol=1e-6, err_msg=name)


def test_microbatch_scope_is_the_token_weighted_mean_of_its_microbatches():
    parts = [two_layers(rows=r) for r in (slice(0, 2), slice(2, 5))]
    tokens = [float(p.row_tokens[0].sum()) for p in parts]
    alone = [
        balance_loss(p, "microbatch", total_tokens=t) for p, t in zip(parts, tokens, strict=True)
    ]
    step = [balance_loss(p, "microbatch", total_tokens=sum(tokens)) for p in parts]
    np.testing.assert_allclose(sum(step), np.average(alone, weights=tokens), rtol=1e-6)


def test_padded_rows_count_like_the_same_rows_without_padding():
    logits = random_logits((2, 6, 8))
    padded = stacked_report(
        TOPK.route(np.pad(logits, ((0, 1), (0, 3), (0, 0)), constant_values=9.0)),
        np.pad(np.ones((2, 6), bool), ((0, 1), (0, 3))),
    )
    plain = stacked_report(TOPK.route(logits), np.ones((2, 6), bool))
    for name, value in terms(plain).items():
        np.testing.assert_allclose(terms(padded)[name], value, rtol=1e-5, err_msg=name)
    assert jax.jit(losses.rows_with_tokens)(padded) == 2


@pytest.mark.parametrize("name", ["global", "sequence", "z", "rows"])
def test_gradient_equals_finite_differences(name):
    h = 1e-5
    with jax.enable_x64(True):
        logits = np.asarray(random_logits((2, 3, 8)), np.float64)
        valid = jnp.asarray(np.arange(3) < np.array([[3], [2]]))

        @jax.jit
        def loss(x):
            routing = TOPK.route(x, valid)
            report = layer_report(routing, routing.plan.valid, valid)
            return terms(jax.tree.map(lambda v: v[None], report))[name]

        gradient = jax.grad(loss)(jnp.asarray(logits))
        numeric = np.zeros(logits.shape)
        for i in np.ndindex(logits.shape):
            step = np.zeros_like(logits)
            step[i] = h
            numeric[i] = (loss(jnp.asarray(logits + step)) - loss(jnp.asarray(logits - step))) / (
                2 * h
            )
    np.testing.assert_allclose(gradient, numeric, rtol=1e-3, atol=1e-9)
    assert np.abs(gradient[np.asarray(valid)]).max() > 1e-4
    assert not np.asarray(gradient)[~np.asarray(valid)].any()


def test_an_empty_batch_costs_nothing():
    empty = stacked_report(TOPK.route(random_logits()), np.zeros((3, 6), bool))
    for scope in losses.SCOPES:
        assert balance_loss(empty, scope, total_tokens=0) == 0
    assert z_loss(empty, total_tokens=0) == 0
    assert sequence_balance_loss(empty, total_rows=0) == 0


def test_unknown_scope_is_refused():
    with pytest.raises(ConfigError, match="'batch' is not one of sequence, microbatch, global"):
        balance_loss(two_layers(), "batch", total_tokens=1)
