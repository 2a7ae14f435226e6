"""Every path equals the oracle: outputs, input gradient, gate gradient, gradients of the experts."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.dispatch.capacity import capacity, queue_order, seat, slots
from moe.dispatch.edges import invert, sort_by_group
from moe.dispatch.grouped import grouped
from moe.dispatch.reference import reference
from moe.dispatch.table import make_dispatch
from moe.errors import ConfigError
from moe.routing.types import Choices
from tests.dispatch.common import Experts, make_choices, make_experts, run, swiglu

PATHS = {
    "grouped": grouped,
    "ragged_dot": functools.partial(grouped, backend="ragged_dot"),
    "capacity": functools.partial(capacity, capacity_factor=None),
    "capacity_above_pool": functools.partial(capacity, capacity_factor=100.0),
}
# name -> (E, K, logit added to expert 0, share of padding); S = 19 divides by nothing
CASES = {
    "even": (6, 2, 0.0, 0.2),
    "hot": (6, 2, 20.0, 0.2),
    "padding": (6, 2, 0.0, 1.0),
}


def make_case(E, K, skew, padding):
    B, S, D, F = 2, 19, 8, 12
    x = jax.random.normal(jax.random.key(0), (B, S, D))
    choices = make_choices(jax.random.key(1), B, S, E, K, skew, padding)
    choices = choices._replace(expert=jnp.where(choices.expert == E - 2, 0, choices.expert))
    return x, choices, make_experts(jax.random.key(2), E, D, F)


def assert_close(want, got):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), want, got)


@pytest.mark.parametrize("path", PATHS)
def test_path_equals_oracle(path):
    """Expert E-2 is empty in every case; with K = 2 its tokens may name expert 0 twice."""
    fast = slow = None
    for case in CASES.values():
        slow, want = run(reference, *make_case(*case), compiled=slow)
        fast, got = run(PATHS[path], *make_case(*case), compiled=fast)
        assert_close(want, got)


@pytest.mark.parametrize(("E", "K"), [(1, 1), (3, 3)])
@pytest.mark.parametrize("path", ["ragged_dot", "capacity"])
def test_one_expert_and_all_experts(path, E, K):
    B, S, D, F = 2, 7, 8, 12
    x = jax.random.normal(jax.random.key(0), (B, S, D))
    choices = make_choices(jax.random.key(1), B, S, E, K)
    experts = make_experts(jax.random.key(2), E, D, F)
    want = run(reference, x, choices, experts)[1]
    assert_close(want, run(PATHS[path], x, choices, experts)[1])


@pytest.mark.parametrize("path", ["ragged_dot", "capacity"])
def test_bfloat16(path):
    x, choices, experts = make_case(*CASES["even"])
    want = reference(x, choices, experts, swiglu).output
    small = Experts(*(w.astype(jnp.bfloat16) for w in experts))
    got = PATHS[path](x.astype(jnp.bfloat16), choices, small, swiglu).output
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=2e-2 * float(abs(want).max()))


# Eight tokens, four experts; what follows from them was worked out in float64.
LOGITS = [
    [2, 1, 0, -1], [1.5, 0.5, 1, -0.5], [2.5, 0, -1, 0.5], [0, 2, 1, 0.5],
    [1, 0, 2, -1], [1.2, 1, 0.8, 0.6], [0.3, 0.2, 0.1, 1.4], [2.2, 1.9, 0.1, 0],
]  # fmt: skip
DROPS = {
    "token_major": {(5, 0), (6, 1), (7, 0)},
    "choice_major": {(4, 1), (6, 1), (7, 0)},
}


def golden(k):
    probs = jax.nn.softmax(jnp.array([LOGITS]))
    gate, expert = jax.lax.top_k(probs, k)
    return Choices(expert, gate, jnp.ones(expert.shape, bool))


@pytest.mark.parametrize("priority", DROPS)
def test_golden_drops(priority):
    x = jax.random.normal(jax.random.key(0), (1, 8, 4))
    experts = make_experts(jax.random.key(1), 4, 4, 4)
    path = functools.partial(capacity, capacity_factor=1.0, priority=priority)
    results = run(path, x, golden(2), experts)[1]
    drops = {(int(t), int(k)) for _, t, k in zip(*np.nonzero(~results["kept"]), strict=True)}
    assert drops == DROPS[priority]
    kept = golden(2)._replace(valid=results["kept"])
    want = run(reference, x, kept, experts)[1]
    assert_close(want, results)  # gates of what is left are as they were; gradients too


def test_golden_switch_drops_give_exact_zero():
    x = jax.random.normal(jax.random.key(0), (1, 8, 4))
    out = capacity(
        x, golden(1), make_experts(jax.random.key(1), 4, 4, 4), swiglu, capacity_factor=1.0
    )
    assert np.nonzero(out.kept[0, :, 0])[0].tolist() == [0, 1, 3, 4, 6]
    assert (out.output[0, jnp.array([2, 5, 7])] == 0).all()


def test_batch_priority_seats_sure_tokens_first():
    choices = golden(1)
    assert queue_order(choices, "batch")[0].tolist() == [2, 0, 4, 3, 6, 7, 1, 5]
    kept = seat(choices, 4, "batch") < 2
    assert np.nonzero(kept[0, :, 0])[0].tolist() == [0, 2, 3, 4, 6]


@pytest.mark.parametrize("priority", ["gate", "batch"])
def test_seats_by_gate_equal_a_queue_in_python(priority):
    choices = make_choices(jax.random.key(1), 3, 19, 6, 2, 0.8)
    position = np.asarray(seat(choices, 6, priority))
    gate = np.where(choices.valid, choices.gate, -1.0)
    for b in range(3):
        pairs = [(t, k) for t in range(19) for k in range(2)]
        if priority == "gate":
            pairs.sort(key=lambda at: -gate[b][at])
        else:
            pairs.sort(key=lambda at: (at[1], -gate[b, at[0]].max()))
        load = [0] * 6
        for at in pairs:
            if choices.valid[b][at]:
                expert = int(choices.expert[b][at])
                assert position[b][at] == load[expert]
                load[expert] += 1


def test_padding_takes_no_slot():
    choices = golden(1)
    valid = choices.valid.at[0, 0].set(False)
    kept = seat(choices._replace(valid=valid), 4, "token_major") < 2
    assert (kept & valid)[0, :, 0].tolist() == [False, True, True, True, True, False, True, False]


def test_raising_capacity_never_raises_drops():
    choices = make_choices(jax.random.key(1), 3, 19, 6, 2, 1.0)
    position = seat(choices, 6, "token_major")
    dropped = [(choices.valid & (position >= C)).sum() for C in range(1, 20)]
    assert all(a >= b for a, b in itertools.pairwise(dropped))
    assert dropped[-1] == 0 < dropped[0]


def test_slots():
    assert slots(1.25, P=10, K=2, E=8) == 4  # ceil(3.125)
    assert slots(1.25, 10, 2, 8, capacity_multiple=3) == 6
    assert slots(None, 10, 2, 8) == slots(99.0, 10, 2, 8) == 10
    assert slots(None, 10, 2, 8, capacity_multiple=4) == 12
    with pytest.raises(ConfigError, match=r"capacity_factor=0\.0 leaves an expert no slot"):
        slots(0.0, 10, 2, 8)


def test_sorting_is_stable_past_the_packed_range():
    group = jnp.array([3, 1, 3, 0, 1, 1])
    packed, pairs = sort_by_group(group, 4), sort_by_group(group, 2**31 - 1)
    assert packed.tolist() == pairs.tolist() == [3, 1, 4, 5, 0, 2]
    assert invert(packed)[packed].tolist() == list(range(6))


def test_unknown_names():
    with pytest.raises(ConfigError, match="grouped, capacity, einsum, reference"):
        make_dispatch("gruped", None)
    with pytest.raises(ConfigError, match="token_major, choice_major"):
        seat(golden(1), 4, "by_gate")
