"""What every router promises as part of a sparse layer: gate, router and dispatch together."""

import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.dispatch.plans import by_plan
from moe.dispatch.reference import reference
from moe.dispatch.table import make_dispatch
from moe.model.experts import feed_forward
from moe.model.layer import Call, RouterSpec, SparseMLP, initial_memory, shared_gate
from moe.routing.report import layer_report
from moe.routing.table import ROUTERS
from moe.routing.types import Choices, Mixing, Routing, Slots
from tests.routing.cases import CASES, VOCAB, Case

B, S, D, E, F = 2, 8, 12, 16, 6  # 16 experts are a square, and divide into groups
EXACT = by_plan(reference)


class Layer(NamedTuple):
    """A sparse layer, split; with a compiled decision of it."""

    spec: RouterSpec
    graph: Any
    params: Any
    rest: Any
    decide: Any  # (params, x, call, key) -> (Routing, report)

    def __call__(self, x, *, valid=None, seed=3, tokens=None):
        valid = np.ones(x.shape[:2], bool) if valid is None else valid
        ids = (np.arange(S) * 3 + np.arange(B)[:, None]) % VOCAB if tokens is None else tokens
        arrays = jax.tree.map(jnp.asarray, (x, ids.astype(np.int32), valid))
        return jax.device_get(self.decide(self.params, *arrays, jax.random.key(seed)))


@functools.cache
def layer(case: Case) -> Layer:
    spec = RouterSpec(case.name, case.k, tuple(_options(case).items()), tuple(range(VOCAB)))

    def make(key):
        return SparseMLP(
            spec,
            num_experts=E,
            width=D,
            hidden=F,
            shared_experts=0,
            vocab_size=VOCAB,
            activation="swiglu",
            out_scale=1.0,
            rngs=nnx.Rngs(params=key),
        )

    graph, params, rest = nnx.split(make(jax.random.key(1)), nnx.Param, ...)
    shared = shared_gate(spec, D, E, nnx.Rngs(params=jax.random.key(2)))

    def decide(params, x, tokens, valid, key):
        places = jnp.broadcast_to(jnp.arange(S), (B, S))
        call = Call(
            tokens,
            valid,
            EXACT,
            key=key,
            training=case.training,
            positions=places,
            documents=valid.astype(jnp.int32),
            modality=places % 2,
            shared=shared,
        )
        memory = initial_memory(spec, B, S, E)
        routing, _ = nnx.merge(graph, params, rest).route(x, call, key, memory)
        return routing

    return Layer(spec, graph, params, rest, jax.jit(decide))


def _options(case):
    """The options of a case, for 16 experts."""
    if case.name == "modality_pools":
        return {**case.options, "pools": (8, 7)}
    return case.options


every_router = pytest.mark.parametrize("case", CASES, ids=str)


def activations(seed=0):
    return np.random.default_rng(seed).standard_normal((B, S, D), np.float32)


