import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import ConfigError
from moe.routing import deepseek_v2, topk
from moe.routing.deepseek_v3 import keep_groups
from tests.routing.cases import random_logits

LOGITS = random_logits((2, 16, 8))
VALID = np.ones((2, 16), bool)


@functools.cache
def compiled(route, **options):
    return jax.jit(functools.partial(route, **options))


def routing(logits, valid=None, **options):
    valid = np.ones(logits.shape[:2], bool) if valid is None else valid
    route = compiled(deepseek_v2.route, **options)
    return jax.device_get(route(jnp.asarray(logits, jnp.float32), jnp.asarray(valid)))


def best_groups(logits, groups, kept):
    """The groups of the largest single logits, by sorting."""
    best = logits.reshape(*logits.shape[:2], groups, -1).max(-1)
    return np.argsort(-best, axis=-1)[..., :kept]


@pytest.mark.parametrize("kept", [2, 3])
def test_experts_are_the_best_inside_the_groups_of_the_best_experts(kept):
    plan = routing(LOGITS, k=3, groups=4, groups_kept=kept).plan
    for b, t in np.ndindex(2, 16):
        groups = best_groups(LOGITS, 4, kept)[b, t]
        inside = [e for e in np.argsort(-LOGITS[b, t]) if e // 2 in groups]
        np.testing.assert_array_equal(plan.expert[b, t], inside[:3])


def test_a_group_is_judged_by_its_best_expert_alone():
    logits = np.array([[[3.0, -9.0, -8.0, 1.0, 1.5, -9.0]]], np.float32)  # group 1 has the pair
    plan = routing(logits, k=2, groups=2, groups_kept=1).plan
    np.testing.assert_array_equal(plan.expert[0, 0], [0, 2])


def test_every_group_kept_is_plain_topk_with_raw_gates():
    limited = routing(LOGITS, k=3, groups=4, groups_kept=4).plan
    plain = compiled(topk.route, k=3, normalize="none")(jnp.asarray(LOGITS), VALID).plan
    jax.tree.map(np.testing.assert_array_equal, limited, jax.device_get(plain))


def test_gates_are_scaled_probabilities_of_all_experts_and_the_scale_may_be_traced():
    route = jax.jit(
        lambda scale: deepseek_v2.route(
            jnp.asarray(LOGITS), jnp.asarray(VALID), k=3, groups=4, groups_kept=2, scale=scale
        )
    )
    result = jax.device_get(route(jnp.float32(16.0)))
    probs = np.exp(LOGITS.astype(np.float64))
    probs /= probs.sum(-1, keepdims=True)
    expected = 16 * np.take_along_axis(probs, result.plan.expert, -1)
    np.testing.assert_allclose(result.plan.gate, expected, rtol=1e-5)
    np.testing.assert_allclose(result.probs, probs, rtol=1e-5)


@pytest.mark.parametrize("shift", [-50.0, -1e4])
def test_masked_groups_never_win_when_every_logit_is_negative(shift):
    logits = (LOGITS if shift == -50.0 else np.round(LOGITS * 64)) + np.float32(shift)
    a = routing(logits, k=3, groups=4, groups_kept=2).plan
    group = a.expert // 2
    inside = (group[..., None] == best_groups(logits, 4, 2)[..., None, :]).any(-1)
    assert inside.all()


def test_masking_is_minus_infinity_for_both_ways_to_judge_a_group():
    for best in (1, 2):
        kept = np.asarray(keep_groups(jnp.asarray(LOGITS), 4, 2, best))
        assert (np.isneginf(kept).sum(-1) == 4).all()
        np.testing.assert_array_equal(kept[np.isfinite(kept)], LOGITS[np.isfinite(kept)])


def test_term_shares_out_one_among_the_groups_that_hold_a_chosen_expert():
    result = routing(LOGITS, k=3, groups=4, groups_kept=2)
    term, used = result.terms["groups_reached"], 0
    assert term.shape == (2, 16, 4)
    for b, t in np.ndindex(2, 16):
        reached = set((result.plan.expert[b, t] // 2).tolist())
        np.testing.assert_array_equal(term[b, t], [0.5 * (g in reached) for g in range(4)])
        used += len(reached)
    assert used == 2 * 32  # three experts never fit in one group of two


def test_a_token_that_uses_one_of_its_groups_reports_less_than_one():
    logits = np.array([[[5.0, 4.0, 1.0, 0.0]]], np.float32)
    result = routing(logits, k=2, groups=2, groups_kept=2)
    np.testing.assert_array_equal(result.terms["groups_reached"][0, 0], [0.5, 0])


def test_a_single_choice_learns_from_its_raw_probability():
    def loss(x):
        return compiled(deepseek_v2.route, k=1)(x, jnp.asarray(VALID)).plan.gate.sum()

    assert np.abs(jax.grad(loss)(jnp.asarray(LOGITS))).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 3}, r"groups=3 must .* divide model\.num_experts=8"),
        ({"groups": 4, "groups_kept": 5}, r"groups_kept=5 must be between 1 and router\.groups=4"),
        ({"groups": 4, "groups_kept": 1}, r"hold 2 experts, fewer than router\.k=3.*at least 2"),
    ],
)
def test_groups_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        deepseek_v2.ROUTER.check(8, k=3, **options)
