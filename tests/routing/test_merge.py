import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from moe.errors import ConfigError
from moe.routing import merge
from moe.routing.merge import LORY, SMEAR, LoryGate, MeanGate
from moe.routing.report import merging_weights
from tests.routing.cases import random_logits

B, S, D, E, SEGMENT = 3, 8, 6, 4, 2
LOGITS = random_logits((B, S, E))
FIRST = np.array([0.5, -1, 0, 2], np.float32)


@functools.cache
def compiled(name, options):
    return jax.jit(
        functools.partial({"smear": merge.smear, "lory": merge.lory}[name], k=1, **dict(options))
    )


def smear(logits, valid=None, *, key=None, **options):
    valid = np.ones(logits.shape[:2], bool) if valid is None else valid
    return jax.device_get(compiled("smear", tuple(options.items()))(logits, valid, key=key))


def lory(logits, valid=None, first=FIRST, **options):
    valid = np.ones(logits.shape[:2], bool) if valid is None else valid
    run = compiled("lory", tuple({"segment": SEGMENT, **options}.items()))
    return jax.device_get(run(logits, valid, first))


def merged(weight, tokens, experts):
    """The layer with experts `tanh(x @ experts[e])`, merged for each segment, in NumPy."""
    M = weight.shape[1]
    size = -(-tokens.shape[1] // M)
    theta = np.einsum("bme,edx->bmdx", weight, experts)
    theta = theta.repeat(size, axis=1)[:, : tokens.shape[1]]
    return np.tanh(np.einsum("bsd,bsdx->bsx", tokens, theta))


def test_smear_merges_by_the_mean_of_the_row():
    valid = np.arange(S) < np.array([[8], [5], [0]])
    routing = smear(np.where(valid[..., None], LOGITS, np.float32(1e3)), valid, training=False)
    expected = [LOGITS[0].mean(axis=0), LOGITS[1, :5].mean(axis=0), np.zeros(E)]
    np.testing.assert_allclose(routing.plan.weight[:, 0], softmax(expected, -1), rtol=1e-4)
    assert routing.plan.weight.shape == (B, 1, E)
    np.testing.assert_allclose(routing.probs, routing.plan.weight.repeat(S, axis=1), rtol=1e-6)


def test_mean_gate_normalises_the_mean_of_the_valid_tokens():
    gate = MeanGate(D, E, rngs=nnx.Rngs(0))
    gate.scale[...] = jnp.linspace(0.5, 2, D)
    tokens = np.random.default_rng(0).normal(size=(B, S, D)).astype(np.float32)
    valid = np.arange(S) < np.array([[8], [5], [1]])
    logits = np.asarray(gate(jnp.asarray(tokens), valid=jnp.asarray(valid)).logits)
    assert logits.shape == (B, S, E)
    np.testing.assert_array_equal(logits, logits[:, :1].repeat(S, axis=1))
    mean = np.stack([x[v].mean(axis=0) for x, v in zip(tokens, valid, strict=True)])
    normal = (mean - mean.mean(-1, keepdims=True)) / mean.std(-1, keepdims=True)
    expected = normal * np.linspace(0.5, 2, D) @ np.asarray(gate.kernel[...])
    np.testing.assert_allclose(logits[:, 0], expected, rtol=1e-3, atol=1e-5)
    weight = smear(logits, valid, training=False).plan.weight[:, 0]
    np.testing.assert_allclose(weight, softmax(expected, -1), rtol=1e-3)


def test_expert_dropout_leaves_experts_out_of_whole_rows_and_renormalises():
    logits = np.zeros((20000, 1, E), np.float32)
    logits[:, 0, 0] = 1.0
    weight = smear(logits, key=jax.random.key(0), dropout=0.1).plan.weight[:, 0]
    np.testing.assert_allclose(weight.sum(axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose((weight == 0).mean(axis=0), 0.1, atol=5 * 0.3 / 20000**0.5)
    kept = weight > 0
    mass = np.array([np.e, 1, 1, 1])
    expected = kept * mass / (kept * mass).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(weight, expected, rtol=1e-4)


def test_a_row_keeps_its_experts_when_all_would_drop_out():
    weight = smear(
        np.zeros((500, 1, 2), np.float32), key=jax.random.key(0), dropout=0.9
    ).plan.weight
    assert np.isfinite(weight).all()
    np.testing.assert_allclose(weight.sum(axis=-1), 1, rtol=1e-6)
    assert (weight == 0.5).all(axis=-1).mean() > 0.7  # chance of neither or both: 0.82


def test_dropout_is_of_training_only_and_zero_is_none():
    a, b = smear(LOGITS, training=False), smear(LOGITS, key=jax.random.key(0), dropout=0.0)
    np.testing.assert_array_equal(a.plan.weight, b.plan.weight)
    assert (a.plan.weight > 0).all()
    with pytest.raises(ValueError, match="pass a key"):
        merge.smear(jnp.asarray(LOGITS), jnp.ones((B, S), bool), k=1)


def test_lory_routes_each_segment_by_the_mean_of_the_one_before():
    routing = lory(LOGITS)
    means = LOGITS.reshape(B, S // SEGMENT, SEGMENT, E).mean(axis=2)
    expected = np.concatenate([np.broadcast_to(FIRST, (B, 1, E)), means[:, :-1]], axis=1)
    np.testing.assert_allclose(routing.plan.weight, softmax(expected, -1), rtol=1e-4)
    np.testing.assert_allclose(routing.logits, expected.repeat(SEGMENT, axis=1), rtol=1e-5)
    np.testing.assert_allclose(routing.probs, softmax(routing.logits, -1), rtol=1e-5)


def test_mean_logits_of_the_lory_gate_are_the_logits_of_the_mean_token():
    gate = LoryGate(D, E, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).normal(size=(B, S, D)).astype(np.float32)
    gated = gate(jnp.asarray(tokens))
    np.testing.assert_array_equal(gated.inputs["first"], np.zeros(E))
    weight = lory(np.asarray(gated.logits), first=np.zeros(E, np.float32)).plan.weight
    mean = tokens.reshape(B, -1, SEGMENT, D).mean(axis=2)
    expected = softmax(mean @ np.asarray(gate.linear.kernel[...]), -1)
    np.testing.assert_allclose(weight[:, 1:], expected[:, :-1], rtol=1e-4)
    np.testing.assert_allclose(weight[:, 0], 1 / E)


def test_a_segment_counts_its_valid_tokens_only():
    valid = np.arange(S) < np.array([[8], [5], [0]])
    weight = lory(np.where(valid[..., None], LOGITS, np.float32(1e3)), valid).plan.weight
    np.testing.assert_allclose(weight[1, 3], softmax(LOGITS[1, 4]), rtol=1e-4)
    np.testing.assert_allclose(weight[2, 1:], 1 / E)


def test_lory_sees_no_later_token_and_none_of_its_own_segment():
    assert LORY.causality == "C1"
    before = lory(LOGITS)
    for t in range(S - 1):
        changed = np.concatenate([LOGITS[:, : t + 1], -3 * LOGITS[:, t + 1 :]], axis=1)
        after, safe = lory(changed), SEGMENT * ((t + 1) // SEGMENT + 1)
        for a, b in ((before.probs, after.probs), (before.logits, after.logits)):
            np.testing.assert_array_equal(a[:, :safe], b[:, :safe])
        assert (before.probs[:, safe:] != after.probs[:, safe:]).any() or safe >= S


def test_smear_sees_later_tokens_and_no_other_row():
    assert SMEAR.causality == "C3"
    assert not SMEAR.causal_in_eval
    changed = LOGITS.copy()
    changed[0, -1] += FIRST
    a, b = (smear(x, training=False).plan.weight for x in (LOGITS, changed))
    assert np.abs(a[0] - b[0]).max() > 1e-3
    np.testing.assert_array_equal(a[1:], b[1:])


def test_permuting_experts_permutes_their_weights():
    order = np.random.default_rng(0).permutation(E)
    pairs = [
        (smear(LOGITS, training=False), smear(LOGITS[..., order], training=False)),
        (lory(LOGITS), lory(LOGITS[..., order], first=FIRST[order])),
    ]
    for before, after in pairs:
        np.testing.assert_allclose(after.plan.weight, before.plan.weight[..., order], rtol=1e-5)


def test_a_segment_as_long_as_the_row_is_routed_by_the_constant():
    weight = lory(LOGITS, segment=S).plan.weight
    np.testing.assert_allclose(weight, np.broadcast_to(softmax(FIRST), (B, 1, E)), rtol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 5, 7, 8, 9, 13])
@pytest.mark.parametrize("segment", [1, 4, 6])
def test_plans_of_any_length_keep_the_borders_of_segments(length, segment):
    size = merge.plan_segment(length, segment)
    assert size == (segment if length % segment == 0 else min(size, segment))
    M = -(-length // size)
    assert -(-length // M) == size
    borders = set(range(0, length, segment))
    assert borders <= set(range(0, length, size))


def test_weights_of_a_row_that_segments_do_not_divide_are_those_of_its_tokens():
    routing = lory(LOGITS[:, :7], segment=4)
    spread = merging_weights(routing.plan, 7)
    np.testing.assert_array_equal(spread, routing.probs)
    full = lory(LOGITS, segment=4)
    np.testing.assert_allclose(routing.probs, full.probs[:, :7], rtol=1e-6)


def test_one_hot_weights_give_that_expert_and_equal_experts_merge_to_themselves():
    rng = np.random.default_rng(0)
    tokens, experts = rng.normal(size=(B, S, D)), rng.normal(size=(E, D, D))
    hard = smear(np.broadcast_to(np.eye(E, dtype=np.float32)[2] * 200, (B, S, E)), training=False)
    one = np.tanh(tokens @ experts[2])
    np.testing.assert_allclose(merged(hard.plan.weight, tokens, experts), one, rtol=1e-5)
    soft = lory(LOGITS).plan.weight
    same = np.broadcast_to(experts[2], experts.shape)
    np.testing.assert_allclose(merged(soft, tokens, same), one, rtol=1e-5)


def test_merging_linear_experts_is_mixing_their_outputs():
    rng = np.random.default_rng(0)
    tokens, experts = rng.normal(size=(B, S, D)), rng.normal(size=(E, D, D))
    weight = lory(LOGITS).plan.weight
    outputs = np.einsum("bsd,edx->bsex", tokens, experts)
    mixed = np.einsum("bse,bsex->bsx", weight.repeat(SEGMENT, axis=1), outputs)
    np.testing.assert_allclose(
        np.arctanh(merged(weight, 0.01 * tokens, experts)), 0.01 * mixed, rtol=1e-4, atol=1e-8
    )


@pytest.mark.parametrize("name", ["smear", "lory"])
def test_gradient_equals_finite_differences(name):
    valid, h = jnp.ones((1, 4), bool), 1e-5
    options = {"dropout": 0.0} if name == "smear" else {"first": jnp.asarray(FIRST), "segment": 2}
    route = {"smear": merge.smear, "lory": merge.lory}[name]
    weight = np.random.default_rng(0).normal(size=(1, 1 if name == "smear" else 2, E))
    with jax.enable_x64(True):
        logits = random_logits((1, 4, E)).astype(np.float64)

        def loss(x):
            plan = route(x, jnp.broadcast_to(valid, x.shape[:2]), k=1, **options).plan
            return (plan.weight * weight).sum(axis=(1, 2))

        gradient = jax.grad(lambda x: loss(x).sum())(jnp.asarray(logits))
        steps = h * np.eye(logits.size).reshape(-1, 4, E)
        many = jax.jit(loss)
        numeric = (many(logits + steps) - many(logits - steps)) / (2 * h)
    np.testing.assert_allclose(gradient.ravel(), numeric, rtol=1e-3, atol=1e-8)
    assert np.abs(gradient).max() > 1e-3


@pytest.mark.parametrize(
    ("check", "options", "message"),
    [
        (merge.check_smear, {"dropout": 1.0}, r"dropout=1\.0 must be at least 0 and below 1"),
        (merge.check_lory, {"segment": 0}, "segment=0 must be at least 1"),
        (merge.check_lory, {"segment": 3, "sequence_length": 8}, r"divide data\.sequence_length=8"),
        (merge.check_lory, {"segment": 16, "sequence_length": 8}, r"segment=16"),
    ],
)
def test_options_that_cannot_work_are_refused(check, options, message):
    with pytest.raises(ConfigError, match=message):
        check(4, k=1, **options)
