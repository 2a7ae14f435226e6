import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.special import softmax

from moe.errors import ConfigError
from moe.routing import expert_choice
from moe.routing.expert_choice import ROUTER
from moe.routing.types import Choices, Slots
from tests.routing.cases import GOLDEN_LOGITS, random_logits

B, S, E, K = 3, 8, 4, 2
LOGITS = random_logits((B, S, E))


@functools.cache
def compiled(training, options):
    options = dict(options)

    def run(logits, valid, state):
        return expert_choice.route(logits, valid, state=state, training=training, **options)

    return jax.jit(run)


def route(logits, valid=None, *, k=K, training=True, state=None, **options):
    valid = np.ones(logits.shape[:2], bool) if valid is None else valid
    run = compiled(training, tuple(sorted({"k": k, **options}.items())))
    return jax.device_get(run(logits, valid, state))


def mask_of(plan, length=S):
    """Who took what, `[B S E]`, in NumPy."""
    if isinstance(plan, Choices):
        hits = (plan.expert[..., None] == np.arange(E)) & plan.valid[..., None]
        return hits.any(axis=2)
    mask = np.zeros((plan.token.shape[0], length, plan.token.shape[1]), int)
    for b, e, c in np.argwhere(plan.valid):
        mask[b, plan.token[b, e, c], e] += 1
    assert mask.max(initial=0) <= 1  # no token twice in an expert
    return mask > 0


def gates_of(plan, length=S):
    """Dense gates `[B S E]`, in NumPy."""
    if isinstance(plan, Choices):
        return np.where(plan.expert[..., None] == np.arange(E), plan.gate[..., None], 0).sum(2)
    gates = np.zeros((plan.token.shape[0], length, plan.token.shape[1]), np.float32)
    for b, e, c in np.argwhere(plan.valid):
        gates[b, plan.token[b, e, c], e] += plan.gate[b, e, c]
    return gates


def by_hand(logits, k, axis=-1):
    """The masks by a full sort."""
    score = softmax(logits.astype(np.float64), axis=axis)
    C = -(-logits.shape[1] * k // logits.shape[2])
    rank = np.argsort(np.argsort(-score, axis=1, kind="stable"), axis=1)
    return rank < C, score


def test_example_worked_out_in_float64():
    plan = route(GOLDEN_LOGITS).plan
    rows = ["1100", "1010", "1001", "0111", "0010", "0111", "0001", "1100"]
    expected = np.array([[c == "1" for c in row] for row in rows])
    np.testing.assert_array_equal(mask_of(plan)[0], expected)
    assert (mask_of(plan).sum(axis=1) == 4).all()
    score = softmax(GOLDEN_LOGITS.astype(np.float64), -1)
    np.testing.assert_allclose(gates_of(plan), np.where(expected, score, 0), rtol=1e-5)


@pytest.mark.parametrize("normalize", expert_choice.NORMALIZE)
def test_every_expert_takes_its_best_tokens_and_is_full(normalize):
    routing = route(LOGITS, normalize=normalize)
    expected, score = by_hand(LOGITS, K, -1 if normalize == "experts" else 1)
    np.testing.assert_array_equal(mask_of(routing.plan), expected)
    assert (expected.sum(axis=1) == S * K // E).all()
    assert (expected.sum(axis=2) != K).any()  # tokens do get different numbers of experts
    takers = np.maximum(expected.sum(axis=2, keepdims=True), 1) if normalize == "tokens" else 1
    np.testing.assert_allclose(
        gates_of(routing.plan), np.where(expected, score / takers, 0), rtol=1e-5
    )


def test_taking_every_token_is_the_dense_mixture():
    plan = route(LOGITS, k=E).plan
    np.testing.assert_allclose(gates_of(plan), softmax(LOGITS, -1), rtol=1e-5)


@pytest.mark.parametrize("cap", [0, 2])
def test_a_padded_row_is_chosen_from_like_the_row_cut(cap):
    logits = LOGITS.copy()
    logits[:, 5:] = 50.0  # attractive padding
    plan = route(logits, np.broadcast_to(np.arange(S) < 5, (B, S)), cap=cap).plan
    cut = route(LOGITS[:, :5], cap=cap).plan
    assert not mask_of(plan)[:, 5:].any()
    np.testing.assert_array_equal(mask_of(plan)[:, :5], mask_of(cut, 5))
    np.testing.assert_array_equal(gates_of(plan)[:, :5], gates_of(cut, 5))
    empty = route(LOGITS, np.zeros((B, S), bool), cap=cap)
    assert not empty.plan.valid.any()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(empty))


@pytest.mark.parametrize("normalize", expert_choice.NORMALIZE)
def test_the_threshold_form_is_the_choice_of_the_row_at_its_own_threshold(normalize):
    for b in range(B):
        row = LOGITS[b : b + 1]
        chosen = route(row, normalize=normalize)
        state = {name: value[0, 0] for name, value in chosen.terms.items()}
        again = route(row, normalize=normalize, training=False, state=state)
        np.testing.assert_array_equal(mask_of(again.plan), mask_of(chosen.plan))
        np.testing.assert_allclose(gates_of(again.plan), gates_of(chosen.plan), rtol=1e-5)


def test_the_reported_threshold_is_the_first_score_turned_down():
    valid = np.arange(S) < np.array([[8], [6], [1]])
    terms = route(LOGITS, valid).terms["threshold"]
    score = softmax(LOGITS.astype(np.float64), -1)
    np.testing.assert_allclose(terms[0, 3], np.sort(score[0], axis=0)[::-1][4], rtol=1e-5)
    np.testing.assert_allclose(terms[1, 3], np.sort(score[1, :6], axis=0)[::-1][3], rtol=1e-5)
    assert not terms[2].any()  # its one token was turned down by none
    assert not route(LOGITS, k=E).terms["threshold"].any()


def test_evaluation_keeps_the_best_of_too_many():
    state = {"threshold": np.zeros(E, np.float32)}  # every expert would take every token
    plan = route(LOGITS, training=False, state=state, k_max=2).plan
    assert plan.expert.shape == (B, S, 2)
    np.testing.assert_array_equal(plan.expert, np.argsort(-LOGITS, axis=-1)[..., :2])
    assert plan.valid.all()
    assert route(LOGITS, training=False, state=state, cap=3).plan.expert.shape == (B, S, 3)
    none = route(LOGITS, training=False, state={"threshold": np.ones(E, np.float32)}).plan
    assert not none.valid.any()
    assert not none.gate.any()


def reversed_future(logits, t):
    return np.concatenate([logits[:, : t + 1], -3 * logits[:, t + 1 :]], axis=1)


@pytest.mark.parametrize("options", [{}, {"normalize": "tokens"}, {"cap": 2}], ids=str)
def test_later_tokens_change_training_and_never_evaluation(options):
    assert ROUTER.causality == "C3"
    assert ROUTER.causal_in_eval
    state = {name: np.full(E, 0.3, np.float32) for name in ("threshold", "lse")}
    leaked = False
    for t in range(S - 1):
        changed = reversed_future(LOGITS, t)
        seen = slice(None), slice(t + 1)
        a, b = (mask_of(route(x, **options).plan) for x in (LOGITS, changed))
        leaked |= bool((a[seen] != b[seen]).any())
        a, b = (route(x, training=False, state=state, **options).plan for x in (LOGITS, changed))
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x[seen], y[seen])
    assert leaked