def weights(plan, length=S):
    """What each token takes of each expert, `[B S E]`, whatever the plan."""
    if isinstance(plan, Choices):
        return (jax.nn.one_hot(plan.expert, E) * plan.gate[..., None]).sum(axis=2)
    if isinstance(plan, Slots):
        named = jax.nn.one_hot(plan.token, length) * plan.gate[..., None]  # [B E C S]
        return named.sum(axis=2).swapaxes(1, 2)
    if isinstance(plan, Mixing):
        return plan.combine.reshape(B, length, E, -1).sum(axis=-1)
    return jnp.repeat(plan.weight, -(-length // plan.weight.shape[1]), axis=1)[:, :length]


def taken(plan):
    """What experts take of each token: of soft slots, not what tokens take of them."""
    return np.asarray(plan.dispatch if isinstance(plan, Mixing) else weights(plan))


def test_every_router_of_the_table_is_here():
    assert {case.name for case in CASES} == set(ROUTERS)


@every_router
def test_decision_is_finite_float32_and_of_the_declared_plan(case):
    routing = layer(case)(activations())
    for value in jax.tree.leaves(routing):
        assert np.isfinite(value).all()
        assert value.dtype in (np.float32, np.int32, np.bool_)
    kinds = {"choices": "Choices", "slots": "Slots", "mixing": "Mixing", "merging": "Merging"}
    declared = kinds[case.router.plan]
    if case.router.causality == "C3" and case.router.causal_in_eval and not case.training:
        declared = "Choices"  # the causal form of evaluation
    assert type(routing.plan).__name__ == declared
    assert routing.probs.shape == routing.logits.shape == (B, S, E)
    np.testing.assert_allclose(routing.probs.sum(-1), 1.0, rtol=1e-4)


@every_router
def test_other_rows_change_nothing(case):
    if case.name == "quantile" and case.training:
        pytest.skip("prices of the next batch are of this whole batch: its terms, not its choices")
    x = activations()
    other = np.concatenate([x[:1], activations(7)[1:] * 3])
    a, b = (weights(layer(case)(rows).plan) for rows in (x, other))
    np.testing.assert_allclose(a[0], b[0], atol=1e-6)


@pytest.mark.parametrize("case", [c for c in CASES if c.causal], ids=str)
def test_later_tokens_change_no_earlier_decision(case):
    x, ids = activations(), np.arange(B * S).reshape(B, S) % VOCAB
    before = weights(layer(case)(x, tokens=ids).plan)
    for t in range(S - 1):
        later = np.arange(S) > t
        changed = np.where(later[:, None], 3 * activations(t + 1), x)
        after = weights(layer(case)(changed, tokens=np.where(later, (ids + 5) % VOCAB, ids)).plan)
        np.testing.assert_allclose(after[:, : t + 1], before[:, : t + 1], atol=1e-6)


@pytest.mark.parametrize("case", [c for c in CASES if not c.causal], ids=str)
def test_routers_that_are_declared_noncausal_are(case):
    """The flag is honest: somewhere a later token moves an earlier one."""
    moved = 0.0
    for seed in range(12):
        x = activations(seed)
        changed = np.concatenate([x[:, :-1], 3 * activations(99)[:, -1:]], axis=1)
        a, b = (taken(layer(case)(rows).plan) for rows in (x, changed))
        moved = max(moved, float(np.abs(a[:, :-1] - b[:, :-1]).max()))
    assert moved > 1e-3


@every_router
def test_padding_is_nowhere(case):
    valid = np.arange(S) < np.array([[S], [5]])
    x = activations()
    routing = layer(case)(x, valid=valid)
    junk = np.where(valid[..., None], x, 1e3)
    other = layer(case)(junk, valid=valid)
    if not isinstance(routing.plan, Choices | Slots):
        pairs = zip(weights(routing.plan), weights(other.plan), valid, strict=True)
        assert all(np.allclose(a[m], b[m], atol=1e-5) for a, b, m in pairs)
        return
    taken = np.asarray(weights(routing.plan))
    assert not taken[~valid].any()
    np.testing.assert_allclose(weights(other.plan), taken, atol=1e-6)


@pytest.mark.parametrize("case", [c for c in CASES if c.router.learned], ids=str)
def test_gate_learns_from_the_task(case):
    """The gradient of what the experts give reaches the gate; of REINFORCE, that of its terms."""
    made, x = layer(case), jnp.asarray(activations())
    mix = jnp.asarray(np.random.default_rng(1).standard_normal((B, S, E)), jnp.float32)
    ids, valid = jnp.zeros((B, S), jnp.int32), jnp.ones((B, S), bool)

    def loss(params):
        routing = made.decide(params, x, ids, valid, jax.random.key(3))
        policy = sum(v.sum() for n, v in routing.terms.items() if n.startswith("token/"))
        return (weights(routing.plan) * mix).sum() + policy

    gradient = nnx.to_pure_dict(jax.grad(loss)(made.params))["gate"]
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient)) > 1e-5


@every_router
def test_same_key_decides_the_same_and_evaluation_draws_only_if_declared(case):
    x = activations()
    a, b, c = (layer(case)(x, seed=seed) for seed in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    if not case.training and not case.router.needs_key_in_eval:
        jax.tree.map(np.testing.assert_array_equal, a, c)


@functools.cache
def _dispatched(name):
    path = make_dispatch(name, None, capacity_factor=None)

    def run(x, plan, params):
        def loss(x, plan, params):
            out = path(x, plan, params, functools.partial(feed_forward, activation="swiglu"))
            return (out.output**2).sum(), out

        (_, out), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True, allow_int=True)(
            x, plan, params
        )
        return out, grads

    return jax.jit(run)


@pytest.mark.parametrize("path", ["grouped", "capacity"])
@every_router
def test_every_dispatch_equals_the_oracle(case, path):
    """Outputs and all gradients; with padding, and with experts that nobody asks for."""
    valid = np.arange(S) < np.array([[S], [5]])
    made, x = layer(case), activations()
    routing: Routing = jax.tree.map(jnp.asarray, made(x, valid=valid))
    params = nnx.merge(made.graph, made.params, made.rest).experts.params(jnp.dtype("float32"))
    results = [
        _dispatched(name)(jnp.asarray(x), routing.plan, params) for name in (path, "reference")
    ]
    for a, b in zip(*(jax.tree.leaves(r) for r in results), strict=True):
        if a.dtype == jnp.float32:
            np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)


@every_router
def test_report_counts_every_choice_and_no_padding(case):
    valid = np.arange(S) < np.array([[S], [5]])
    routing = layer(case)(activations(), valid=valid)
    kept = (
        routing.plan.valid
        if isinstance(routing.plan, Choices | Slots)
        else np.ones((B, 1, 1), bool)
    )
    report = jax.device_get(layer_report(*jax.tree.map(jnp.asarray, (routing, kept, valid))))
    np.testing.assert_array_equal(report.row_tokens, [S, 5])
    np.testing.assert_array_equal(report.row_requested, report.row_kept)
    if isinstance(routing.plan, Choices | Slots):
        asked = np.asarray(routing.plan.valid).sum((1, 2))
        np.testing.assert_array_equal(report.row_requested.sum(-1), asked)
        np.testing.assert_array_equal((report.expert >= 0).sum((1, 2)), asked)
    gates = np.where(valid[..., None], weights(routing.plan), 0.0).sum(1)
    np.testing.assert_allclose(report.row_gates, gates, rtol=1e-4, atol=1e-5)
    assert (report.expert[~valid] == -1).all()
