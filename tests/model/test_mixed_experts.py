"""Zero, copy, constant and convolutional experts: against plain loops, and what each promises."""

import functools

from flax import nnx
import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
import numpy as np
import pytest

from moe.dispatch.reference import reference
from moe.model.mixed_experts import Kinds, MixedExperts, share_zero_gates, split_choices
from moe.routing import topk
from moe.routing.report import layer_report
from moe.routing.sparsity_losses import heterogeneous_balance_loss
from moe.routing.types import Choices
from tests.dispatch.common import make_experts, swiglu

B, S, D, W, FFN = 2, 8, 6, 3, 3
KINDS = Kinds(conv=2, zero=1, copy=1, constant=2)
E = FFN + sum(KINDS)
CONV, ZERO, COPY, CONSTANT = KINDS.numbers(FFN).values()
DOCUMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1] * 6 + [0] * 2], np.int32)


def make(kinds=KINDS, kernel=W):
    """With weights drawn by NumPy."""
    mixed = MixedExperts(kinds, D, kernel=kernel, rngs=nnx.Rngs(params=0))
    graph, state = nnx.split(mixed)
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), state)
    return nnx.merge(graph, drawn)


def inputs(seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, S, D)), jnp.float32)


def choose(expert, gate=None, valid=None):
    """One choice list for every token, or `[B S K]`."""
    expert = np.broadcast_to(np.asarray(expert, np.int32), (B, S, np.shape(expert)[-1]))
    gate = np.full(expert.shape, 1 / expert.shape[-1]) if gate is None else gate
    valid = np.ones((B, S), bool) if valid is None else valid
    valid = np.broadcast_to(valid[..., None], expert.shape)
    gate = np.broadcast_to(np.asarray(gate, np.float32), expert.shape) * valid
    return Choices(jnp.asarray(expert), jnp.asarray(gate, jnp.float32), jnp.asarray(valid))


def random_choices(k=2, valid=None, seed=2):
    rng = np.random.default_rng(seed)
    return choose(rng.random((B, S, E)).argsort(-1)[..., :k], rng.random((B, S, k)), valid)


@nnx.jit
def run(mixed, x, choices, documents, valid):
    return mixed(x, choices, documents, valid, FFN)


def softmax(x):
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def plain(mixed, x, choices, documents, valid):
    """Token by token, choice by choice, in float64."""
    x = np.asarray(x, np.float64)
    y = np.zeros_like(x)
    for b, s, k in np.argwhere(choices.valid):
        e, gate = int(choices.expert[b, s, k]), float(choices.gate[b, s, k])
        if e in COPY:
            y[b, s] += gate * x[b, s]
        if e in CONSTANT:
            a = softmax(x[b, s] @ mixed.constant_gate[...][:, e - CONSTANT.start])
            y[b, s] += gate * (a[0] * x[b, s] + a[1] * mixed.constant[...][e - CONSTANT.start])
        if e in CONV:
            h = np.zeros(D)
            for back in range(W):
                t = s - back
                if t >= 0 and valid[b, t] and documents[b, t] == documents[b, s]:
                    h += x[b, t] * mixed.depthwise[...][e - CONV.start, W - 1 - back]
            y[b, s] += gate * h @ mixed.pointwise[...][e - CONV.start]
    return y


def test_equals_plain_loops_on_packed_and_padded_rows():
    mixed, x = make(), inputs()
    valid = DOCUMENTS > 0
    choices = random_choices(k=3, valid=valid)
    assert set(np.unique(choices.expert)) == set(range(E))
    y = run(mixed, x, choices, DOCUMENTS, valid)
    np.testing.assert_allclose(y, plain(mixed, x, choices, DOCUMENTS, valid), atol=1e-5)
    assert not np.asarray(y)[~valid].any()


def test_only_kinds_that_learn_have_parameters():
    def count(**kinds):
        mixed = nnx.eval_shape(
            lambda: MixedExperts(Kinds(**kinds), D, kernel=W, rngs=nnx.Rngs(params=0))
        )
        return sum(a.size for a in jax.tree.leaves(nnx.state(mixed, nnx.Param)))

    assert count(zero=3, copy=2) == 0
    assert count(constant=2) == 2 * 3 * D
    assert count(conv=2) == 2 * (W * D + D * D)


