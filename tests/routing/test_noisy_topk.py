import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from moe.errors import ConfigError
from moe.routing import noisy_topk, topk
from tests.routing.cases import GOLDEN_LOGITS, random_logits

DRAWS = 20_000


@functools.cache
def compiled(**options):
    return jax.jit(functools.partial(noisy_topk.route, **options))


def routing(logits, scale, seed=None, noise_std=1.0, **options):
    """In training with a seed, else in evaluation; NumPy in, NumPy out."""
    route = compiled(**{"k": 2, **options})
    scale = np.broadcast_to(np.asarray(scale, logits.dtype), logits.shape)
    return jax.device_get(
        route(
            jnp.asarray(logits),
            jnp.ones(logits.shape[:2], bool),
            noise_scale=jnp.asarray(scale),
            key=None if seed is None else jax.random.key(seed),
            noise_std=noise_std,
        )
    )


def gate(**options):
    return noisy_topk.NoisyGate(8, 4, rngs=nnx.Rngs(0), **options)


TOKENS = random_logits((2, 3, 8))


def test_an_untrained_gate_is_undecided_with_the_noise_of_softplus_zero():
    out = gate()(jnp.asarray(TOKENS))
    assert not np.asarray(out.logits).any()
    np.testing.assert_allclose(out.inputs["noise_scale"], np.log(2) + 1e-2, rtol=1e-6)


def test_gate_has_two_kernels_and_the_scale_is_softplus_plus_a_hundredth():
    module = gate(init="normal")
    module.noise_kernel[...] = jnp.asarray(random_logits((8, 4), seed=1))
    out = module(jnp.asarray(TOKENS))
    x = TOKENS.astype(np.float64)
    np.testing.assert_allclose(out.logits, x @ module.kernel[...], rtol=1e-5, atol=1e-5)
    expected = np.log1p(np.exp(x @ module.noise_kernel[...])) + 1e-2
    np.testing.assert_allclose(out.inputs["noise_scale"], expected, rtol=1e-5)
    assert out.inputs["noise_scale"].dtype == jnp.float32
    assert 0.2 < np.std(module.kernel[...]) * 8**0.5 < 2.0


def test_fixed_noise_has_one_kernel_and_scale_one_over_experts():
    module = gate(noise="fixed")
    assert [path[0] for path, _ in nnx.to_flat_state(nnx.state(module))] == ["kernel"]
    np.testing.assert_allclose(module(jnp.asarray(TOKENS)).inputs["noise_scale"], 0.25)


def test_noise_of_each_logit_has_the_standard_deviation_of_its_scale():
    logits = np.broadcast_to(np.array([0.3, -0.4, -1e3], np.float32), (DRAWS, 1, 3))
    plan = routing(logits, [0.5, 1.2, 1e-2], seed=1, noise_std=2.0).plan
    first = plan.expert[..., 0] == 0
    gates = np.where(first[..., None], plan.gate, plan.gate[..., ::-1])[:, 0]
    difference = np.log(gates[:, 0]) - np.log(gates[:, 1])  # of the two noisy logits
    std = 2.0 * np.hypot(0.5, 1.2)
    assert abs(difference.mean() - 0.7) < 5 * std / DRAWS**0.5
    assert abs(difference.std() - std) < 5 * std / (2 * DRAWS) ** 0.5


def test_zero_logits_load_every_expert_alike_in_training():
    plan = routing(np.zeros((DRAWS, 1, 4), np.float32), 0.7, seed=0, k=3).plan
    counts = np.bincount(plan.expert.ravel(), minlength=4)
    # Choices of one token are without replacement, which only narrows the spread.
    assert stats.chisquare(counts).pvalue > 1e-4


def test_without_noise_it_is_topk():
    logits = random_logits()
    for ours, theirs in (("topk_softmax", "topk_softmax"), ("none", "none")):
        plan = routing(logits, 0.5, normalize=ours).plan
        same = jax.jit(functools.partial(topk.route, k=2, normalize=theirs))(
            jnp.asarray(logits), jnp.ones((3, 6), bool)
        ).plan
        np.testing.assert_array_equal(plan.expert, same.expert)
        np.testing.assert_allclose(plan.gate, same.gate, rtol=1e-6)


def test_noise_of_std_zero_equals_evaluation():
    logits = random_logits()
    a, b = routing(logits, 0.5, seed=3, noise_std=0.0), routing(logits, 0.5)
    jax.tree.map(np.testing.assert_array_equal, a.plan, b.plan)
    assert (routing(logits, 0.5, seed=3).plan.expert != b.plan.expert).any()


def test_importance_is_the_gates_of_the_experts_or_the_clean_probabilities():
    logits = random_logits()
    result = routing(logits, 0.5, seed=3)
    expected = np.zeros_like(logits)
    np.put_along_axis(expected, result.plan.expert, result.plan.gate, -1)
    np.testing.assert_array_equal(result.terms["importance"], expected)
    np.testing.assert_allclose(result.terms["importance"].sum(-1), 1.0, rtol=1e-5)
    raw = routing(logits, 0.5, seed=3, normalize="none")
    np.testing.assert_array_equal(raw.terms["importance"], raw.probs)


def noisy(logits, scale, seed):
    return logits + scale * np.asarray(jax.random.normal(jax.random.key(seed), logits.shape))


def chances(logits, scale, seed, k):
    """How often each expert is among the k largest when its own noise alone is drawn again."""
    fixed, rng = noisy(logits, scale, seed), np.random.default_rng(0)
    result = np.zeros(logits.shape)
    for e in range(logits.shape[-1]):
        others = np.sort(np.delete(fixed, e, axis=-1), axis=-1)[..., -k]
        again = logits[..., e] + scale[..., e] * rng.normal(size=(DRAWS, *logits.shape[:-1]))
        result[..., e] = (again > others).mean(0)
    return result


