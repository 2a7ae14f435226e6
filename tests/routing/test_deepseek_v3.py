import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import ConfigError
from moe.routing import deepseek_v3
from moe.routing.report import layer_report
from tests.routing.cases import GOLDEN_LOGITS, Case, random_logits

LOGITS = random_logits((2, 16, 8))
SCORE = 1 / (1 + np.exp(-LOGITS.astype(np.float64)))


def plan(logits, k, bias=None, **options):
    return routing(logits, k, bias, **options).plan


def routing(logits, k, bias=None, **options):
    bias = np.zeros(logits.shape[-1]) if bias is None else bias
    case = Case("deepseek_v3", k, options, softmax=False)
    return case.route(np.asarray(logits, np.float32), state={"bias": np.asarray(bias, np.float32)})


def test_example_worked_out_in_float64():
    chosen = plan(GOLDEN_LOGITS, 2, [-0.3, 0, 0, 0.2], groups=2, groups_kept=1, scale=2.5)
    np.testing.assert_array_equal(chosen.expert[0, :, 0] // 2, [0, 1, 0, 1, 1, 1, 1, 0])
    np.testing.assert_array_equal(
        chosen.expert[0], [[1, 0], [2, 3], [0, 1], [3, 2], [2, 3], [3, 2], [3, 2], [1, 0]]
    )
    np.testing.assert_allclose(chosen.gate[0, 0], [1.1339, 1.3661], atol=5e-5)
    np.testing.assert_allclose(chosen.gate[0, 1], [1.6486, 0.8514], atol=5e-5)


def test_probs_are_normalised_sigmoids():
    expected = SCORE / SCORE.sum(-1, keepdims=True)
    np.testing.assert_allclose(routing(LOGITS, 3).probs, expected, rtol=1e-5)


def test_no_state_is_a_bias_of_zeros():
    route = jax.jit(functools.partial(deepseek_v3.route, k=3))
    expert = route(jnp.asarray(LOGITS), jnp.ones((2, 16), bool)).plan.expert
    np.testing.assert_array_equal(expert, plan(LOGITS, 3).expert)


def test_bias_moves_choices_but_never_gates():
    plain, shifted = plan(LOGITS, 3), plan(LOGITS, 3, [0.7] * 8)
    np.testing.assert_array_equal(plain.expert, shifted.expert)
    np.testing.assert_array_equal(plain.gate, shifted.gate)

    pushed = plan(LOGITS, 3, [2.0] + [0.0] * 7)
    assert (pushed.expert[..., 0] == 0).all()
    score = np.take_along_axis(SCORE, pushed.expert, -1)
    np.testing.assert_allclose(pushed.gate, score / score.sum(-1, keepdims=True), rtol=1e-5)


def test_a_masked_group_never_wins_even_when_every_biased_score_is_negative():
    chosen = plan(LOGITS, 3, [-2.0] * 8, groups=4, groups_kept=2)
    best = np.argsort(-SCORE.reshape(2, 16, 4, 2).sum(-1), axis=-1)[..., :2]
    inside = (chosen.expert[..., None] // 2 == best[..., None, :]).any(-1)
    assert inside.all()


def test_a_group_is_judged_by_its_two_best_experts():
    logits = [[[3.0, -9.0, -9.0, 1.0, 1.0, -9.0]]]  # expert 0 is best, but group 1 has the pair
    chosen = plan(np.array(logits), 2, groups=2, groups_kept=1)
    assert set(chosen.expert[0, 0].tolist()) == {3, 4}


def test_keeping_every_group_is_no_limit():
    free, all_kept = plan(LOGITS, 3), plan(LOGITS, 3, groups=4, groups_kept=4)
    np.testing.assert_array_equal(free.expert, all_kept.expert)


def test_gates_of_vanishing_sigmoids_keep_their_ratio():
    logits = [[[-200.0, -201.0, -300.0, -300.0]]]  # every sigmoid is 0 in float32
    gate = plan(np.array(logits), 2, [5.0, 4.0, 0.0, 0.0]).gate[0, 0]
    np.testing.assert_allclose(gate[0] / gate[1], np.e, rtol=1e-5)


def test_a_single_gate_is_the_score_itself():
    np.testing.assert_allclose(
        plan(LOGITS, 1, scale=2.0).gate[..., 0], 2 * SCORE.max(-1), rtol=1e-5
    )


def test_scale_may_be_traced():
    logits, valid = jnp.asarray(LOGITS), jnp.ones((2, 16), bool)
    scaled = jax.jit(lambda s: deepseek_v3.route(logits, valid, k=2, scale=s).plan.gate.sum(-1))
    np.testing.assert_allclose(scaled(jnp.float32(2.5)), 2.5, rtol=1e-5)


def test_the_bias_balances_a_skewed_router():
    logits = jnp.asarray(random_logits((1, 1024, 8)) / 2 + np.linspace(1, -1, 8, dtype=np.float32))
    valid = jnp.ones((1, 1024), bool)

    def step(state, _):
        routing = deepseek_v3.route(logits, valid, k=2, state=state)
        counts = layer_report(routing, routing.plan.valid, valid).row_requested[0]
        violation = counts.max() / counts.mean() - 1
        return deepseek_v3.update_state(state, counts, bias_rate=1e-3), violation

    start = {"bias": jnp.zeros(8)}
    violations = np.asarray(jax.jit(lambda s: jax.lax.scan(step, s, length=1000)[1])(start))
    assert violations[0] > 1.0
    assert violations[-100:].max() < 0.15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 3}, r"groups=3 must .* divide model\.num_experts=8"),
        ({"groups": 0}, "groups=0 must be at least 1"),
        ({"groups": 4, "groups_kept": 5}, r"groups_kept=5 must be between 1 and router\.groups=4"),
        ({"groups": 4, "groups_kept": 0}, "groups_kept=0"),
        ({"groups": 4, "groups_kept": 1}, r"hold 2 experts, fewer than router\.k=3.*at least 2"),
    ],
)
def test_groups_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        deepseek_v3.check(8, k=3, **options)
