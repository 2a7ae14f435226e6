"""Mixture-of-Depths: who goes through the block, what the others are spared, and what may leak."""

from functools import partial
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.dispatch.reference import reference
from moe.errors import ConfigError
from moe.model.attention import Attention, KeyValues, RMSNorm
from moe.model.depth import Delta, MixtureOfDepths, slots, spread, spread_report, take, top_tokens
from moe.model.layer import Call
from moe.routing.types import LayerReport

B, S, D = 3, 8, 16
C = 3  # of capacity 0.375
ROWS = np.arange(B)[:, None]


class Inner(nnx.Module):
    """Attention and a position-wise function: what a block adds to its input."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm = RMSNorm(D, 1e-5)
        self.attention = Attention(
            D, 2, 1, 8, qk_norm="none", rope_base=100.0, norm_eps=1e-5, out_scale=1.0, rngs=rngs
        )

    def __call__(self, x, positions, segments, call, key, cache, start, memory):
        out, cache = self.attention(self.norm(x), positions, segments, cache, start)[:2]
        change = out + jnp.tanh(x + out) * call.valid[..., None]
        terms = {"inner": change[..., 0]}
        return Delta(change, (), terms, cache, None if memory is None else memory + 1)


def inputs(seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array, Call]:
    """A full row, a row of two documents with padding, and a row shorter than C."""
    x = np.random.default_rng(seed).normal(size=(B, S, D)).astype(np.float32)
    segments = np.array([[1] * 8, [1, 1, 1, 2, 2, 2, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]])
    positions = np.array([range(8), [0, 1, 2, 0, 1, 2, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0]])
    segments, positions = jnp.asarray(segments, jnp.int32), jnp.asarray(positions, jnp.int32)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 9, (B, S)), jnp.int32)
    return jnp.asarray(x), positions, segments, Call(tokens, segments > 0, reference)


def full(seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array, Call]:
    """Rows without padding."""
    x, _, _, call = inputs(seed)
    ones = jnp.ones((B, S), jnp.int32)
    return x, jnp.cumsum(ones, axis=1) - 1, ones, call._replace(valid=ones.astype(bool))


def modules(capacity: float = 0.375) -> tuple[MixtureOfDepths, Inner]:
    rngs = nnx.Rngs(params=3)
    return MixtureOfDepths(D, capacity, rngs=rngs), Inner(rngs)


@partial(jax.jit, static_argnums=(0, 1))
def forward(graph, causal, state, x, positions, segments, tokens, valid):
    depth, block = nnx.merge(graph, state)
    call = Call(tokens, valid, reference)
    passed = depth(block, x, positions, segments, call, causal=causal)
    return passed.output, passed.depth


def run(mixture: MixtureOfDepths, inner: Inner, given: tuple, *, causal: bool) -> Any:
    x, positions, segments, call = given
    graph, state = nnx.split((mixture, inner))
    return forward(graph, causal, state, x, positions, segments, call.tokens, call.valid)


@pytest.fixture(scope="module")
def pair() -> tuple[MixtureOfDepths, Inner]:
    return modules()


def test_slots_are_a_share_of_the_row():
    assert [slots(0.125, n) for n in (1, 8, 9, 2048)] == [1, 1, 2, 256]
    assert slots(1.0, 7) == 7


@pytest.mark.parametrize("capacity", [0.0, -0.5, 1.5])
def test_refuses_a_capacity_that_is_no_share(capacity):
    with pytest.raises(ConfigError, match="depth capacity"):
        MixtureOfDepths(D, capacity, rngs=nnx.Rngs(params=0))


def test_exactly_the_largest_scores_in_order():
    valid = np.asarray(inputs()[3].valid)
    score = np.random.default_rng(5).normal(size=(B, S)).astype(np.float32)
    chosen = top_tokens(jnp.asarray(score), jnp.asarray(valid), C)
    for b in range(B):
        real = np.flatnonzero(valid[b])
        best = real[np.argsort(-score[b, real])[:C]]
        np.testing.assert_array_equal(np.flatnonzero(chosen.mask[b]), np.sort(best))
    np.testing.assert_array_equal(chosen.index, np.sort(chosen.index, axis=1))
    assert chosen.mask.sum(axis=1).tolist() == [C, C, 2]


def test_ties_change_no_count():
    """A strict comparison with the threshold would take none of equal tokens."""
    chosen = top_tokens(jnp.zeros((B, S)), jnp.ones((B, S), bool), C)
    np.testing.assert_array_equal(chosen.index, np.broadcast_to(np.arange(C), (B, C)))


def test_take_and_spread_are_indexing_and_its_gradient():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(B, S, 2)), jnp.float32)
    index = jnp.asarray([[0, 3, 7], [1, 2, 4], [0, 1, 2]], jnp.int32)
    few = jnp.asarray(rng.normal(size=(B, C, 2)), jnp.float32)
    probe, wide = jnp.cos(few), jnp.sin(x)
    np.testing.assert_array_equal(take(x, index), x[ROWS, index])
    back = jnp.full_like(x, 9.0).at[ROWS, index].set(few)
    np.testing.assert_array_equal(spread(few, index, S, fill=9.0), back)
    taken = jax.grad(lambda a: (take(a, index) * probe).sum())(x)
    plain = jax.grad(lambda a: (a[ROWS, index] * probe).sum())(x)
    np.testing.assert_array_equal(taken, plain)
    spreaded = jax.grad(lambda a: (spread(a, index, S) * wide).sum())(few)
    np.testing.assert_array_equal(spreaded, wide[ROWS, index])


def plain_layer(mixture: MixtureOfDepths, inner: Inner, given: tuple, mask: np.ndarray) -> Any:
    """Every row alone, with nothing but its chosen tokens in it."""
    x, positions, segments, call = given
    y = np.asarray(x).copy()
    score = np.asarray(x, np.float64) @ np.asarray(mixture.router[...], np.float64)[:, 0]
    for b in range(B):
        at = np.flatnonzero(mask[b])
        few = [a[b : b + 1, at] for a in (x, positions, segments)]
        rest = Call(call.tokens[b : b + 1, at], call.valid[b : b + 1, at], reference)
        change = inner(*few, rest, None, None, None, None).change
        y[b, at] += score[b, at, None] * np.asarray(change[0])
    return y


@pytest.mark.parametrize("causal", [False, True])
def test_equals_rows_of_nothing_but_chosen_tokens(pair, causal):
    given = inputs()
    y, depth = run(*pair, given, causal=causal)
    mask = np.asarray(depth.chosen)
    assert 0 < mask.sum() < given[3].valid.sum()
    assert not (mask & ~np.asarray(given[3].valid)).any()
    np.testing.assert_allclose(y, plain_layer(*pair, given, mask), atol=1e-5)
    np.testing.assert_array_equal(y[~mask], given[0][~mask])  # bit for bit
    assert np.abs(y[mask] - given[0][mask]).max() > 0.1


def test_everyone_with_score_one_is_the_plain_block():
    mixture, inner = modules(capacity=1.0)
    x, positions, segments, call = full()
    x = x.at[..., 0].set(1.0)
    mixture.router[...] = jnp.zeros((D, 1)).at[0].set(1.0)
    y, _ = run(mixture, inner, (x, positions, segments, call), causal=False)
    change = inner(x, positions, segments, call, None, None, None, None).change
    np.testing.assert_allclose(y, x + change, atol=1e-5)


def test_router_learns_from_the_task_and_the_predictor_keeps_to_itself(pair):
    mixture, inner = pair
    x, positions, segments, call = full()
    graph, state = nnx.split(mixture)

    @jax.jit
    def gradients(state, x):
        def parts(state, x):
            passed = nnx.merge(graph, state)(inner, x, positions, segments, call, causal=False)
            return jnp.sin(passed.output).sum(), passed.depth.bce.sum()

        task = jax.grad(lambda s, x: parts(s, x)[0], argnums=(0, 1))(state, x)
        return task, jax.grad(lambda s, x: parts(s, x)[1], argnums=(0, 1))(state, x)

    (task, task_x), (bce, bce_x) = gradients(state, x)
    assert np.abs(task.router[...]).max() > 1e-2
    assert np.abs(task_x).max() > 1e-2
    for name in ("predictor_in", "predictor_out", "predictor_bias"):
        assert np.abs(bce[name][...]).max() > 1e-3
        np.testing.assert_array_equal(task[name][...], 0.0)
    np.testing.assert_array_equal(bce.router[...], 0.0)
    np.testing.assert_array_equal(bce_x, 0.0)

    @jax.jit
    def output(w: jax.Array) -> jax.Array:
        other = jax.tree.map(lambda a: a, state)
        other["router"] = other["router"].replace(w)
        passed = nnx.merge(graph, other)(inner, x, positions, segments, call, causal=False)
        return jnp.sin(passed.output).sum()

    step = 1e-2 * jnp.cos(jnp.arange(D))[:, None]
    w = state["router"][...]
    slope = output(w + step) - output(w - step)
    np.testing.assert_allclose(slope, 2 * (task.router[...] * step).sum(), rtol=2e-2)


def test_predictor_loss_and_agreement_count_real_tokens(pair):
    given = inputs()
    _, depth = run(*pair, given, causal=False)
    logit = np.asarray(pair[0].predict(given[0]), np.float64)
    valid, chosen = np.asarray(given[3].valid), np.asarray(depth.chosen)
    expected = np.where(chosen, np.log1p(np.exp(-logit)), np.log1p(np.exp(logit)))
    np.testing.assert_allclose(depth.bce, np.where(valid, expected, 0.0), rtol=1e-5)
    np.testing.assert_array_equal(depth.agree, ((logit > 0) == chosen) & valid)
    # The causal form compares with the same choice of training.
    np.testing.assert_array_equal(run(*pair, given, causal=True)[1].bce, depth.bce)


def test_only_the_choice_of_training_sees_later_tokens(pair):
    """Both sides, so that the declared classes C3 in training and C0 with the predictor hold."""
    leaks = 0
    for seed in range(4):
        x, *rest = full(seed)
        causal, choice = run(*pair, (x, *rest), causal=True)
        trained = run(*pair, (x, *rest), causal=False)[1].chosen
        for t in range(S - 1):
            later = x.at[:, t + 1 :].set(full(seed + 9)[0][:, t + 1 :])
            y, other = run(*pair, (later, *rest), causal=True)
            np.testing.assert_array_equal(other.chosen[:, : t + 1], choice.chosen[:, : t + 1])
            np.testing.assert_allclose(y[:, : t + 1], causal[:, : t + 1], atol=1e-6)
            again = run(*pair, (later, *rest), causal=False)[1].chosen
            leaks += int((again[:, : t + 1] != trained[:, : t + 1]).any())
    assert leaks > 0


def test_generation_passes_the_same_tokens(pair):
    mixture, inner = pair
    x, positions, segments, call = full()
    y, depth = run(mixture, inner, (x, positions, segments, call), causal=True)
    assert 0.2 < depth.chosen.mean() < 0.8, "everyone or nobody chosen: the case tests nothing"
    zeros = jnp.zeros((B, S, 1, 8))
    cache = KeyValues(zeros, zeros, jnp.zeros((B, S), jnp.int32))
    graph, state = nnx.split((mixture, inner))

    @jax.jit
    def advance(x, positions, segments, tokens, valid, cache, start):
        depth, block = nnx.merge(graph, state)
        now = Call(tokens, valid, reference)
        return depth(block, x, positions, segments, now, None, cache, start, causal=True)

    for start, stop in ((0, 3), *((t, t + 1) for t in range(3, S))):
        at = slice(start, stop)
        few = [a[:, at] for a in (x, positions, segments, call.tokens, call.valid)]
        passed = advance(*few, cache, jnp.int32(start))
        cache = passed.cache
        np.testing.assert_array_equal(passed.depth.chosen, depth.chosen[:, at])
        np.testing.assert_allclose(passed.output, y[:, at], atol=1e-5)
    with pytest.raises(ValueError, match="causal=True"):
        mixture(inner, x, positions, segments, call, None, cache, jnp.int32(0), causal=False)


@pytest.mark.parametrize("causal", [False, True])
def test_who_passes_by_keeps_memory_and_adds_no_term(pair, causal):
    x, positions, segments, call = inputs()
    memory = {"state": jnp.asarray(np.random.default_rng(4).normal(size=(B, S, 2)))}
    mixture, inner = pair

    def block(*given):
        done = inner(*given[:-1], None)
        return done._replace(memory={"state": given[-1]["state"] + 1})

    passed = mixture(block, x, positions, segments, call, memory=memory, causal=causal)
    mask = passed.depth.chosen
    expected = memory["state"] + mask[..., None]
    np.testing.assert_array_equal(passed.memory["state"], expected)
    assert ((np.asarray(passed.terms["inner"]) != 0) == np.asarray(mask)).all()
    assert 0 < mask.sum() < mask.size


def test_report_of_a_sparse_block_names_positions_of_the_row():
    E, K = 4, 2
    sums, row = jnp.ones((B, E)), jnp.ones((B,))
    fields = dict.fromkeys(LayerReport._fields, sums)
    fields |= dict.fromkeys(
        ("row_tokens", "row_lse_squared", "row_entropy", "row_confidence", "row_margin"), row
    )
    expert = jnp.arange(B * C * K, dtype=jnp.int32).reshape(B, C, K) % E
    fields |= {"logit_max": jnp.float32(1), "expert": expert}
    fields |= {"row_terms": {}, "token_terms": {"token/a": jnp.ones((B, C))}}
    index = jnp.asarray([[0, 3, 7], [1, 2, 4], [0, 1, 2]], jnp.int32)
    whole = spread_report(LayerReport(**fields), index, S)
    np.testing.assert_array_equal(whole.expert[ROWS, index], expert)
    assert (np.asarray(whole.expert) == -1).sum() == B * (S - C) * K
    np.testing.assert_array_equal(whole.token_terms["token/a"].sum(axis=1), C)
    np.testing.assert_array_equal(whole.row_requested, sums)
