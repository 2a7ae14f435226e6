import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import ConfigError
from moe.routing import position
from moe.routing.position import ROUTER, WEIGHTED, WeightGate
from tests.routing.cases import random_logits

S, E = 24, 4
POSITIONS = np.arange(S)[None]


@functools.cache
def compiled(function, k, options):
    return jax.jit(functools.partial(function, k=k, **dict(options)))


def route(positions, *, k=1, logits=None, function=position.route, **options):
    logits = np.zeros((*positions.shape, E), np.float32) if logits is None else logits
    run = compiled(function, k, tuple(options.items()))
    valid = np.ones(positions.shape, bool)
    return jax.device_get(run(logits, valid, positions=positions.astype(np.int32)))


def test_blocks_and_strides_deal_out_positions_evenly():
    block = route(POSITIONS, kind="block", length=S).plan.expert[0, :, 0]
    np.testing.assert_array_equal(block, np.arange(S) // (S // E))
    strided = route(POSITIONS).plan.expert[0, :, 0]
    np.testing.assert_array_equal(strided, np.arange(S) % E)
    for expert in (block, strided):
        np.testing.assert_array_equal(np.bincount(expert), S // E)


def test_blocks_of_a_length_that_does_not_divide_differ_by_one_position_at_most():
    expert = route(POSITIONS[:, :22], kind="block", length=22).plan.expert[0, :, 0]
    assert (np.diff(expert) >= 0).all()
    assert set(np.bincount(expert)) == {5, 6}


@pytest.mark.parametrize("options", [{}, {"kind": "block", "length": S}], ids=str)
def test_one_position_at_a_time_decides_as_the_whole_row(options):
    whole = route(POSITIONS, k=2, **options).plan
    for t in (0, 1, 7, S - 1):
        one = route(POSITIONS[:, t : t + 1], k=2, **options).plan
        np.testing.assert_array_equal(one.expert[:, 0], whole.expert[:, t])


def test_more_experts_are_the_neighbours_with_equal_gates():
    routing = route(POSITIONS, k=3)
    np.testing.assert_array_equal(routing.plan.expert[0, 3], [3, 0, 1])
    np.testing.assert_allclose(routing.plan.gate, 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(routing.probs[0, 3], [1 / 3, 1 / 3, 0, 1 / 3], rtol=1e-6)


def test_the_place_in_the_document_counts_and_not_in_the_row():
    packed = np.array([[0, 1, 2, 0, 1, 2]])
    expert = route(packed).plan.expert[0, :, 0]
    np.testing.assert_array_equal(expert[:3], expert[3:])
    moved = route(packed[:, [2, 0, 1, 3, 4, 5]]).plan.expert[0, :, 0]
    np.testing.assert_array_equal(moved, expert[[2, 0, 1, 3, 4, 5]])


def test_positions_beyond_the_length_go_to_the_last_expert():
    expert = route(np.array([[S, 10 * S]]), kind="block", length=S).plan.expert
    np.testing.assert_array_equal(expert, E - 1)


def test_content_is_not_read():
    a, b = route(POSITIONS), route(POSITIONS, logits=random_logits((1, S, E)))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
    assert not ROUTER.learned


def test_learned_weights_start_at_one_and_get_a_gradient():
    gate = WeightGate(8, E, rngs=nnx.Rngs(0))
    logits = np.asarray(gate(jnp.ones((1, S, 8))).logits)
    assert (logits == logits[0, 0]).all()
    plain = route(POSITIONS, k=2).plan
    plan = route(POSITIONS, k=2, logits=logits, function=position.route_weighted).plan
    np.testing.assert_array_equal(plan.expert, plain.expert)
    np.testing.assert_allclose(plan.gate, plain.gate, rtol=1e-6)
    raised = np.broadcast_to(np.log(np.expm1(np.arange(1, E + 1))), logits.shape)
    raised = raised.astype(np.float32)
    plan = route(POSITIONS, k=2, logits=raised, function=position.route_weighted).plan
    np.testing.assert_allclose(plan.gate, (plan.expert + 1) / 2, rtol=1e-5)

    def total(gate):
        gated = gate(jnp.ones((1, S, 8)))
        valid, places = jnp.ones((1, S), bool), jnp.asarray(POSITIONS)
        return WEIGHTED.route(gated.logits, valid, k=1, positions=places).plan.gate.sum()

    slope = 1 - np.exp(-1)  # of softplus where it is 1
    np.testing.assert_allclose(jax.grad(total)(gate).weight[...], slope * S / E, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "cyclic"}, "'cyclic' is not one of strided, block"),
        ({"kind": "block"}, r"length=0 .* at least 4"),
        ({"kind": "block", "length": 16, "sequence_length": 32}, r"length=16 .* at least 32"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        position.check(4, k=1, **options)
