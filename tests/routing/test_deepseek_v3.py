import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import ConfigError
from moe.routing import deepseek_v3
from moe.routing.report import layer_report
from tests.routing.cases import GOLDEN_LOGITS, GOLDEN_VALID, random_logits

VALID = jnp.ones((2, 16), bool)


def bias(values):
    return {"bias": jnp.asarray(values, jnp.float32)}


def test_example_worked_out_in_float64():
    plan = deepseek_v3.route(
        jnp.asarray(GOLDEN_LOGITS),
        jnp.asarray(GOLDEN_VALID),
        k=2,
        state=bias([-0.3, 0, 0, 0.2]),
        groups=2,
        groups_kept=1,
        scale=2.5,
    ).plan
    np.testing.assert_array_equal(plan.expert[0, :, 0] // 2, [0, 1, 0, 1, 1, 1, 1, 0])
    np.testing.assert_array_equal(
        plan.expert[0], [[1, 0], [2, 3], [0, 1], [3, 2], [2, 3], [3, 2], [3, 2], [1, 0]]
    )
    np.testing.assert_allclose(plan.gate[0, 0], [1.1339, 1.3661], atol=5e-5)
    np.testing.assert_allclose(plan.gate[0, 1], [1.6486, 0.8514], atol=5e-5)


def test_probs_are_normalised_sigmoids():
    logits = random_logits((2, 16, 8))
    score = jax.nn.sigmoid(logits)
    probs = deepseek_v3.route(logits, VALID, k=2).probs
    np.testing.assert_allclose(probs, score / score.sum(-1, keepdims=True), rtol=1e-5)


def test_bias_moves_choices_but_never_gates():
    logits = random_logits((2, 16, 8))
    plain = deepseek_v3.route(logits, VALID, k=3).plan
    shifted = deepseek_v3.route(logits, VALID, k=3, state=bias([0.7] * 8)).plan
    np.testing.assert_array_equal(plain.expert, shifted.expert)
    np.testing.assert_array_equal(plain.gate, shifted.gate)

    pushed = deepseek_v3.route(logits, VALID, k=3, state=bias([2.0] + [0.0] * 7)).plan
    assert bool((pushed.expert[..., 0] == 0).all())
    score = np.take_along_axis(np.asarray(jax.nn.sigmoid(logits)), np.asarray(pushed.expert), -1)
    np.testing.assert_allclose(pushed.gate, score / score.sum(-1, keepdims=True), rtol=1e-5)


def test_a_masked_group_never_wins_even_when_every_biased_score_is_negative():
    logits = random_logits((2, 16, 8))
    plan = deepseek_v3.route(
        logits, VALID, k=3, state=bias([-2.0] * 8), groups=4, groups_kept=2
    ).plan
    score = np.asarray(jax.nn.sigmoid(logits)).reshape(2, 16, 4, 2).sum(-1)
    best = np.argsort(-score, axis=-1)[..., :2]
    inside = (np.asarray(plan.expert)[..., None] // 2 == best[..., None, :]).any(-1)
    assert inside.all()


def test_a_group_is_judged_by_its_two_best_experts():
    logits = jnp.array([[[3.0, -9.0, -9.0, 1.0, 1.0, -9.0]]])  # best expert, but best pair is 1
    plan = deepseek_v3.route(logits, jnp.ones((1, 1), bool), k=2, groups=2, groups_kept=1).plan
    assert set(plan.expert[0, 0].tolist()) == {3, 4}


def test_keeping_every_group_is_no_limit():
    logits = random_logits((2, 16, 8))
    free = deepseek_v3.route(logits, VALID, k=3).plan
    all_kept = deepseek_v3.route(logits, VALID, k=3, groups=4, groups_kept=4).plan
    np.testing.assert_array_equal(free.expert, all_kept.expert)


def test_gates_of_vanishing_sigmoids_keep_their_ratio():
    logits = jnp.array([[[-200.0, -201.0, -300.0, -300.0]]])  # sigmoid is 0 in float32
    plan = deepseek_v3.route(
        logits, jnp.ones((1, 1), bool), k=2, state=bias([5.0, 4.0, 0.0, 0.0])
    ).plan
    np.testing.assert_allclose(plan.gate[0, 0, 0] / plan.gate[0, 0, 1], np.e, rtol=1e-5)


def test_a_single_gate_is_the_score_itself():
    logits = random_logits((2, 16, 8))
    plan = deepseek_v3.route(logits, VALID, k=1, scale=2.0).plan
    np.testing.assert_allclose(plan.gate[..., 0], 2 * jax.nn.sigmoid(logits).max(-1), rtol=1e-6)


def test_scale_may_be_traced():
    scaled = jax.jit(lambda s: deepseek_v3.route(random_logits((2, 16, 8)), VALID, k=2, scale=s))
    np.testing.assert_allclose(scaled(jnp.float32(2.5)).plan.gate.sum(-1), 2.5, rtol=1e-5)


def test_the_bias_balances_a_skewed_router():
    skew = jnp.linspace(1.0, -1.0, 8)[None, None]
    logits = jax.random.normal(jax.random.key(0), (1, 1024, 8)) + skew
    valid = jnp.ones((1, 1024), bool)

    def step(state, _):
        routing = deepseek_v3.route(logits, valid, k=2, state=state)
        counts = layer_report(routing, routing.plan.valid, valid).row_requested[0]
        violation = counts.max() / counts.mean() - 1
        return deepseek_v3.update_state(state, counts, bias_rate=1e-3), violation

    _, violations = jax.jit(lambda s: jax.lax.scan(step, s, length=1000))(bias([0.0] * 8))
    assert float(violations[0]) > 1.0
    assert float(violations[-100:].max()) < 0.15


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
