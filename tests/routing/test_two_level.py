import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import ConfigError
from moe.routing import topk, two_level
from moe.routing.two_level import ROUTER, TwoLevelGate, derive_group_logits
from tests.routing.cases import random_logits

B, S, E, G = 2, 6, 8, 4
Y = E // G
LOGITS = random_logits((B, S, E))
GROUPS = random_logits((B, S, G), seed=1)
VALID = np.ones((B, S), bool)


@functools.partial(jax.jit, static_argnames=("k", "groups_kept", "variant", "norm"))
def _route(logits, group_logits, valid, **options):
    return two_level.route(logits, valid, group_logits=group_logits, **options)


def route(logits=LOGITS, group_logits=GROUPS, valid=VALID, **options):
    arrays = (jnp.asarray(x) for x in (logits, group_logits, valid))
    return jax.device_get(_route(*arrays, **options))


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True), dtype=np.float64)
    return x / x.sum(-1, keepdims=True)


A = softmax(GROUPS)
INSIDE = softmax(LOGITS.reshape(B, S, G, Y))  # b
JOINT = (A[..., None] * INSIDE).reshape(B, S, E)


def dense(plan, num_experts=E):
    hits = np.arange(num_experts) == plan.expert[..., None]
    return (hits * plan.gate[..., None]).sum(-2)


def test_soft_is_the_whole_joint_distribution():
    routing = route(k=E, variant="soft", norm="none")
    np.testing.assert_allclose(routing.probs, JOINT, rtol=1e-5)
    np.testing.assert_allclose(dense(routing.plan), JOINT, rtol=1e-5)
    np.testing.assert_allclose(routing.plan.gate.sum(-1), 1.0, rtol=1e-5)


def test_hard_takes_the_best_experts_of_the_best_groups():
    plan = route(k=2, groups_kept=2, norm="none").plan
    groups = np.argsort(-GROUPS, axis=-1)[..., :2]
    best = np.take_along_axis(INSIDE.argmax(-1), groups, -1)
    np.testing.assert_array_equal(plan.expert, groups * Y + best)
    np.testing.assert_allclose(
        plan.gate, np.take_along_axis(JOINT, plan.expert.astype(int), -1), rtol=1e-5
    )


def test_several_experts_in_each_of_several_groups():
    logits, groups = random_logits((B, S, 12), seed=2), random_logits((B, S, 3), seed=3)
    plan = route(logits, groups, k=4, groups_kept=2, norm="none").plan
    for b, s in np.ndindex(B, S):
        expected = []
        for g in np.argsort(-groups[b, s])[:2]:
            inside = logits[b, s, 4 * g : 4 * g + 4]
            expected += (4 * g + np.argsort(-inside)[:2]).tolist()
        assert plan.expert[b, s].tolist() == expected