def test_zero_gives_its_gate_away_in_proportion():
    zero, copy = ZERO.start, COPY.start
    choices = share_zero_gates(choose([0, zero, copy], [0.3, 0.5, 0.2]), ZERO)
    np.testing.assert_allclose(choices.gate[0, 0], [0.6, 0.0, 0.4], rtol=1e-6)
    without = choose([0, 1, copy], [0.3, 0.5, 0.2])
    np.testing.assert_array_equal(share_zero_gates(without, ZERO).gate, without.gate)
    scaled = share_zero_gates(choose([0, zero], [1.5, 1.0]), ZERO)  # DeepSeek: gates sum to 2.5
    np.testing.assert_allclose(scaled.gate[0, 0], [2.5, 0.0], rtol=1e-6)


def test_copy_and_zero_give_the_input():
    x = inputs()
    choices = share_zero_gates(choose([COPY.start, ZERO.start], [0.3, 0.7]), ZERO)
    y = run(make(), x, choices, np.ones((B, S), np.int32), np.ones((B, S), bool))
    np.testing.assert_allclose(y, x, rtol=1e-6)


def test_zero_and_an_expert_equal_that_expert_alone_with_gate_one():
    x, params = inputs(), make_experts(jax.random.key(0), FFN, D, 5)
    both = share_zero_gates(choose([1, ZERO.start], [0.3, 0.7]), ZERO)
    want = reference(x, choose([1], [1.0]), params, swiglu).output
    got = reference(x, split_choices(both, FFN), params, swiglu).output
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalize", ["none", "renormalize"])
def test_zero_as_the_only_choice_divides_nothing_by_nothing(normalize):
    """k = 1, every token chooses the zero expert: output 0, finite gradients."""
    x, mixed = inputs(), make()
    logits = jnp.zeros((B, S, E)).at[..., ZERO.start].set(5.0)
    valid = jnp.ones((B, S), bool)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(logits):
        choices = topk.route(logits, valid, k=1, normalize=normalize).plan
        assert isinstance(choices, Choices)
        choices = share_zero_gates(choices, ZERO)
        y = mixed(x, choices, None, valid, FFN)
        return y.sum() + choices.gate.sum(), (y, choices.gate)

    of_logits, results = gradient(logits)
    assert not any(np.asarray(a).any() for a in results)
    assert np.isfinite(of_logits).all()


def test_dispatch_sees_feed_forward_experts_only():
    choices = random_choices(k=3)
    split = split_choices(choices, FFN)
    special = np.asarray(choices.expert) >= FFN
    assert 0 < special.sum() < special.size
    np.testing.assert_array_equal(split.valid, ~special)
    np.testing.assert_array_equal(split.gate, np.where(special, 0, choices.gate))
    assert 0 <= int(split.expert.min()) <= int(split.expert.max()) < FFN
    np.testing.assert_array_equal(split.expert[~special], choices.expert[~special])


@pytest.mark.parametrize("which", ["gate", "x", "weights"])
def test_gradient_equals_finite_differences(which):
    mixed, choices = make(), random_choices(k=4)
    graph, state = nnx.split(mixed)
    probe = np.random.default_rng(3).normal(size=(B, S, D)).astype(np.float32)
    arguments = {"gate": choices.gate, "x": inputs(), "weights": state}

    @jax.jit
    def loss(argument):
        gate, x, state = (arguments | {which: argument}).values()
        mixed, documents = nnx.merge(graph, state), jnp.asarray(DOCUMENTS)
        y = mixed(x, choices._replace(gate=gate), documents, documents > 0, FFN)
        return (y * probe).sum()

    flat, unravel = ravel_pytree(arguments[which])
    way = jnp.asarray(np.random.default_rng(4).normal(size=flat.shape), jnp.float32)
    along = way @ ravel_pytree(jax.grad(loss)(arguments[which]))[0]
    h = 1e-2
    numeric = (loss(unravel(flat + h * way)) - loss(unravel(flat - h * way))) / (2 * h)
    assert abs(along) > 0.1
    np.testing.assert_allclose(along, numeric, rtol=1e-2)


def test_convolution_of_width_one_is_a_linear_expert():
    mixed, x = make(Kinds(conv=1), kernel=1), inputs()
    y = run(mixed, x, choose([FFN], [0.7]), None, jnp.ones((B, S), bool))
    matrix = mixed.depthwise[...][0, 0][:, None] * mixed.pointwise[...][0]
    np.testing.assert_allclose(y, 0.7 * x @ matrix, rtol=1e-5, atol=1e-5)
    assert not mixed.looks_back


