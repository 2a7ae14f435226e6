from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import ConfigError
from moe.routing import segment
from moe.routing.segment import ROUTER, SELF_ROUTER
from tests.routing.direct import make_gate, random_tokens

B, S, D, E, SIZE = 2, 8, 8, 4, 3
TOKENS = random_tokens((B, S, D))
# One document a row; and two packed ones, of 5 and 2 tokens, before padding.
WHOLE = np.ones((B, S), np.int32)
PACKED = np.repeat(np.array([[1, 1, 1, 1, 1, 2, 2, 0]], np.int32), B, axis=0)
MODES = [*segment.MODES, "self"]


def positions_of(documents):
    start = np.array([[np.flatnonzero(row == d)[0] for d in row] for row in documents])
    return (np.arange(S) - start).astype(np.int32)


def make(mode="shift", pool="mean", size=SIZE):
    return segment.SegmentGate(D, E, rngs=nnx.Rngs(0), segment_size=size, pool=pool, mode=mode)


def logits_of(gate, tokens=TOKENS, documents=WHOLE):
    arrays = (tokens, documents > 0, positions_of(documents), documents)
    tokens, valid, positions, documents = (jnp.asarray(a) for a in arrays)
    said = gate(tokens, valid=valid, positions=positions, documents=documents)
    return np.asarray(said.logits)


def reference(gate, tokens=TOKENS, documents=WHOLE):
    """Segment by segment: the pooled token, times the kernel."""
    kernel, positions = np.asarray(gate.kernel[...], np.float64), positions_of(documents)
    out = np.full((B, S, E), np.nan)
    for b, t in zip(*np.nonzero(documents), strict=True):
        in_document = documents[b] == documents[b, t]

        def picked(j, b=b, in_document=in_document):  # the tokens that stand for segment j
            members = np.flatnonzero(in_document & (positions[b] // gate.segment_size == j))
            if gate.mode == "first_token":
                return members[:1].tolist()
            return {"mean": members, "first": members[:1], "last": members[-1:]}[gate.pool].tolist()

        j = positions[b, t] // gate.segment_size
        looked_at = {"shift": [j - 1], "prefix": range(j)}.get(gate.mode, [j])
        pooled = [u for i in looked_at if i >= 0 for u in picked(i)]
        out[b, t] = tokens[b, pooled].mean(0) @ kernel if pooled else gate.first[...]
    return out


@pytest.mark.parametrize("documents", [WHOLE, PACKED], ids=["whole", "packed"])
@pytest.mark.parametrize("pool", segment.POOLS)
@pytest.mark.parametrize("mode", MODES)
def test_logits_are_those_of_the_pooled_segment(mode, pool, documents):
    gate = make(mode, pool)
    ours, expected = logits_of(gate, documents=documents), reference(gate, documents=documents)
    real = documents > 0
    np.testing.assert_allclose(ours[real], expected[real], rtol=1e-4, atol=1e-5)
    assert np.isfinite(ours).all()


def test_segments_of_one_token_routed_by_themselves_are_token_routing():
    gate = make("self", size=1)
    expected = TOKENS.astype(np.float64) @ np.asarray(gate.kernel[...])
    np.testing.assert_allclose(logits_of(gate), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_all_tokens_of_a_segment_go_the_same_way(mode):
    plan = ROUTER.route(jnp.asarray(logits_of(make(mode))), jnp.ones((B, S), bool), k=2).plan
    for part in (plan.expert, plan.gate):
        for start in range(0, S, SIZE):
            assert (part[:, start : start + SIZE] == part[:, start : start + 1]).all()


@pytest.mark.parametrize("pool", segment.POOLS)
@pytest.mark.parametrize("mode", MODES)
def test_only_self_sees_later_tokens(mode, pool):
    gate = make(mode, pool)
    place = {"valid": WHOLE > 0, "positions": positions_of(WHOLE), "documents": WHOLE}
    place = jax.tree.map(jnp.asarray, place)
    run = jax.jit(lambda x: gate(x, **place).logits)
    before, leaks = run(TOKENS), False
    for t in range(S - 1):
        changed = TOKENS.copy()
        changed[:, t + 1 :] += random_tokens((B, S - t - 1, D), seed=t + 1)
        leaks |= bool((run(changed)[:, : t + 1] != before[:, : t + 1]).any())
    # The first token of a segment is never later than the others.
    assert leaks is (mode == "self" and pool != "first")


@pytest.mark.parametrize("mode", MODES)
def test_documents_of_a_row_do_not_meet(mode):
    gate = make(mode)
    changed = TOKENS.copy()
    changed[:, :5] += 1.0
    a, b = (logits_of(gate, x, PACKED)[:, 5:7] for x in (TOKENS, changed))
    np.testing.assert_array_equal(a, b)


def test_padding_is_not_pooled():
    gate = make("self")
    documents = np.array([[1] * 7 + [0]] * B, np.int32)  # the last segment has one token left
    changed = TOKENS.copy()
    changed[:, 7] = 99.0
    a, b = (logits_of(gate, x, documents)[:, :7] for x in (TOKENS, changed))
    np.testing.assert_array_equal(a, b)


def test_permuting_segments_permutes_the_choices_of_self():
    gate, order = make("self", size=2), np.array([6, 7, 2, 3, 0, 1, 4, 5])
    np.testing.assert_allclose(
        logits_of(gate, TOKENS[:, order]), logits_of(gate)[:, order], rtol=1e-5, atol=1e-6
    )


def test_kernel_and_first_logits_learn():
    graph, state = nnx.split(make("shift"))
    weight = random_tokens((B, S, E), seed=5)

    def loss(state):
        place = {"valid": WHOLE > 0, "positions": positions_of(WHOLE), "documents": WHOLE}
        place = jax.tree.map(jnp.asarray, place)
        return (nnx.merge(graph, state)(jnp.asarray(TOKENS), **place).logits * weight).sum()

    gradient = jax.grad(loss)(state)
    np.testing.assert_allclose(
        gradient["first"][...], weight[:, :SIZE].sum((0, 1)), rtol=1e-4, atol=1e-5
    )
    assert np.abs(gradient["kernel"][...]).max() > 1e-2


def test_first_segments_do_not_start_on_the_same_experts_in_every_model():
    chosen = {
        tuple(np.argsort(segment.SegmentGate(D, E, rngs=nnx.Rngs(i)).first[...])[-2:].tolist())
        for i in range(6)
    }
    assert len(chosen) > 1


def test_the_row_that_sees_the_future_says_so():
    assert ROUTER.causality == "C1"
    assert (SELF_ROUTER.causality, SELF_ROUTER.causal_in_eval) == ("C3", False)
    assert make_gate(SELF_ROUTER, D, E, segment_size=2).mode == "self"
    assert set(ROUTER.options) - set(SELF_ROUTER.options) == {"mode"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "self"}, "mode='self' .*C3.*segment_self"),
        ({"mode": "next"}, "mode='next' is not one of shift, prefix, first_token"),
        ({"pool": "max"}, "pool='max' is not one of mean, first, last"),
        ({"segment_size": 0}, "segment_size=0 must be at least 1"),
        ({"segment_size": 9, "sequence_length": 8}, r"segment_size=9 is longer than .*=8"),
        ({"k": 1}, r"k=1 .* never learn"),
        ({"score": "cosine"}, "score='cosine' is not one of"),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        segment.check(8, **{"k": 2, **options})
