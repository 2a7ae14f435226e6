import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.routing.report import layer_report
from tests.routing.cases import (
    GOLDEN_LOGITS,
    GOLDEN_VALID,
    Case,
    one_choice,
    random_logits,
    report_of,
)

TOPK = Case("topk", 3, {"normalize": "renormalize"})


def test_sums_equal_loops_over_tokens_in_numpy():
    B, S, E, K = 3, 6, 8, 3
    rng = np.random.default_rng(0)
    valid = np.arange(S) < np.array([[6], [3], [1]])
    kept = rng.random((B, S, K)) < 0.7
    routing = TOPK.route(random_logits((B, S, E)), valid)
    report = report_of(routing, valid, kept)
    logits, probs = (np.asarray(x, np.float64) for x in (routing.logits, routing.probs))
    expected: dict[str, np.ndarray] = {
        name: np.zeros((B, E)) for name in ("requested", "kept", "ranked", "probs")
    }
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
    report = report_of(routing, GOLDEN_VALID)
    np.testing.assert_allclose(report.row_margin, routing.probs.min(-1).sum(-1), rtol=1e-6)


def test_ranked_counts_ignore_bias_and_groups():
    logits = random_logits((1, 64, 8))
    free, limited = (
        Case("deepseek_v3", 2, {"groups": 4, "groups_kept": kept}, softmax=False) for kept in (4, 2)
    )
    zeros, steep = np.zeros(8, np.float32), np.array([3, -3, 3, -3, 0, 0, 0, 0], np.float32)
    plain, pushed = (
        report_of(case.route(logits, state={"bias": bias}), np.ones((1, 64), bool))
        for case, bias in ((free, zeros), (limited, steep))
    )
    np.testing.assert_array_equal(plain.row_ranked, plain.row_requested)
    np.testing.assert_array_equal(pushed.row_ranked, plain.row_ranked)
    assert (pushed.row_requested != plain.row_requested).any()


@pytest.mark.parametrize("tokens", [300, 70_000])  # beyond what bfloat16 and float16 can count
def test_counts_are_exact(tokens):
    routing = one_choice(np.full((1, tokens, 2), 0.5), np.zeros((1, tokens)))
    report = report_of(routing, np.ones((1, tokens), bool))
    assert report.row_requested.tolist() == [[tokens, 0.0]]
    assert report.row_tokens.tolist() == [tokens]


def test_sums_carry_a_gradient_where_losses_need_one_and_counts_carry_none():
    logits, valid = jnp.asarray(random_logits()), jnp.ones((3, 6), bool)
    weight = jnp.arange(8.0)[None]

    def fields(x):
        routing = TOPK.route(x)
        report = layer_report(routing, routing.plan.valid, valid)
        sums = {name: jax.tree.leaves(x) for name, x in report._asdict().items()}
        sums = {name: x[0].sum() for name, x in sums.items() if x and name != "expert"}
        probs, gates = (report.row_probs * weight).sum(), (report.row_gates * weight).sum()
        return sums | {"row_probs": probs, "row_gates": gates}

    gradients = jax.jit(jax.jacrev(fields))(logits)
    for name in ("row_probs", "row_gates", "row_entropy"):
        assert np.abs(gradients.pop(name)).max() > 0.1, name
    expected = 2 * jax.nn.logsumexp(logits, -1, keepdims=True) * jax.nn.softmax(logits)
    np.testing.assert_allclose(gradients.pop("row_lse_squared"), expected, rtol=1e-4, atol=1e-6)
    for name, gradient in gradients.items():
        assert not np.asarray(gradient).any(), name
