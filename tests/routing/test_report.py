import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.routing import deepseek_v3
from moe.routing.report import layer_report
from moe.routing.types import Choices, Routing
from tests.routing.cases import GOLDEN_LOGITS, GOLDEN_VALID, Case, jit_report, random_logits

TOPK = Case("topk", 3, {"normalize": "renormalize"})


def test_sums_equal_loops_over_tokens_in_numpy():
    B, S, E, K = 3, 6, 8, 3
    rng = np.random.default_rng(0)
    valid = np.arange(S) < np.array([[6], [3], [1]])
    kept = rng.random((B, S, K)) < 0.7
    routing = TOPK.route(random_logits((B, S, E)), valid)
    report = jit_report(routing, jnp.asarray(kept), jnp.asarray(valid))
    logits, probs = (np.asarray(x, np.float64) for x in (routing.logits, routing.probs))
    expected = {name: np.zeros((B, E)) for name in ("requested", "kept", "ranked", "probs")}
    expected |= {
        name: np.zeros(B) for name in ("tokens", "lse_squared", "entropy", "confidence", "margin")
    }
    for b, s in zip(*np.nonzero(valid), strict=True):
        p, ordered = probs[b, s], np.sort(probs[b, s])[::-1]
        expected["tokens"][b] += 1
        expected["probs"][b] += p
        expected["ranked"][b, np.argsort(-p)[:K]] += 1
        expected["lse_squared"][b] += np.log(np.exp(logits[b, s]).sum()) ** 2
        expected["entropy"][b] -= (p * np.log(p)).sum()
        expected["confidence"][b] += ordered[0]
        expected["margin"][b] += ordered[K - 1] - ordered[K]
        for j in range(K):
            expected["requested"][b, routing.plan.expert[b, s, j]] += 1
            expected["kept"][b, routing.plan.expert[b, s, j]] += kept[b, s, j]
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(report, f"row_{name}"), value, rtol=1e-5, err_msg=name)
    assert report.logit_max == np.abs(logits[valid]).max().astype(np.float32)
    places = kept & valid[..., None]
    np.testing.assert_array_equal(report.expert, np.where(places, routing.plan.expert, -1))


def test_margin_of_all_experts_is_the_smallest_probability():
    routing = Case("topk", 4, {"normalize": "none"}).route(GOLDEN_LOGITS)
    report = layer_report(routing, routing.plan.valid, jnp.asarray(GOLDEN_VALID))
    np.testing.assert_allclose(report.row_margin, routing.probs.min(-1).sum(-1), rtol=1e-6)


def test_ranked_counts_ignore_bias_and_groups():
    logits, valid = random_logits((1, 64, 8)), jnp.ones((1, 64), bool)
    state = {"bias": jnp.asarray([3.0, -3.0, 3.0, -3.0, 0, 0, 0, 0])}
    plain, pushed = (
        jit_report(r, r.plan.valid, valid)
        for r in (
            deepseek_v3.route(logits, valid, k=2),
            deepseek_v3.route(logits, valid, k=2, state=state, groups=4, groups_kept=2),
        )
    )
    np.testing.assert_array_equal(plain.row_ranked, plain.row_requested)
    np.testing.assert_array_equal(pushed.row_ranked, plain.row_ranked)
    assert bool((pushed.row_requested != plain.row_requested).any())


@pytest.mark.parametrize("tokens", [300, 70_000])  # beyond what bfloat16 and float16 can count
def test_counts_are_exact(tokens):
    shape = (1, tokens, 2)
    routing = Routing(
        jnp.zeros(shape),
        jnp.full(shape, 0.5),
        Choices(jnp.zeros(shape, jnp.int32), jnp.ones(shape), jnp.ones(shape, bool)),
    )
    report = jit_report(routing, routing.plan.valid, jnp.ones((1, tokens), bool))
    assert report.row_requested.tolist() == [[2.0 * tokens, 0.0]]
    assert report.row_tokens.tolist() == [tokens]


def test_only_probabilities_and_logsumexp_carry_a_gradient():
    logits, valid = random_logits(), jnp.ones((3, 6), bool)

    def total(x, field):
        routing = TOPK.route(x)
        return getattr(layer_report(routing, routing.plan.valid, valid), field).sum()

    weight = jnp.arange(8.0)
    probs = jax.grad(
        lambda x: (layer_report(r := TOPK.route(x), r.plan.valid, valid).row_probs @ weight).sum()
    )(logits)
    assert float(jnp.abs(probs).max()) > 0.1
    lse = jax.grad(total)(logits, "row_lse_squared")
    expected = 2 * jax.nn.logsumexp(logits, -1, keepdims=True) * jax.nn.softmax(logits)
    np.testing.assert_allclose(lse, expected, rtol=1e-4, atol=1e-6)
    for field in ("row_entropy", "row_confidence", "row_margin", "row_ranked", "logit_max"):
        assert not np.asarray(jax.grad(total)(logits, field)).any(), field