def test_rows_of_the_batch_do_not_see_each_other():
    other = np.concatenate([LOGITS[:1], -LOGITS[1:]])
    for cap in (0, 2):
        a, b = (route(x, cap=cap).plan for x in (LOGITS, other))
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x[0], y[0])


@pytest.mark.parametrize("options", [{}, {"normalize": "tokens"}, {"cap": 2}], ids=str)
def test_permuting_experts_or_tokens_permutes_the_choice(options):
    rng, before = np.random.default_rng(0), route(LOGITS, **options).plan
    for _ in range(5):
        order, places = rng.permutation(E), rng.permutation(S)
        after = route(LOGITS[:, places][..., order], **options).plan
        for dense in (mask_of, gates_of):
            expected = dense(before)[:, places][..., order]
            np.testing.assert_allclose(dense(after), expected, rtol=1e-5)


def test_cap_bounds_every_token_near_the_best_sum():
    n, experts, k, cap = 24, 6, 2, 3
    rng = np.random.default_rng(3)
    # A shared preference of tokens makes a few of them everyone's favourites.
    logits = rng.normal(size=(4, n, experts)) + np.where(np.arange(experts) < 2, 2, 0)
    logits = logits.astype(np.float32)
    score = softmax(logits.astype(np.float64), -1)
    free = mask_of(route(logits, k=k).plan, n)
    plan = route(logits, k=k, cap=cap).plan
    mask = mask_of(plan, n)
    C = n * k // experts
    assert free.sum(axis=2).max() > cap
    assert mask.sum(axis=2).max() <= cap
    assert (mask.sum(axis=1) <= C).all()
    assert mask.sum() >= 0.95 * 4 * C * experts
    rows, columns = np.kron(np.eye(n), np.ones(experts)), np.tile(np.eye(experts), n)
    for b in range(4):
        best = -linprog(
            -score[b].ravel(),
            A_ub=rows,
            b_ub=[cap] * n,
            A_eq=columns,
            b_eq=[C] * experts,
            bounds=(0, 1),
        ).fun
        assert 0.97 * best < score[b][mask[b]].sum() <= best + 1e-6
    np.testing.assert_allclose(gates_of(plan, n), np.where(mask, score, 0), rtol=1e-5)