def test_limited_takes_the_best_of_the_joint_distribution_in_the_best_groups():
    plan = route(k=3, groups_kept=2, variant="limited", norm="none").plan
    kept = np.argsort(-GROUPS, axis=-1)[..., :2]
    reached = (np.arange(E)[:, None] // Y == kept[..., None, :]).any(-1)
    expected = np.argsort(-np.where(reached, JOINT, -1.0), axis=-1)[..., :3]
    np.testing.assert_array_equal(plan.expert, expected)


@pytest.mark.parametrize(("variant", "k", "kept"), [("hard", 4, 2), ("limited", 3, 2)])
def test_a_token_reaches_no_more_groups_than_it_may(variant, k, kept):
    plan = route(k=k, groups_kept=kept, variant=variant).plan
    reached = [len(set(e)) for e in (plan.expert // Y).reshape(-1, k)]
    assert max(reached) <= kept
    assert (np.diff(np.sort(plan.expert, axis=-1), axis=-1) > 0).all()


def test_norms():
    none, joint, level = (
        route(k=4, groups_kept=2, norm=norm).plan for norm in ("none", "joint", "level")
    )
    np.testing.assert_array_equal(none.expert, level.expert)
    np.testing.assert_allclose(joint.gate, none.gate / none.gate.sum(-1, keepdims=True), rtol=1e-5)
    kept = np.sort(A, axis=-1)[..., :-3:-1]
    a = kept / kept.sum(-1, keepdims=True)
    # Groups of two of which both are taken: b is already of sum 1.
    b = -np.sort(-np.take_along_axis(INSIDE, (none.expert[..., ::2] // Y)[..., None], 2), axis=-1)
    np.testing.assert_allclose(level.gate, (a[..., None] * b).reshape(B, S, 4), rtol=1e-5)


def test_group_logits_by_logsumexp_make_the_flat_softmax():
    derived = np.asarray(derive_group_logits(jnp.asarray(LOGITS), G, "logsumexp"))
    np.testing.assert_allclose(
        route(LOGITS, derived, k=E, variant="soft").probs, softmax(LOGITS), rtol=1e-5
    )


def test_group_logits_by_the_best_experts():
    grouped = np.sort(LOGITS.reshape(B, S, 2, 4), axis=-1)
    logits = jnp.asarray(LOGITS)
    np.testing.assert_allclose(derive_group_logits(logits, 2, "max"), grouped[..., -1])
    np.testing.assert_allclose(
        derive_group_logits(logits, 2, "top2"), grouped[..., -2:].sum(-1), rtol=1e-6
    )


@pytest.mark.parametrize("groups", [1, E])
def test_one_group_or_groups_of_one_are_the_flat_router(groups):
    flat = jax.device_get(topk.route(jnp.asarray(LOGITS), jnp.asarray(VALID), k=2))
    within, of_groups = (LOGITS, LOGITS[..., :1]) if groups == 1 else (LOGITS * 0, LOGITS)
    kept = min(groups, 2)
    ours = route(within, of_groups, k=2, groups_kept=kept)
    np.testing.assert_allclose(ours.probs, flat.probs, rtol=1e-5)
    np.testing.assert_array_equal(ours.plan.expert, flat.plan.expert)
    np.testing.assert_allclose(ours.plan.gate, flat.plan.gate, rtol=1e-5)


def test_all_groups_with_all_experts_are_the_dense_mixture():
    np.testing.assert_allclose(dense(route(k=E, groups_kept=G, norm="none").plan), JOINT, rtol=1e-5)


@pytest.mark.parametrize("variant", ["hard", "limited"])
def test_renumbering_groups_and_experts_inside_them_renumbers_the_choices(variant):
    rng = np.random.default_rng(0)
    a = dense(route(k=4, groups_kept=2, variant=variant).plan)
    for _ in range(10):
        groups = rng.permutation(G)
        order = rng.permuted(np.arange(E).reshape(G, Y), axis=1)[groups].reshape(-1)
        b = route(LOGITS[..., order], GROUPS[..., groups], k=4, groups_kept=2, variant=variant)
        np.testing.assert_allclose(dense(b.plan), a[..., order], rtol=1e-5, atol=1e-7)


def test_terms_are_the_probabilities_of_both_levels():
    terms = route(k=2, groups_kept=2).terms
    np.testing.assert_allclose(terms["group_probs"], A, rtol=1e-5)
    kept = np.argsort(-GROUPS, axis=-1)[..., :2]
    reached = (np.arange(E)[:, None] // Y == kept[..., None, :]).any(-1)
    expected = np.where(reached, INSIDE.reshape(B, S, E), 0.0)
    np.testing.assert_allclose(terms["within_probs"], expected, rtol=1e-5)


@pytest.mark.parametrize(("variant", "norm", "k"), [("hard", "level", 4), ("limited", "joint", 3)])
def test_both_levels_learn_from_the_task(variant, norm, k):
    weight = np.random.default_rng(1).normal(size=(1, 2, k))
    x, g = np.float64(LOGITS[:1, :2]), np.float64(GROUPS[:1, :2])

    def loss(logits, group_logits):
        plan = two_level.route(
            logits,
            jnp.ones((1, 2), bool),
            k=k,
            group_logits=group_logits,
            variant=variant,
            norm=norm,
        ).plan
        return (plan.gate * weight).sum()

    with jax.enable_x64(True):
        evaluate = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        gradients = evaluate(jnp.asarray(x), jnp.asarray(g))[1]
        rng, h = np.random.default_rng(2), 1e-5
        for _ in range(4):
            dx, dg = rng.normal(size=x.shape), rng.normal(size=g.shape)
            values = [evaluate(x + t * h * dx, g + t * h * dg)[0] for t in (1, -1)]
            slope = (gradients[0] * dx).sum() + (gradients[1] * dg).sum()
            np.testing.assert_allclose(
                (values[0] - values[1]) / (2 * h), slope, rtol=1e-4, atol=1e-9
            )
    assert all(np.abs(gradient).max() > 1e-3 for gradient in gradients)


@pytest.mark.parametrize("variant", ["hard", "limited"])
def test_extreme_logits_give_finite_gates(variant):
    signs = np.sign(LOGITS) * np.float32(1e4)
    plan = route(signs, np.sign(GROUPS) * np.float32(1e4), k=4, variant=variant).plan
    np.testing.assert_allclose(plan.gate.sum(-1), 1.0, rtol=1e-5)
    assert (np.diff(np.sort(plan.expert, axis=-1), axis=-1) > 0).all()


def test_gate_has_a_matrix_for_groups_only_if_their_score_is_learned():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((B, S, 16), np.float32))
    learned = TwoLevelGate(16, E, rngs=nnx.Rngs(0), groups=G)
    gated = learned(x)
    np.testing.assert_allclose(
        gated.inputs["group_logits"], x @ learned.group_kernel[...], rtol=1e-4, atol=1e-5
    )
    derived = TwoLevelGate(16, E, rngs=nnx.Rngs(0), groups=G, group_score="max")
    assert not hasattr(derived, "group_kernel")
    gated = derived(x)
    best = gated.logits.reshape(B, S, G, Y).max(-1)
    np.testing.assert_array_equal(gated.inputs["group_logits"], best)


def test_options_are_read_from_the_gate_and_the_route():
    assert ROUTER.options == {
        "groups": 4,
        "group_score": "learned",
        "groups_kept": 2,
        "variant": "hard",
        "norm": "joint",
    }
    ROUTER.check(8, k=2, **ROUTER.options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "both"}, "variant='both' is not one of soft, hard, limited"),
        ({"norm": "sum"}, "norm='sum' is not one of"),
        ({"group_score": "mean"}, "group_score='mean' is not one of learned, max"),
        ({"groups": 3}, r"groups=3 must .* divide model\.num_experts=8"),
        ({"groups_kept": 5}, r"groups_kept=5 must be between 1 and router\.groups=4"),
        ({"groups_kept": 1, "k": 3}, r"hold 2 experts, fewer than router\.k=3; keep at least 2"),
        ({"groups_kept": 3, "k": 2}, r"k=2 must be a multiple of router\.groups_kept=3"),
        ({"variant": "soft"}, r"k=4 with router\.variant='soft'.*router\.k=8"),
        ({"variant": "limited", "norm": "level"}, "a kept group may have no chosen expert"),
        ({"groups_kept": 1, "k": 2}, "choice of the group would never learn"),
        ({"norm": "level", "k": 2}, "choice of the expert would never learn"),
        ({"groups": 1, "groups_kept": 1, "k": 1}, "choice of the expert would never learn"),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        two_level.check(8, **{"k": 4, **options})


def test_a_single_group_may_be_normalised_if_its_score_is_not_learned_apart():
    two_level.check(8, k=2, groups_kept=1, group_score="max")
