import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import ConfigError
from moe.routing import quantile, topk
from moe.routing.report import layer_report
from tests.routing.cases import GOLDEN_LOGITS, random_logits, report_of

LOGITS = random_logits((2, 16, 8)) + np.linspace(2, -2, 8, dtype=np.float32)
SKEWED = random_logits((4, 32, 8), seed=1) + np.linspace(2, -2, 8, dtype=np.float32)


@functools.cache
def compiled(**options):
    return jax.jit(functools.partial(quantile.route, **options))


def routing(logits, beta=None, valid=None, *, k=2, training=True, **options):
    valid = np.ones(logits.shape[:2], bool) if valid is None else valid
    state = None if beta is None else {"beta": jnp.asarray(beta, jnp.float32)}
    route = compiled(k=k, training=training, **options)
    return jax.device_get(route(jnp.asarray(logits), jnp.asarray(valid), state=state))


def expected_beta(logits, beta, valid, k, price="middle"):
    """The definition, token by token and expert by expert, in float64."""
    tokens = np.asarray(logits, np.float64)[valid]
    biased = np.sort(tokens - beta, axis=-1)[:, ::-1]
    m = len(tokens) * k // tokens.shape[-1]
    if price == "edge":
        alpha = biased[:, k]
        return np.sort(tokens - alpha[:, None], axis=0)[::-1][m]
    alpha = (biased[:, k - 1] + biased[:, k]) / 2
    margins = np.sort(tokens - alpha[:, None], axis=0)[::-1]
    return (margins[max(m - 1, 0)] + margins[m]) / 2


@pytest.mark.parametrize("price", quantile.PRICES)
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("lengths", [(16, 16), (16, 3), (1, 0)])
def test_next_beta_is_the_quantile_of_its_definition(k, lengths, price):
    valid = np.arange(16) < np.array(lengths)[:, None]
    beta = np.random.default_rng(0).normal(size=8).astype(np.float32)
    term = routing(LOGITS, beta, valid, k=k, price=price).terms["beta"]
    expected = np.broadcast_to(expected_beta(LOGITS, beta, valid, k, price), term.shape)
    np.testing.assert_allclose(term, expected, rtol=1e-5, atol=1e-5)


def counts_over_updates(logits, k, steps, price="middle"):
    """Load of each expert in every step on the same batch, with the update of the real loop."""
    valid = jnp.ones(logits.shape[:2], bool)

    def step(state, _):
        result = quantile.route(
            jnp.asarray(logits), valid, k=k, state=state, training=True, price=price
        )
        report = layer_report(result, result.plan.valid, valid)
        stats = {name: value.sum(axis=0) for name, value in report.row_terms.items()}
        tokens = report.row_tokens.sum()
        return quantile.update_state(state, stats=stats, tokens=tokens), report.row_requested.sum(0)

    start = {"beta": jnp.zeros(logits.shape[-1])}
    return np.asarray(jax.jit(lambda s: jax.lax.scan(step, s, length=steps)[1])(start))


@pytest.mark.parametrize("k", [1, 2])
def test_a_skewed_batch_becomes_balanced_exactly(k):
    counts = counts_over_updates(SKEWED, k, 200)
    target = SKEWED.shape[0] * SKEWED.shape[1] * k / 8
    assert counts[0].max() > 2 * target
    np.testing.assert_array_equal(counts[-20:], np.full((20, 8), target))


def test_prices_at_the_edge_come_close_and_get_stuck():
    counts = counts_over_updates(SKEWED, 2, 200, "edge")
    off = np.abs(counts[-20:] - 32).max(axis=-1)
    assert (off > 0).all()
    assert (off <= 4).all()


def test_beta_moves_choices_but_never_gates_of_the_same_experts():
    plain = routing(LOGITS, k=3).plan
    level = routing(LOGITS, np.full(8, 0.5), k=3).plan
    jax.tree.map(np.testing.assert_array_equal, plain, level)
    pushed = routing(LOGITS, [99.0] + [0.0] * 7, k=3).plan
    assert (pushed.expert != 0).all()
    chosen = np.exp(np.take_along_axis(LOGITS.astype(np.float64), pushed.expert, -1))
    np.testing.assert_allclose(pushed.gate, chosen / chosen.sum(-1, keepdims=True), rtol=1e-5)


def test_no_state_and_beta_zero_are_topk():
    plan = routing(LOGITS).plan
    same = jax.jit(functools.partial(topk.route, k=2))(jnp.asarray(LOGITS), jnp.ones((2, 16), bool))
    np.testing.assert_array_equal(plan.expert, same.plan.expert)
    np.testing.assert_allclose(plan.gate, same.plan.gate, rtol=1e-5)


