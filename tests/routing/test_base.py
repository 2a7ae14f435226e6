import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from moe.errors import ConfigError
from moe.routing import base
from moe.routing.base import ROUTER
from tests.routing.cases import GOLDEN_LOGITS, random_logits


def skewed(B, S, E, seed=0):
    """Logits of tokens that mostly like the same experts."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(B, S, E)) + 1.5 * rng.normal(size=(B, 1, E))).astype(np.float32)


LOGITS = skewed(4, 8, 4)


@functools.cache
def compiled(training, rounds):
    run = functools.partial(base.route, k=1, training=training, rounds=rounds)
    return jax.jit(lambda logits, valid, epsilon: run(logits, valid, epsilon=epsilon))


def route(logits, valid=None, *, training=True, epsilon=0.01, rounds=300):
    valid = np.ones(logits.shape[:2], bool) if valid is None else valid
    return jax.device_get(compiled(training, rounds)(logits, valid, jnp.float32(epsilon)))


def experts(*arguments, **options):
    return route(*arguments, **options).plan.expert[..., 0]


def best_sum(scores, room):
    """The optimum of one row by an exact solver, every expert copied `room` times."""
    scores = np.repeat(scores.astype(np.float64), room, axis=1)
    return scores[linear_sum_assignment(-scores)].sum()


def sum_of(scores, expert):
    return scores[np.arange(len(expert)), expert].astype(np.float64).sum()


def test_example_worked_out_in_float64():
    golden = np.repeat(GOLDEN_LOGITS, 4, axis=0)
    expert = experts(golden)[0]
    np.testing.assert_allclose(sum_of(golden[0], expert), 13.4, rtol=1e-6)
    np.testing.assert_array_equal(np.bincount(expert), 2)
    greedy = experts(golden, training=False)[0]
    np.testing.assert_array_equal(greedy, golden[0].argmax(axis=-1))
    np.testing.assert_allclose(sum_of(golden[0], greedy), 14.8, rtol=1e-6)


@pytest.mark.parametrize("epsilon", [1e-2, 1e-3])
def test_experts_get_equally_many_tokens_and_nearly_the_best_sum(epsilon):
    B, S, E = 4, 32, 4
    logits = skewed(B, S, E)
    expert = experts(logits, epsilon=epsilon, rounds=3000)
    rng = np.random.default_rng(1)
    for row, chosen in zip(logits, expert, strict=True):
        np.testing.assert_array_equal(np.bincount(chosen, minlength=E), S // E)
        best, found = best_sum(row, S // E), sum_of(row, chosen)
        assert best - S * epsilon * np.ptp(row) <= found <= best + 1e-4
        balanced = np.repeat(np.arange(E), S // E)
        assert found >= max(sum_of(row, rng.permutation(balanced)) for _ in range(20))
        assert found <= row.max(axis=-1).sum()


def test_a_fine_auction_finds_the_optimum():
    logits = skewed(4, 32, 4, seed=5)
    expert = experts(logits, epsilon=1e-4, rounds=3000)
    for row, chosen in zip(logits, expert, strict=True):
        np.testing.assert_allclose(sum_of(row, chosen), best_sum(row, 8), rtol=1e-5)


def test_when_tokens_do_not_divide_evenly_no_expert_gets_more_than_its_ceiling():
    logits = skewed(6, 14, 4, seed=2)
    valid = np.arange(14) < np.array([[14], [13], [9], [5], [1], [0]])
    plan = route(logits, valid, epsilon=1e-4, rounds=3000).plan
    np.testing.assert_array_equal(plan.valid[..., 0], valid)
    for row, chosen, real in zip(logits, plan.expert[..., 0], valid, strict=True):
        n = real.sum()
        counts = np.bincount(chosen[real], minlength=4)
        assert counts.max(initial=0) <= -(-n // 4)
        if n:
            best = best_sum(row[real], -(-n // 4))
            np.testing.assert_allclose(sum_of(row[real], chosen[real]), best, rtol=1e-4)


def test_padding_takes_no_place():
    logits = LOGITS.copy()
    logits[:, 5:] = 50.0
    plan = route(logits, np.broadcast_to(np.arange(8) < 5, (4, 8))).plan
    np.testing.assert_array_equal(plan.expert[:, :5, 0], experts(LOGITS[:, :5]))
    assert not plan.gate[:, 5:].any()


def test_few_rounds_still_fill_every_expert():
    for chosen in experts(LOGITS, rounds=1):
        np.testing.assert_array_equal(np.bincount(chosen, minlength=4), 2)


@pytest.mark.parametrize("kind", ["equal", "nan", "infinite", "huge"])
def test_assignment_survives_ties_huge_scores_and_what_is_not_finite(kind):
    logits = {
        "equal": np.zeros((4, 8, 4), np.float32),
        "nan": np.where(LOGITS > 1, np.float32(np.nan), LOGITS),
        "infinite": np.where(LOGITS > 1, np.float32(np.inf), LOGITS),
        "huge": np.sign(LOGITS) * np.float32(1e4),
    }[kind]
    for chosen in experts(logits):
        np.testing.assert_array_equal(np.bincount(chosen, minlength=4), 2)


def test_one_expert_takes_everything():
    assert not experts(np.ones((1, 3, 1), np.float32)).any()


def test_gate_is_the_sigmoid_and_nothing_else_has_a_gradient():
    routing = route(LOGITS)
    plan, score = routing.plan, 1 / (1 + np.exp(-LOGITS))
    np.testing.assert_allclose(plan.gate, np.take_along_axis(score, plan.expert, -1), rtol=1e-5)
    np.testing.assert_allclose(routing.probs, score / score.sum(-1, keepdims=True), rtol=1e-5)
    valid = jnp.ones((4, 8), bool)
    gradient = jax.jit(jax.grad(lambda x: base.route(x, valid, k=1).plan.gate.sum()))(LOGITS)
    slope = plan.gate * (1 - plan.gate)
    expected = np.where(np.arange(4) == plan.expert, slope, 0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-8)


def test_gate_of_the_plan_is_the_papers_interpolation():
    rng = np.random.default_rng(0)
    h = rng.normal(size=(8, 3))
    weights = rng.normal(size=(4, 3, 3))  # experts F_e(h) = h @ weights[e]
    logits = (h @ rng.normal(size=(3, 4))).astype(np.float32)
    plan = route(np.stack([logits] * 4)).plan
    F = np.einsum("sd,sdx->sx", h, weights[plan.expert[0, :, 0]])
    g = plan.gate[0]
    paper = g * (h + F) + (1 - g) * h
    block = h + g * F
    np.testing.assert_allclose(block, paper, rtol=1e-6)


def test_later_tokens_change_training_and_never_evaluation():
    assert ROUTER.causality == "C3"
    assert ROUTER.causal_in_eval
    logits, leaked = LOGITS, False
    for t in range(7):
        changed = np.concatenate([logits[:, : t + 1], -logits[:, t + 1 :]], axis=1)
        a, b = experts(logits)[:, : t + 1], experts(changed)[:, : t + 1]
        leaked |= bool((a != b).any())
        a, b = (route(x, training=False).plan for x in (logits, changed))
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x[:, : t + 1], y[:, : t + 1])
    assert leaked


def test_rows_of_the_batch_do_not_see_each_other():
    other = np.concatenate([LOGITS[:1], -LOGITS[1:]])
    np.testing.assert_array_equal(experts(LOGITS)[0], experts(other)[0])


def test_permuting_experts_permutes_the_assignment():
    logits, rng = random_logits((4, 8, 4)), np.random.default_rng(0)
    before = experts(logits)
    for _ in range(10):
        order = rng.permutation(4)
        np.testing.assert_array_equal(order[experts(logits[..., order])], before)


def test_centroids_start_orthogonal():
    gate = base.CentroidGate(16, 4, rngs=nnx.Rngs(0))
    kernel = np.asarray(gate.kernel[...])
    np.testing.assert_allclose(kernel.T @ kernel, 0.01 * np.eye(4), atol=1e-6)
    tokens = random_logits((2, 3, 16))
    np.testing.assert_allclose(gate(jnp.asarray(tokens)).logits, tokens @ kernel, atol=1e-6)


@pytest.mark.parametrize(
    ("k", "options", "message"),
    [
        (2, {}, r"router\.k=2 .* exactly one expert"),
        (1, {"epsilon": 0.0}, r"epsilon=0\.0 must be between"),
        (1, {"rounds": 0}, "rounds=0 at least 1"),
    ],
)
def test_options_that_cannot_work_are_refused(k, options, message):
    with pytest.raises(ConfigError, match=message):
        base.check(8, k=k, **options)
