import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import ConfigError
from moe.routing import product_key
from tests.routing.direct import gated, make_gate, parameter_gradients, random_tokens, routed

TOKENS = random_tokens((2, 16, 12))


def said(heads, num_experts=16):
    return gated(make_gate(product_key.ROUTER, 12, num_experts, heads=heads), TOKENS)


def route(heads, k, num_experts=16):
    what = said(heads, num_experts)
    return routed(product_key.route, what.logits, inputs=what.inputs, k=k)


def exhaustive(heads, k, num_experts=16):
    """Every expert of every head compared, in float64: experts by head, and the dense gates."""
    inputs = said(heads, num_experts).inputs
    rows, columns = (np.asarray(inputs[x], np.float64) for x in ("row_scores", "column_scores"))
    scores = (rows[..., :, None] + columns[..., None, :]).reshape(*rows.shape[:3], num_experts)
    expert = np.argsort(-scores, axis=-1)[..., : k // heads]  # [B S H k/H]
    weight = np.exp(np.take_along_axis(scores, expert, -1))
    weight /= weight.sum(-1, keepdims=True)
    dense = np.zeros_like(scores)
    np.put_along_axis(dense, expert, weight, -1)
    return expert, dense.sum(2), scores


def dense(plan, num_experts):
    hot = plan.expert[..., None] == np.arange(num_experts)
    return (hot * np.where(plan.valid, plan.gate, 0)[..., None]).sum(-2)


@pytest.mark.parametrize("k", [2, 3, 4, 7, 16])
def test_two_stages_find_what_comparing_all_experts_finds(k):
    plan = route(1, k).plan
    expert, gates, _ = exhaustive(1, k)
    np.testing.assert_array_equal(plan.expert, expert[:, :, 0])
    np.testing.assert_allclose(dense(plan, 16), gates, atol=1e-6)
    assert plan.valid.all()


@pytest.mark.parametrize("num_experts", [9, 25, 64])
def test_every_k_is_exact_on_drawn_scores(num_experts):
    rng, side = np.random.default_rng(0), round(num_experts**0.5)
    rows, columns = rng.standard_normal((2, 1, 200, side), np.float32)
    sums = (rows[..., :, None] + columns[..., None, :]).reshape(1, 200, num_experts)
    order = np.argsort(-sums, axis=-1)
    retrieve = jax.jit(product_key.retrieve, static_argnums=2)
    for k in (1, 2, side - 1, side, side + 1, num_experts):
        np.testing.assert_array_equal(retrieve(rows, columns, k), order[..., :k])


@pytest.mark.parametrize(("heads", "k"), [(2, 4), (4, 16)])
def test_an_expert_that_several_heads_found_is_named_once_with_all_its_gate(heads, k):
    plan = route(heads, k).plan
    expert, gates, _ = exhaustive(heads, k)
    np.testing.assert_allclose(dense(plan, 16), gates, atol=1e-5)
    np.testing.assert_allclose(plan.gate.sum(-1), heads, rtol=1e-5)
    np.testing.assert_array_equal(plan.valid, plan.gate > 0)
    for token in np.ndindex(2, 16):
        named = plan.expert[token][plan.valid[token]]
        assert sorted(named) == sorted(set(expert[token].ravel()))
    assert not plan.valid.all()


def test_logits_and_probabilities_are_means_over_heads():
    routing = route(2, 4)
    *_, scores = exhaustive(2, 4)
    np.testing.assert_allclose(routing.logits, scores.mean(2), atol=1e-5)
    probs = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(routing.probs, probs.mean(2), rtol=1e-4)


def test_an_expert_is_its_row_times_the_side_plus_its_column():
    rows, columns = np.zeros((1, 1, 4), np.float32), np.zeros((1, 1, 4), np.float32)
    rows[..., 2], columns[..., 3] = 1.0, 1.0
    assert product_key.retrieve(jnp.asarray(rows), jnp.asarray(columns), 1).item() == 2 * 4 + 3


def test_queries_are_normalised_by_themselves():
    gate = make_gate(product_key.ROUTER, 12, 16, heads=2)
    whole = gated(gate, TOKENS)
    np.testing.assert_allclose(gated(gate, TOKENS * 30).logits, whole.logits, atol=1e-4)
    others = np.concatenate([TOKENS[:1, :3], 9 * random_tokens((1, 13, 12), seed=1)], axis=1)
    np.testing.assert_array_equal(gated(gate, others).logits[:, :3], whole.logits[:1, :3])
    assert np.isfinite(gated(gate, np.zeros_like(TOKENS)).logits).all()


def test_the_task_reaches_both_tables_and_the_queries():
    gate = make_gate(product_key.ROUTER, 12, 16, heads=2)
    gradients = parameter_gradients(
        product_key.ROUTER, gate, TOKENS, lambda r: (r.plan.gate**2).sum(), k=8
    )
    assert set(gradients) == {"query", "row_keys", "column_keys"}
    assert all(np.abs(g).max() > 1e-3 for g in gradients.values())


def test_gradient_of_the_gates_is_that_of_the_exhaustive_search():
    what = said(2)
    weight = np.random.default_rng(0).standard_normal(16, np.float32)
    expert, *_ = exhaustive(2, 8)
    valid = jnp.ones((2, 16), bool)

    def two_stage(rows, columns):
        inputs = {"row_scores": rows, "column_scores": columns}
        plan = product_key.route(jnp.asarray(what.logits), valid, k=8, **inputs).plan
        return (plan.gate * jnp.asarray(weight)[plan.expert]).sum()

    def direct(rows, columns):
        scores = (rows[..., :, None] + columns[..., None, :]).reshape(2, 16, 2, 16)
        gate = jax.nn.softmax(jnp.take_along_axis(scores, jnp.asarray(expert), -1))
        return (gate * jnp.asarray(weight)[expert]).sum()

    halves = [jnp.asarray(what.inputs[x]) for x in ("row_scores", "column_scores")]
    both = [jax.jit(jax.grad(f, (0, 1)))(*halves) for f in (two_stage, direct)]
    for a, b in zip(*both, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_padding_has_no_expert_and_extreme_scores_are_finite():
    what, valid = said(2), np.arange(16) < np.array([[16], [5]])
    for scale in (0.0, 1.0, 1e4):
        inputs = {name: x * np.float32(scale) for name, x in what.inputs.items()}
        routing = routed(product_key.route, what.logits, valid, inputs=inputs, k=8)
        np.testing.assert_array_equal(routing.plan.valid.any(-1), valid)
        assert not routing.plan.gate[~valid].any()
        assert np.isfinite(routing.plan.gate).all()
        np.testing.assert_allclose(routing.probs.sum(-1), 1.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("num_experts", "k", "options", "message"),
    [
        (8, 2, {}, r"num_experts=8 .* must be a square.*use 4 or 9"),
        (16, 4, {"heads": 3}, r"heads=3 must be at least 1 and divide router\.k=4"),
        (16, 4, {"heads": 0}, r"heads=0"),
        (16, 4, {"heads": 4}, r"one expert to each head.*Set router\.k=8"),
        (16, 1, {}, "no gradient"),
        (16, 2, {"key_dim": 7}, r"key_dim=7 must be even"),
    ],
)
def test_impossible_options_are_refused(num_experts, k, options, message):
    with pytest.raises(ConfigError, match=message):
        product_key.check(num_experts, k=k, **options)