def test_later_tokens_change_nothing():
    mixed, x, choices = make(), inputs(), random_choices()
    documents, valid = np.ones((B, S), np.int32), np.ones((B, S), bool)
    before = run(mixed, x, choices, documents, valid)
    for t in range(S - 1):
        later = np.arange(S)[None, :, None] > t
        changed = jnp.where(later, inputs(seed=t + 9) * 3, x)
        other = jax.tree.map(
            lambda a, b: jnp.where(later, a, b),  # noqa: B023 - called at once
            random_choices(seed=t + 9),
            choices,
        )
        after = run(mixed, changed, other, documents, valid)
        np.testing.assert_array_equal(after[:, : t + 1], before[:, : t + 1])
        assert np.abs(after - before)[:, t + 1 :].max() > 1e-3


def test_cached_steps_equal_the_full_sequence():
    mixed, x, choices = make(), inputs(), random_choices()
    full = run(mixed, x, choices, np.ones((B, S), np.int32), np.ones((B, S), bool))
    assert mixed.looks_back

    @nnx.jit
    def advance(mixed, now, plan, history, start):
        return mixed.continued(now, plan, history, start, FFN)

    for start, stop in ((0, 4), *((t, t + 1) for t in range(4, S))):
        history = x.at[:, stop:].set(jnp.nan)  # not written yet
        plan = jax.tree.map(lambda a: a[:, start:stop], choices)  # noqa: B023 - called at once
        y = advance(mixed, x[:, start:stop], plan, history, jnp.int32(start))
        np.testing.assert_allclose(y, full[:, start:stop], atol=1e-5)


def test_masking_by_gate_equals_dispatch_by_segment():
    """Segments that are documents of their own, each with one expert, run apart from the others."""
    mixed, x = make(), inputs()
    segments = np.repeat([[1, 2, 3, 4]], 2, 0).repeat(2, 1).astype(np.int32)  # [B S], length 2
    expert = np.where(segments % 2, CONV.start, CONV.start + 1)[..., None]
    valid = np.ones((B, S), bool)
    whole = run(mixed, x, choose(expert, [1.0]), segments, valid)
    for begin in range(0, S, 2):
        part = slice(begin, begin + 2)
        plan = jax.tree.map(lambda a: a[:, part], choose(expert, [1.0]))  # noqa: B023
        alone = run(mixed, x[:, part], plan, None, np.ones((B, 2), bool))
        np.testing.assert_allclose(whole[:, part], alone, rtol=1e-5, atol=1e-5)


def test_order_inside_a_kind_changes_nothing():
    mixed, x, choices = make(), inputs(), random_choices()
    valid = np.ones((B, S), bool)
    graph, state = nnx.split(mixed)
    order = np.arange(E)
    order[list(CONV)], order[list(CONSTANT)] = CONV[::-1], CONSTANT[::-1]
    swapped = jax.tree.map(lambda a: a[::-1], state)  # constant_gate has its experts second
    swapped["constant_gate"][...] = state["constant_gate"][...][:, ::-1]
    other = choices._replace(expert=jnp.asarray(order)[choices.expert])
    np.testing.assert_allclose(
        run(nnx.merge(graph, swapped), x, other, DOCUMENTS, valid),
        run(mixed, x, choices, DOCUMENTS, valid),
        rtol=1e-5,
        atol=1e-6,
    )


def test_bfloat16_keeps_its_type():
    mixed, x, choices = make(), inputs(), random_choices()
    valid = np.ones((B, S), bool)
    want = run(mixed, x, choices, DOCUMENTS, valid)
    got = run(mixed, x.astype(jnp.bfloat16), choices, DOCUMENTS, valid)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=5e-2 * float(abs(want).max()))


def test_share_of_experts_that_compute_falls_with_tau():
    """Descends the heterogeneous balance loss on a bias of fixed random logits."""
    kinds = Kinds(zero=1, copy=1, constant=2)
    noise = jnp.asarray(np.random.default_rng(7).normal(size=(1, 2048, 8)), jnp.float32)
    valid = jnp.ones(noise.shape[:2], bool)

    @jax.jit
    def share(tau):
        eta = kinds.balance_weights(4, tau)

        def loss(bias):
            routing = topk.route(noise + bias[None, None], valid, k=2)
            kept = jnp.ones((*valid.shape, 2), bool)
            report = layer_report(routing, kept, valid)
            stacked = jax.tree.map(lambda a: a[None], report)
            value = heterogeneous_balance_loss(stacked, eta=eta, total_tokens=2048.0)
            return value, report.row_requested[0, :4].sum() / 4096

        def step(bias, _):
            gradient, share = jax.grad(loss, has_aux=True)(bias)
            return bias - 5 * gradient, share

        return jax.lax.scan(step, jnp.zeros(8), length=300)[1][-20:].mean()

    for tau in (1.0, 0.75, 0.25):
        np.testing.assert_allclose(share(tau), 4 * tau / (4 * tau + 4), atol=0.01)
