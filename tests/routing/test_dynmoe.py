import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import ConfigError
from moe.routing import dynmoe
from tests.routing.direct import gated, make_gate, parameter_gradients, random_tokens, routed

TOKENS = random_tokens((2, 16, 12))
GATE = make_gate(dynmoe.ROUTER, 12, 8)
COSINE = gated(GATE, TOKENS).logits
THRESHOLDS = np.linspace(-0.4, 0.5, 8, dtype=np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def route(thresholds=THRESHOLDS, logits=COSINE, **options):
    return routed(dynmoe.route, logits, inputs={"thresholds": thresholds}, k=2, **options)


def dense(plan, what, E=8):
    hot = plan.expert[..., None] == np.arange(E)
    return (hot * np.where(plan.valid, what, 0)[..., None]).sum(-2)


def test_logits_are_cosines_and_ignore_length():
    vectors = np.asarray(GATE.vectors[...])
    norms = np.linalg.norm(TOKENS, axis=-1, keepdims=True) * np.linalg.norm(vectors, axis=0)
    np.testing.assert_allclose(COSINE, TOKENS @ vectors / norms, atol=1e-5)
    np.testing.assert_allclose(gated(GATE, TOKENS * 50).logits, COSINE, atol=1e-6)


def test_a_token_visits_every_expert_whose_threshold_it_exceeds():
    plan = route().plan
    above = COSINE > THRESHOLDS
    assert 1 < above.sum(-1).mean() < 7
    best = COSINE.max(-1, keepdims=True) == COSINE
    above = np.where(above.any(-1, keepdims=True), above, best)
    np.testing.assert_array_equal(dense(plan, plan.valid) > 0, above)
    np.testing.assert_allclose(dense(plan, plan.gate), above / above.sum(-1, keepdims=True))


def test_a_token_that_exceeds_nothing_gets_its_best_expert():
    plan = route(np.full(8, 2.0, np.float32)).plan
    np.testing.assert_array_equal(plan.valid.sum(-1), 1)
    np.testing.assert_array_equal(plan.expert[..., 0], COSINE.argmax(-1))
    np.testing.assert_array_equal(plan.gate[..., 0], 1.0)


def test_new_thresholds_leave_half_of_the_experts():
    assert abs(route(np.zeros(8, np.float32)).plan.valid.mean() - 0.5) < 0.1


def test_raising_one_threshold_closes_one_expert():
    raised = THRESHOLDS.copy()
    raised[2] = 2.0
    before, after = (dense(r.plan, r.plan.valid) > 0 for r in (route(), route(raised)))
    many = before.sum(-1) > 1
    assert before[..., 2].any()
    assert not after[many][:, 2].any()
    np.testing.assert_array_equal(np.delete(after[many], 2, -1), np.delete(before[many], 2, -1))


def test_the_bound_keeps_the_largest_logits():
    free, bound = route().plan, route(k_max=2).plan
    np.testing.assert_array_equal(bound.expert, free.expert[..., :2])
    np.testing.assert_array_equal(bound.valid.sum(-1), np.minimum(free.valid.sum(-1), 2))
    for token in np.ndindex(2, 16):
        chosen = COSINE[token][free.expert[token][free.valid[token]]]
        assert (np.diff(chosen) <= 0).all()


def test_gates_pass_the_slope_of_the_sigmoids_straight_through():
    weight = np.random.default_rng(1).normal(size=8)  # what each expert's output is worth
    slope = lambda x: sigmoid(x) * (1 - sigmoid(x))  # noqa: E731

    def loss(logits, thresholds):
        plan = dynmoe.route(logits, jnp.ones((2, 16), bool), k=2, thresholds=thresholds).plan
        return (plan.gate * jnp.asarray(weight)[plan.expert]).sum()

    gradients = jax.jit(jax.grad(loss, (0, 1)))(jnp.asarray(COSINE), jnp.asarray(THRESHOLDS))
    share = dense(route().plan, route().plan.gate)  # 1/n for the chosen
    np.testing.assert_allclose(gradients[0], share * weight * slope(COSINE), atol=1e-6)
    by_threshold = -(share * weight).sum((0, 1)) * slope(THRESHOLDS)
    np.testing.assert_allclose(gradients[1], by_threshold, atol=1e-5)


def test_active_counts_experts_and_every_threshold_can_change_it():
    routing = route()
    np.testing.assert_array_equal(routing.terms["active"], routing.plan.valid.sum(-1))
    gradients = parameter_gradients(
        dynmoe.ROUTER, GATE, TOKENS, lambda routing: routing.terms["active"].sum(), k=2
    )
    assert (gradients["thresholds"] < 0).all()  # higher thresholds, fewer experts
    assert np.abs(gradients["vectors"]).min(axis=0).max() > 0


def test_renumbering_experts_renumbers_choices():
    order = np.random.default_rng(0).permutation(8)
    a, b = route(), route(THRESHOLDS[order], COSINE[..., order])
    for what in ("gate", "valid"):
        left, right = (dense(r.plan, getattr(r.plan, what)) for r in (a, b))
        np.testing.assert_allclose(right, left[..., order], rtol=1e-6)
    np.testing.assert_allclose(b.probs, a.probs[..., order], rtol=1e-6)


def test_a_token_of_zeros_has_a_finite_gradient():
    tokens = np.zeros((1, 2, 12), np.float32)
    gradients = parameter_gradients(
        dynmoe.ROUTER, GATE, tokens, lambda r: (r.plan.gate**2).sum() + r.logits.sum(), k=2
    )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


def test_probabilities_are_normalised_sigmoids_even_where_all_underflow():
    score = sigmoid(COSINE)
    np.testing.assert_allclose(route().probs, score / score.sum(-1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(route(logits=np.full_like(COSINE, -1e4)).probs, 1 / 8, rtol=1e-6)


def test_a_bound_beyond_the_experts_is_refused():
    with pytest.raises(ConfigError, match=r"k_max=9 must be between 1 and model\.num_experts=8"):
        dynmoe.check(8, k=2, k_max=9)