@pytest.mark.parametrize("k", [1, 2, 3])
def test_load_is_the_chance_to_be_chosen_when_the_own_noise_is_drawn_again(k):
    scale = np.random.default_rng(1).uniform(0.3, 1.5, GOLDEN_LOGITS.shape).astype(np.float32)
    p = chances(GOLDEN_LOGITS, scale, 5, k)
    load = routing(GOLDEN_LOGITS, scale, seed=5, k=k, normalize="none").terms["load"]
    assert (np.abs(load - p) < 5 * np.sqrt(p * (1 - p) / DRAWS) + 1e-3).all()


def test_the_simpler_threshold_understates_chosen_experts_and_agrees_on_others():
    scale = np.full(GOLDEN_LOGITS.shape, 0.7, np.float32)
    paper, simple = (
        routing(GOLDEN_LOGITS, scale, seed=5, load_threshold=t) for t in ("paper", "vmoe")
    )
    chosen = np.zeros(GOLDEN_LOGITS.shape, bool)
    np.put_along_axis(chosen, paper.plan.expert, True, -1)
    a, b = paper.terms["load"], simple.terms["load"]
    assert (b[chosen] < a[chosen]).all()
    np.testing.assert_array_equal(b[~chosen], a[~chosen])
    assert a.mean() - b.mean() > 0.05


def test_thresholds_are_logits_and_not_probabilities():
    scale = np.full(GOLDEN_LOGITS.shape, 0.7, np.float32)
    a, b = (
        routing(GOLDEN_LOGITS, scale, seed=5, normalize=n).terms["load"]
        for n in noisy_topk.NORMALIZE
    )
    np.testing.assert_array_equal(a, b)
    ranked = np.sort(noisy(GOLDEN_LOGITS, scale, 5), axis=-1)[..., ::-1]
    chosen = noisy(GOLDEN_LOGITS, scale, 5) >= ranked[..., 1:2]
    bar = np.where(chosen, ranked[..., 2:3], ranked[..., 1:2])
    np.testing.assert_allclose(a, stats.norm.cdf((GOLDEN_LOGITS - bar) / scale), atol=1e-6)
    shifted = routing(GOLDEN_LOGITS + 3, scale, seed=5).terms["load"]
    np.testing.assert_allclose(shifted, a, atol=1e-5)


@pytest.mark.parametrize("threshold", noisy_topk.THRESHOLDS)
def test_gradients_of_terms_equal_finite_differences_in_logits_and_scale(threshold):
    h = 1e-5
    with jax.enable_x64(True):
        logits = random_logits((1, 3, 4), seed=2).astype(np.float64)
        scale = np.random.default_rng(3).uniform(0.5, 1.5, logits.shape)
        weight = np.random.default_rng(4).normal(size=(2, *logits.shape))

        @jax.jit
        def loss(both):
            out = noisy_topk.route(
                both[0],
                jnp.ones(both.shape[1:3], bool),
                k=2,
                noise_scale=both[1],
                key=jax.random.key(7),
                load_threshold=threshold,
            )
            return (jnp.stack([out.terms["importance"], out.terms["load"]]) * weight).sum()

        both = jnp.asarray(np.stack([logits, scale]))
        gradient = np.asarray(jax.grad(loss)(both))
        numeric = np.zeros(both.shape)
        for i in np.ndindex(both.shape):
            step = np.zeros(both.shape)
            step[i] = h
            numeric[i] = (loss(both + step) - loss(both - step)) / (2 * h)
    np.testing.assert_allclose(gradient, numeric, rtol=1e-3, atol=1e-8)
    assert (np.abs(gradient).max(axis=(1, 2, 3)) > 1e-2).all()


@jax.jit
@functools.partial(jax.value_and_grad, argnums=(0, 1))
def loss_of_everything(x, scale, noise_std):
    key, valid = jax.random.key(1), jnp.ones((2, 3), bool)
    out = noisy_topk.route(x, valid, k=2, noise_scale=scale, key=key, noise_std=noise_std)
    return out.plan.gate[..., 0].sum() + out.terms["load"].sum() + out.terms["importance"].max()


@pytest.mark.parametrize("kind", ["equal", "mixed"])
@pytest.mark.parametrize("noise_std", [0.0, 1.0])
def test_extreme_logits_keep_numbers_and_gradients_finite(kind, noise_std):
    mixed = np.sign(random_logits((2, 3, 4))) * np.float32(1e4)
    logits = mixed if kind == "mixed" else np.zeros_like(mixed)
    scale = jnp.full(logits.shape, 0.7)
    value, gradient = loss_of_everything(jnp.asarray(logits), scale, noise_std)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in gradient)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 4}, r"router\.k=4 .* below model\.num_experts=4"),
        ({"k": 1}, r"router\.k=1 .* no gradient"),
        ({"noise": "some"}, "noise='some' is not one of learned, fixed"),
        ({"init": "ones"}, "init='ones' is not one of zeros, normal"),
        ({"normalize": "renormalize"}, "normalize='renormalize' is not one of topk_softmax, none"),
        ({"load_threshold": "mine"}, "load_threshold='mine' is not one of paper, vmoe"),
        ({"noise_std": 0.0}, r"noise_std=0\.0 with router\.init='zeros'.*lowest numbers"),
        ({"noise_std": -1.0, "init": "normal"}, r"noise_std=-1\.0 .* not be negative"),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        noisy_topk.check(4, **{"k": 2, **options})
    noisy_topk.check(4, k=1, normalize="none", noise="fixed", init="normal", noise_std=0.0)
