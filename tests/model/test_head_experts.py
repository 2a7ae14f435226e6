"""Heads as experts: against plain loops, their limits, causality and the cache."""

from functools import partial
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import ConfigError
from moe.model.attention import Attention, KeyValues
from moe.model.head_experts import ProjectionExperts, RoutedHeads, check
from moe.routing.types import Choices, Routing, Slots
from tests.model import variants
from tests.model.variants import COMMON, D, X

E, K, SHARED = 4, 2, 1
PACKED = ([7], [3, 2], [1, 4])


def uniform(logits, valid, *, k: int) -> Routing:
    """Every expert with gate 1/E, whatever the logits."""
    B, S, experts = logits.shape
    assert k == experts
    expert = jnp.broadcast_to(jnp.arange(k), (B, S, k))
    chosen = jnp.broadcast_to(valid[..., None], expert.shape)
    gate = jnp.where(chosen, 1 / k, 0.0)
    probs = jnp.full(logits.shape, 1 / k)
    return Routing(logits, probs, Choices(expert.astype(jnp.int32), gate, chosen))


def projections(k: int = K, num_experts: int = E, **options) -> Any:
    arguments: dict[str, Any] = COMMON | {"k": k} | options
    return variants.drawn(lambda rngs: ProjectionExperts(D, num_experts, X, rngs=rngs, **arguments))


def routed(k: int = K, shared: int = SHARED, kv_heads: int = 2, **options) -> Any:
    return variants.attention(RoutedHeads, kv_heads=kv_heads, k=k, shared=shared, **options)


MODULES = {"projections": projections, "routed": routed}
every_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)


@pytest.fixture(scope="module")
def packed():
    return variants.inputs(*PACKED)


def plain_outputs(full, x, positions, documents) -> np.ndarray:
    """[B S H D], what each head alone would give, query by query."""
    q, k, v = variants.plain_heads(full, x, positions)
    out = np.zeros_like(q)
    for b, h, t in np.ndindex(q.shape[0], q.shape[2], q.shape[1]):
        seen = [s for s in range(t + 1) if documents[b, s] == documents[b, t]]
        weights = variants.plain_softmax(k[b, seen, h] @ q[b, t, h] / np.sqrt(X))
        out[b, t, h] = weights @ v[b, seen, h]
    return np.einsum("bshx,hxd->bshd", out, np.asarray(full.wo[...], np.float64))


def test_projections_equal_plain_loops(packed):
    module = projections()
    x, _, documents = packed
    each = plain_outputs(module.full, *packed)
    result = jax.jit(module)(*packed)
    expected = np.zeros(x.shape)
    for b, t in np.argwhere(np.asarray(documents) > 0):
        p = variants.plain_softmax(np.asarray(x[b, t] @ module.gate.kernel[...], np.float64))
        best = np.argsort(-p)[:K]
        np.testing.assert_array_equal(result.report.expert[b, t], best)
        expected[b, t] = sum(p[e] / p[best].sum() * each[b, t, e] for e in best)
    np.testing.assert_allclose(result.output, expected, atol=1e-5)


def test_routed_heads_equal_plain_loops(packed):
    module = routed()
    x, _, documents = packed
    each = plain_outputs(module.full, *packed)
    result = jax.jit(module)(*packed)
    for b, t in np.argwhere(np.asarray(documents) > 0):
        p, always, balance = (
            variants.plain_softmax(np.asarray(x[b, t] @ kernel[...], np.float64))
            for kernel in (module.gate.kernel, module.shared_gate, module.balance)
        )
        gate = np.concatenate([balance[0] * always, np.zeros(E - SHARED)])
        for e in np.argsort(-p)[:K]:
            gate[SHARED + e] = balance[1] * p[e]
        np.testing.assert_allclose(result.output[b, t], gate @ each[b, t], atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [partial(projections, k=E, route=uniform), partial(routed, k=E, shared=0, route=uniform)],
    ids=MODULES,
)
def test_all_heads_with_equal_gates_are_attention_divided_by_their_number(packed, make):
    module = make()
    x, positions, documents = packed
    valid = (documents > 0)[..., None]
    assert isinstance(module.full, Attention)

    @jax.jit
    def both(x):
        whole = module.full(x, positions, documents)[0] / E
        return [jnp.where(valid, y, 0.0) for y in (module(x, *packed[1:]).output, whole)]

    np.testing.assert_allclose(*both(x), atol=1e-6)
    gradients = jax.jit(jax.jacrev(lambda x: [jnp.sum(jnp.sin(y)) for y in both(x)]))(x)
    np.testing.assert_allclose(*gradients, atol=1e-5)


