import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import ConfigError
from moe.routing import document_pool, topk
from moe.routing.document_pool import ROUTER, WHOLE_ROUTER
from tests.routing.cases import random_logits

B, S, E, K, M, SIZE = 2, 9, 8, 2, 3, 3
LOGITS = random_logits((B, S, E))
WHOLE = np.ones((B, S), np.int32)
PACKED = np.repeat(np.array([[1, 1, 1, 1, 2, 2, 2, 2, 0]], np.int32), B, axis=0)


def positions_of(documents):
    start = np.array([[np.flatnonzero(row == d)[0] for d in row] for row in documents])
    return (np.arange(S) - start).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("name", "pool_size", "normalize"))
def _route(logits, valid, positions, documents, name, **options):
    if name == "whole":
        return document_pool.route_whole(logits, valid, k=K, documents=documents, **options)
    places = {"positions": positions, "documents": documents, "segment_size": SIZE}
    return document_pool.route(logits, valid, k=K, **places, **options)


def route(name, logits=LOGITS, documents=WHOLE, pool_size=M, normalize="renormalize"):
    arrays = (logits, documents > 0, positions_of(documents), documents)
    arrays = (jnp.asarray(a) for a in arrays)
    routing = _route(*arrays, name=name, pool_size=pool_size, normalize=normalize)
    return jax.device_get(routing)


def softmax(x):
    x = np.exp(x, dtype=np.float64)
    return x / x.sum(-1, keepdims=True)


def reference(name, documents):
    """The pool of each token, as sets, from the sums that make it."""
    positions, probs, pools = positions_of(documents), softmax(LOGITS), {}
    for b, t in zip(*np.nonzero(documents), strict=True):
        voters = documents[b] == documents[b, t]
        if name == "causal":
            segment = positions[b] // SIZE
            voters &= (segment < segment[t]) | (positions[b] == 0)
        pools[b, t] = set(np.argsort(-probs[b, voters].sum(0))[:M].tolist())
    return pools


@pytest.mark.parametrize("documents", [WHOLE, PACKED], ids=["whole", "packed"])
@pytest.mark.parametrize("name", ["causal", "whole"])
def test_tokens_choose_the_best_of_their_pool(name, documents):
    plan = route(name, documents=documents).plan
    for (b, t), pool in reference(name, documents).items():
        inside = sorted(pool, key=lambda e, b=b, t=t: -LOGITS[b, t, e])[:K]
        assert plan.expert[b, t].tolist() == inside
        gate = softmax(LOGITS[b, t, inside])
        np.testing.assert_allclose(plan.gate[b, t], gate, rtol=1e-5)
    np.testing.assert_array_equal(plan.valid, np.repeat(documents[..., None] > 0, K, -1))


def test_gates_may_be_probabilities_inside_the_pool():
    plan = route("whole", normalize="none").plan
    for (b, t), pool in reference("whole", WHOLE).items():
        p = dict(zip(pool, softmax(LOGITS[b, t, list(pool)]), strict=True))
        expected = [p[e] for e in plan.expert[b, t].tolist()]
        np.testing.assert_allclose(plan.gate[b, t], expected, rtol=1e-5)


def test_a_document_and_a_segment_use_no_more_experts_than_a_pool_has():
    whole, causal = (route(n, documents=PACKED).plan.expert for n in ("whole", "causal"))
    assert max(len(np.unique(whole[b, d : d + 4])) for b in range(B) for d in (0, 4)) <= M
    causal = route("causal").plan.expert.reshape(B, S // SIZE, -1)
    assert max(len(np.unique(e)) for e in causal.reshape(-1, SIZE * K)) <= M


@pytest.mark.parametrize("name", ["causal", "whole"])
def test_a_pool_of_all_experts_is_top_k(name):
    ours = route(name, pool_size=E)
    flat = topk.route(jnp.asarray(LOGITS), jnp.ones((B, S), bool), k=K)
    np.testing.assert_array_equal(ours.plan.expert, flat.plan.expert)
    np.testing.assert_allclose(ours.plan.gate, flat.plan.gate, rtol=1e-6)
    np.testing.assert_allclose(ours.probs, flat.probs, rtol=1e-6)


@pytest.mark.parametrize("name", ["causal", "whole"])
def test_documents_of_a_row_do_not_meet(name):
    changed = np.concatenate([random_logits((B, 4, E), seed=4), LOGITS[:, 4:]], axis=1)
    a, b = (route(name, x, PACKED).plan for x in (LOGITS, changed))
    np.testing.assert_array_equal(a.expert[:, 4:], b.expert[:, 4:])
    np.testing.assert_array_equal(a.gate[:, 4:], b.gate[:, 4:])


@pytest.mark.parametrize("name", ["causal", "whole"])
def test_only_the_whole_pool_sees_later_tokens(name):
    before, leaks = route(name).plan, False
    for t in range(S - 1):
        new = 3 * random_logits((B, S, E), seed=t + 1)
        after = route(name, np.where(np.arange(S)[:, None] > t, new, LOGITS)).plan
        for x, y in zip(before, after, strict=True):
            leaks |= bool((x[:, : t + 1] != y[:, : t + 1]).any())
    assert leaks is (name == "whole")


def test_padding_has_no_say():
    documents = np.where(np.arange(S) < 6, WHOLE, 0)
    changed = np.where(np.arange(S)[:, None] < 6, LOGITS, 1e4 * np.eye(E, dtype=np.float32)[7])
    a, b = (route("whole", x, documents).plan for x in (LOGITS, changed.astype(np.float32)))
    np.testing.assert_array_equal(a.expert[:, :6], b.expert[:, :6])
    assert not a.gate[:, 6:].any()


def test_probs_cover_the_experts_outside_the_pool_and_carry_gradient():
    routing = route("whole", pool_size=K)
    np.testing.assert_allclose(routing.probs, softmax(LOGITS), rtol=1e-5)
    np.testing.assert_array_equal(routing.logits, LOGITS)

    def loss(x):
        plan = document_pool.route_whole(
            x, jnp.ones((B, S), bool), k=K, documents=jnp.asarray(WHOLE), pool_size=M
        ).plan
        return (plan.gate[..., 0] ** 2).sum()

    gradient = np.asarray(jax.jit(jax.grad(loss))(jnp.asarray(LOGITS)))
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal((np.abs(gradient) > 1e-6).sum(-1), K)


def test_the_row_that_sees_the_future_says_so():
    assert ROUTER.causality == "C1"
    assert (WHOLE_ROUTER.causality, WHOLE_ROUTER.causal_in_eval) == ("C3", False)
    assert "segment_size" not in WHOLE_ROUTER.options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool_size": 1}, r"pool_size=1 must be between router\.k=2"),
        ({"pool_size": 9}, r"pool_size=9 .* model\.num_experts=8"),
        ({"segment_size": 9, "sequence_length": 8}, "segment_size=9 is longer than"),
        ({"k": 1}, r"k=1 .* never learn"),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        document_pool.check(8, **{"k": 2, **options})