def test_choices_wait_for_the_next_batch():
    beta = np.random.default_rng(0).normal(size=8)
    a, b = routing(LOGITS, beta), routing(np.concatenate([LOGITS[:1], 3 * LOGITS[1:]]), beta)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[0], y[0]), a.plan, b.plan)
    assert np.abs(a.terms["beta"] - b.terms["beta"]).max() > 0.1
    evaluation = routing(LOGITS, beta, training=False)
    jax.tree.map(np.testing.assert_array_equal, evaluation.plan, a.plan)
    assert not evaluation.terms["beta"].any()


def test_scores():
    logits = LOGITS.astype(np.float64)
    score = 1 / (1 + np.exp(-logits))
    sigmoid = routing(LOGITS, score="sigmoid", k=3)
    chosen = np.take_along_axis(score, sigmoid.plan.expert, -1)
    np.testing.assert_allclose(sigmoid.plan.gate, chosen / chosen.sum(-1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(sigmoid.probs, score / score.sum(-1, keepdims=True), rtol=1e-5)
    single = routing(LOGITS, score="sigmoid", k=1).plan.gate[..., 0]
    np.testing.assert_allclose(single, score.max(-1), rtol=1e-5)
    raw = routing(LOGITS, k=1)
    np.testing.assert_allclose(raw.plan.gate[..., 0], raw.probs.max(-1), rtol=1e-5)


def test_the_term_gives_no_gradient():
    @jax.jit
    def slopes(x, beta):
        def route(x, beta):
            return quantile.route(
                x, jnp.ones((2, 16), bool), k=2, training=True, state={"beta": beta}
            )

        of_term = jax.grad(lambda *a: route(*a).terms["beta"].sum(), (0, 1))(x, beta)
        of_gate = jax.grad(lambda *a: route(*a).plan.gate[..., 0].sum(), (0, 1))(x, beta)
        return of_term, of_gate

    of_term, of_gate = slopes(jnp.asarray(LOGITS), jnp.ones(8))
    assert not any(np.asarray(g).any() for g in of_term)
    assert not np.asarray(of_gate[1]).any()
    assert np.abs(of_gate[0]).max() > 1e-3


def test_update_is_the_mean_over_tokens_for_each_layer_and_rests_without_tokens():
    state = {"beta": jnp.asarray([[1.0, 2.0], [3.0, 4.0]])}
    stats = {"beta": jnp.asarray([[8.0, -4.0], [0.0, 0.0]])}
    new = quantile.update_state(state, stats=stats, tokens=jnp.asarray([4.0, 0.0]))
    np.testing.assert_array_equal(new["beta"], [[2.0, -1.0], [3.0, 4.0]])


def test_report_of_a_padded_batch_hands_the_update_the_beta_itself():
    valid = np.arange(8) < np.array([[7]])
    result = routing(GOLDEN_LOGITS, valid=valid)
    total = report_of(result, valid).row_terms["beta"].sum(axis=0)
    new = quantile.update_state(
        {"beta": jnp.zeros(4)}, stats={"beta": jnp.asarray(total)}, tokens=jnp.asarray(7)
    )
    expected = expected_beta(GOLDEN_LOGITS, np.zeros(4), valid, 2)
    np.testing.assert_allclose(new["beta"], expected, rtol=1e-5, atol=1e-6)


def test_extreme_and_equal_logits_leave_a_finite_beta():
    for logits in (np.zeros_like(LOGITS), np.sign(LOGITS) * np.float32(1e4)):
        result = routing(logits)
        assert np.isfinite(result.terms["beta"]).all()
        assert np.isfinite(result.plan.gate).all()
    nothing = routing(LOGITS, valid=np.zeros((2, 16), bool))
    assert not nothing.terms["beta"].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 8}, r"router\.k=8 .* below model\.num_experts=8"),
        ({"score": "tanh"}, "score='tanh' is not one of softmax, sigmoid"),
        ({"price": "top"}, "price='top' is not one of middle, edge"),
        (
            {"k": 3, "batch_size": 3, "sequence_length": 5},
            "3 rows x 5 positions .* 45 choices.*num_experts=8 does not divide",
        ),
    ],
)
def test_what_cannot_balance_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        quantile.check(8, **{"k": 2, **options})
    quantile.check(8, k=2, batch_size=2, sequence_length=4)
    quantile.check(8, k=3, sequence_length=5)