@every_module
def test_gradient_of_the_router_equals_finite_differences(packed, make):
    graph, gate, rest = nnx.split(make(), nnx.PathContains("gate"), ...)
    rng = np.random.default_rng(5)
    draw = lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32)  # noqa: E731
    way, probe = jax.tree.map(draw, gate), draw(packed[0])

    @jax.jit
    def loss(gate):
        return (nnx.merge(graph, gate, rest)(*packed).output * probe).sum()

    h = 1e-2
    moved = [jax.tree.map(lambda a, w: a + step * w, gate, way) for step in (h, -h)]  # noqa: B023
    numeric = (loss(moved[0]) - loss(moved[1])) / (2 * h)
    gradient = jax.jit(jax.grad(loss))(gate)
    along = jax.tree.reduce(jnp.add, jax.tree.map(lambda g, w: (g * w).sum(), gradient, way))
    assert abs(along) > 0.1
    np.testing.assert_allclose(along, numeric, rtol=1e-2)


@every_module
@pytest.mark.parametrize("at", [0, 3, 5])
def test_later_tokens_change_nothing(make, at):
    before, after = variants.future_leaks(make(), *variants.inputs([7], [7]), at)
    assert before == 0
    assert after > 1e-3


@every_module
def test_documents_of_a_row_do_not_see_each_other(packed, make):
    module = jax.jit(make())
    x, positions, documents = packed
    both = module(x, positions, documents).output
    other = module(jnp.where((documents == 1)[..., None], -x, x), positions, documents).output
    second = np.asarray(documents) == 2
    np.testing.assert_array_equal(both[second], other[second])


@every_module
def test_cached_steps_equal_the_full_sequence(make):
    module = make()
    heads = module.full.wk.shape[1]
    zeros = jnp.zeros((2, 8, heads, X))
    variants.cached_equals_full(module, KeyValues(zeros, zeros), 8, 3)


@pytest.mark.parametrize("num_experts", [2, 16])
def test_the_cache_does_not_grow_with_the_number_of_experts(num_experts):
    module = projections(num_experts=num_experts)
    x, positions, documents = variants.inputs([3], [3])
    zeros = jnp.zeros((2, 5, 1, X))
    cache = jax.eval_shape(module, x, positions, documents, KeyValues(zeros, zeros), 0).cache
    assert cache.key.shape == cache.value.shape == (2, 5, 1, X)


@every_module
def test_reports_the_choices_of_real_tokens(packed, make):
    module, valid = make(), np.asarray(packed[2]) > 0
    report = jax.jit(module)(*packed).report
    np.testing.assert_array_equal(report.row_tokens, [7, 5, 5])
    assert (report.expert[valid] >= 0).all()
    assert (report.expert[~valid] == -1).all()
    for row, expert in enumerate(np.asarray(report.expert)):
        counts = np.bincount(expert[valid[row]].ravel(), minlength=report.row_kept.shape[1])
        np.testing.assert_array_equal(report.row_kept[row], counts)


def test_bfloat16_keeps_its_type(packed):
    x, positions, documents = packed
    for make in MODULES.values():
        out = jax.eval_shape(make(), x.astype(jnp.bfloat16), positions, documents)
        assert out.output.dtype == jnp.bfloat16
        assert out.report.row_probs.dtype == jnp.float32


def test_refuses_what_cannot_be(packed):
    check(heads=4, k=3, shared=1)
    with pytest.raises(ConfigError, match=r"k=4 .* between 1 and heads - shared = 3"):
        check(heads=4, k=4, shared=1)
    with pytest.raises(ConfigError, match="qk_norm='full'"):
        check(heads=4, k=2, qk_norm="full")

    def by_experts(logits, valid, *, k):
        token = jnp.zeros((logits.shape[0], E, k), jnp.int32)
        plan = Slots(token, token.astype(jnp.float32), token > 0)
        return Routing(logits, jax.nn.softmax(logits), plan)

    with pytest.raises(ConfigError, match="returned Slots"):
        projections(route=by_experts)(*packed)