def test_shares_of_the_capped_problem_satisfy_it():
    score = jnp.asarray(softmax(random_logits((2, 16, E), seed=4), -1).swapaxes(1, 2))
    room = jnp.array([8, 6])
    valid = jnp.asarray(np.arange(16) < np.array([[16], [12]]))
    solve = jax.jit(lambda s: expert_choice.capped_shares(s, valid, room, 3, 0.05, 2000))
    share = np.exp(solve(score))
    np.testing.assert_allclose(share.sum(axis=2), [[8] * E, [6] * E], rtol=1e-3)
    assert share.sum(axis=1).max() < 3 + 1e-2
    assert share.max() < 1 + 1e-2
    assert not share[1, :, 12:].any()


def test_gradient_reaches_the_gate_through_taken_scores_only():
    weight = np.random.default_rng(1).normal(size=(1, E, S * K // E))
    h = 1e-5
    with jax.enable_x64(True):
        logits = LOGITS[:1].astype(np.float64)
        for options in ({}, {"normalize": "tokens"}, {"cap": 2}):

            def loss(x, options=options):
                plan = expert_choice.route(x, jnp.ones(x.shape[:2], bool), k=K, **options).plan
                assert isinstance(plan, Slots)
                return (plan.gate * weight).sum(axis=(1, 2))

            gradient = jax.grad(lambda x: loss(x).sum())(jnp.asarray(logits))
            steps = h * np.eye(logits.size).reshape(-1, S, E)
            many = jax.jit(loss)
            numeric = (many(jnp.asarray(logits + steps)) - many(jnp.asarray(logits - steps))) / (
                2 * h
            )
            np.testing.assert_allclose(gradient.ravel(), numeric, rtol=1e-3, atol=1e-8)
            assert np.abs(gradient).max() > 1e-3


def test_state_follows_the_mean_over_tokens():
    state = expert_choice.init_state(E, 11, K, jax.random.key(0), normalize="tokens")
    np.testing.assert_array_equal(state["threshold"], 0.25)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x + 1]), state)
    stats = {"threshold": jnp.full((2, E), 6.0), "lse": jnp.full((2, E), -6.0)}
    new = expert_choice.update_state(stacked, tokens=jnp.array([12.0, 0.0]), stats=stats, decay=0.9)
    np.testing.assert_allclose(new["threshold"], [[0.275] * E, [1.25] * E], rtol=1e-6)
    np.testing.assert_allclose(new["lse"], [[-0.05] * E, [1.0] * E], rtol=1e-6)


def test_thresholds_settle_where_evaluation_takes_as_many_as_training():
    logits = random_logits((2, 256, E), seed=6)
    routing = route(logits)
    sums = {name: value.sum(axis=(0, 1)) for name, value in routing.terms.items()}
    state = expert_choice.init_state(E, 11, K, jax.random.key(0))
    for _ in range(300):
        state = expert_choice.update_state(
            state, tokens=jnp.array(512.0), stats=jax.tree.map(jnp.asarray, sums), decay=0.97
        )
    taken = mask_of(route(logits, training=False, state=state).plan).mean(axis=(0, 1))
    np.testing.assert_allclose(taken, K / E, rtol=0.03)


@pytest.mark.parametrize("options", [{}, {"normalize": "tokens"}, {"cap": 2}], ids=str)
def test_extreme_logits_stay_finite(options):
    state = {name: np.full(E, 0.3, np.float32) for name in ("threshold", "lse")}
    for logits in (np.sign(LOGITS) * np.float32(1e4), np.zeros((B, S, E), np.float32)):
        for training in (True, False):
            routing = route(logits, training=training, state=state, **options)
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(routing))


def test_evaluation_without_thresholds_is_an_error():
    with pytest.raises(ValueError, match="thresholds"):
        expert_choice.route(jnp.asarray(LOGITS), jnp.ones((B, S), bool), k=K, training=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalize": "rows"}, "'rows' is not one of experts, tokens"),
        ({"cap": 1}, r"router\.cap=1 must be 0 .* between router\.k=2"),
        ({"cap": 9}, r"router\.cap=9"),
        ({"k_max": 1}, r"router\.k_max=1"),
        ({"entropy": 0.0}, r"entropy=0\.0 must be above 0"),
        ({"iterations": 0}, "iterations=0 at least 1"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        expert_choice.check(8, k=2, **options)
