"""Every section at tiny sizes; what it counts is checked, its times are not."""

from functools import partial
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    compile_time,
    growth,
    hlo,
    input_wait,
    language_model,
    layer,
    memory,
    op_times,
    peer,
    skew,
    step,
)
from benchmarks.layer import Shape
from benchmarks.op_times import IDLE, Interval
from benchmarks.timing import interleave
from moe import programs, setup
from moe.parallel.mesh import make_mesh

TINY = Shape(T=64, D=16, F=32, E=8, K=2)
SMALL = (
    ("data.batch_size", "2"),
    ("data.sequence_length", "32"),
    ("model.num_layers", "2"),
    ("model.width", "32"),
    ("model.num_experts", "4"),
    ("model.expert_width", "16"),
    ("router.k", "2"),
    ("dispatch.backend", "ragged_dot"),  # compiles in less time than blocks
)


@pytest.fixture
def one_device(monkeypatch):
    """Of the eight of the tests, which compile more slowly."""
    one = partial(make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(setup, "make_mesh", lambda **_: one())


def test_rounds_alternate_and_the_first_is_dropped():
    order, clock = [], iter(range(100))

    def side(name):
        order.append(name)
        return float(next(clock))

    took = interleave({name: partial(side, name) for name in "ab"}, 3)
    assert "".join(order) == "abbaabba"
    assert took == {"a": [3.0, 4.0, 7.0], "b": [2.0, 5.0, 6.0]}


def test_layer_without_pytorch(monkeypatch):
    monkeypatch.setattr(peer, "installed", lambda: False)
    found = layer.measure(1, {TINY: 1.5})
    assert [row.bound for row in found] == [1.5, None, None, None]
    assert [math.isnan(row.value) for row in found] == [False, False, True, True]
    assert all("not installed" in row.note for row in found[2:])


@pytest.mark.skipif(not peer.installed(), reason="needs the extra `bench`")
def test_layer_beside_pytorch():
    found = {row.name: row for row in layer.measure(1, {TINY: 1.5})}
    assert found[f"{TINY} sparse / Mixtral block"].bound == 1.0
    assert all(row.value > 0 for row in found.values())


@pytest.mark.skipif(not peer.installed(), reason="needs the extra `bench`")
def test_a_request_that_fails_says_why():
    with peer.Peer() as child, pytest.raises(RuntimeError, match=r"'layers': .*unexpected keyword"):
        child.ask("layers", wrong=1)


def test_dense_twin_has_the_active_flops_of_the_sparse_layer():
    sides = layer.make_sides(TINY)
    dense = sum(a.size for a in jax.tree.leaves(sides["dense"][1]))
    experts = 3 * TINY.D * TINY.F * TINY.E
    assert dense == experts * TINY.K // TINY.E
    sparse = sum(a.size for a in jax.tree.leaves(sides["sparse"][1]))
    assert sparse == experts + TINY.D * TINY.E


def loads(shape: Shape, case: str) -> np.ndarray:
    """Tokens of each expert, by the logits of the layer that is measured."""
    x = np.asarray(skew.planted(shape, skew.chosen(shape, case))).reshape(shape.T, -1)
    logits = x @ np.asarray(skew.obedient(shape).gate.kernel[...])
    return np.bincount(np.argsort(-logits)[:, : shape.K].ravel(), minlength=shape.E)


def test_skew_is_what_it_says():
    even, share = TINY.T * TINY.K // TINY.E, TINY.T // 2
    assert loads(TINY, "balanced").tolist() == [even] * 8
    hot, idle, both = (loads(TINY, case) for case in skew.CASES)
    assert hot[0] == share
    assert np.ptp(hot[1:]) <= 2
    assert idle.tolist() == [2 * even] * 4 + [0] * 4
    assert both[0] == share
    assert both[4:].tolist() == [0] * 4
    assert {case.sum() for case in (hot, idle, both)} == {TINY.T * TINY.K}


def test_choices_of_a_token_are_distinct():
    for case in skew.CASES:
        assert all(len(set(token)) == TINY.K for token in skew.chosen(TINY, case).tolist())


def test_skew_measures_every_case():
    found = skew.measure(1, TINY)
    assert [row.bound for row in found] == [skew.BOUND] * 3
    assert all(row.value > 0 for row in found)


def test_growth_bounds_the_farthest():
    found = growth.measure(1, TINY, experts=(4, 8), tokens=(32, 64))
    assert [(row.bound, row.least) for row in found] == [(1.6, None), (1.15, pytest.approx(0.85))]
    a_token = found[1].above[0] * 64 / (found[1].below[0] * 32)
    assert a_token > 0


def test_memory_of_the_layer():
    temporaries, large = memory.measure(1, {TINY: 1.0})
    assert temporaries.value > 0
    assert (large.value, large.verdict) == (0, "pass")


def test_a_buffer_of_every_expert_and_slot_is_found():
    shape = Shape(T=64, D=8, F=32, E=8, K=2)

    def einsum(x, slot):  # the one-hot dispatch of GShard
        place = jax.nn.one_hot(slot, shape.E * 16).reshape(64, shape.E, 16)
        return jnp.einsum("td,tec->ecd", x, jax.lax.optimization_barrier(place))

    x, slot = jnp.ones((64, 8)), jnp.zeros(64, jnp.int32)
    text = jax.jit(einsum).lower(x, slot).compile().as_text()
    assert memory.too_large(text, shape) != []
    assert memory.too_large(text, shape._replace(T=128)) == []


def test_a_moment_is_divided_among_what_runs_in_it():
    told = [
        Interval("loop", 0, 10),
        Interval("a", 1, 4),
        Interval("b", 2, 4),
        Interval("a", 6, 7),
        Interval("nothing", 8, 8),
        Interval("a", 12, 13),
    ]
    taken = op_times.spread(told, {"loop"})
    assert taken == {"loop": 1 + 2 + 3, "a": 1 + 1 + 1 + 1, "b": 1.0, IDLE: 2.0}


def test_step_spends_its_time_in_parts_that_are_known(one_device):
    ratio, outside = step.measure(1, SMALL)
    assert ratio.bound == 1.2
    assert ratio.value > 0
    assert 0 < outside.value < 1
    parts = dict(part.rsplit(" ", 1) for part in outside.note.split(", "))
    assert {"attention", "experts", "optimiser", "router", "rest"} <= set(parts)
    assert sum(float(share.rstrip("%")) for share in parts.values()) == pytest.approx(100, abs=1)


PROGRAM = """HloModule one
FileNames
1 "x/moe/dispatch/blas.py"
2 "x/moe/routing/topk.py"
FunctionNames
1 "product"
FileLocations
1 {file_name_id=1 function_name_id=1 line=1 end_line=1 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=1 end_line=1 column=1 end_column=2}
StackFrames
1 {file_location_id=2 parent_frame_id=1}
2 {file_location_id=1 parent_frame_id=2}

%inside (a: f32[8,4]) -> f32[8,8] {
  %a = f32[8,4]{1,0} parameter(0)
  ROOT %dot.1 = f32[8,8]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

ENTRY %main (p: f32[8,4]) -> f32[8,8] {
  %p = f32[8,4]{1,0} parameter(0)
  %top = (f32[8,2]{1,0}, s32[8,2]{1,0}) custom-call(%p), custom_call_target="TopK", metadata={stack_frame_id=1}
  %call = f32[8,8]{1,0} custom-call(%p), custom_call_target="ffi_call", metadata={stack_frame_id=2}
  %gemm = f32[8,8]{1,0} custom-call(%p), custom_call_target="__gemm"
  ROOT %fused = f32[8,8]{1,0} fusion(%p), kind=kCustom, calls=%inside
}
"""


def test_products_and_buffers_of_a_program():
    program = hlo.Program(PROGRAM)
    names = [name for name in program.instructions if program.is_product(name)]
    assert names == ["dot.1", "call", "gemm", "fused"]
    assert [*program.buffers()] == [
        *(("top", 16), ("top", 16), ("call", 64), ("gemm", 64), ("fused", 64))
    ]
    assert [place.file for place in program.stack("call")] == [
        *("x/moe/dispatch/blas.py", "x/moe/routing/topk.py")
    ]
    assert program.stack("gemm") == []


def test_frames_name_the_part():
    place = hlo.Place
    head = [place("x/moe/model/experts.py", "project"), place("x/moe/model/transformer.py", "f")]
    assert op_times.part_of([]) == "unnamed"
    assert op_times.part_of(head) == "rest"
    assert op_times.part_of([head[0], place("x/moe/model/attention.py", "f")]) == "attention"
    inside = [place("x/moe/dispatch/grouped.py", "f"), place("x/moe/model/layer.py", "g")]
    assert op_times.part_of(inside) == "experts"
    assert op_times.part_of(inside[1:]) == "router"


def test_compile_time_is_cold(one_device, monkeypatch):
    """The compiler is not run: emptied caches would cost the tests that follow."""
    done = []
    monkeypatch.setattr(jax, "clear_caches", lambda: done.append("clear"))
    monkeypatch.setattr(
        programs, "compile_train_step", lambda run, state: done.append(run.config.model.num_layers)
    )
    seconds, growth = compile_time.measure(2, SMALL, depths=(3, 5))
    assert done == ["clear", 2, "clear", 3, "clear", 5, "clear", 5, "clear", 3, "clear", 2]
    assert (seconds.kind, seconds.bound, len(seconds.above)) == ("seconds", 20.0, 2)
    assert (growth.bound, growth.name) == (1.2, "compile time of 5 layers / 3")


def test_input_wait_of_the_loop(one_device, tmp_path, capsys):
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"text number {number} says something\n" * 20)
    own = (
        ("data.name", "files"),
        ("data.files", str(tmp_path / "*.txt")),
        ("data.directory", str(tmp_path / "data")),
    )
    loop, wait = input_wait.measure(1, (*SMALL, *own), steps=2)
    capsys.readouterr()
    assert loop.value > 0
    assert 0 <= wait.value < 1
    assert wait.bound == 0.02


def test_language_model_without_pytorch(one_device, monkeypatch):
    monkeypatch.setattr(peer, "installed", lambda: False)
    sizes = language_model.Sizes(1, 32, 2, 32, 2, 320, 4, 2, 16)
    found = language_model.measure(1, sizes)
    assert [math.isnan(row.value) for row in found] == [True, True, False]
    told = [float(part.rsplit(" ", 1)[1].rstrip("%")) for part in found[2].note.split(", ")]
    assert 0 < found[2].value < 1
    assert sum(told) == pytest.approx(100 * found[2].value, abs=1)


def test_language_models_have_the_same_sizes():
    sizes = language_model.Sizes()
    ours, theirs = language_model.config(sizes), language_model.theirs(sizes)
    m = ours.model
    assert m.pattern == ("sparse",)
    assert (m.num_layers, m.width, m.heads, m.kv_heads, m.num_experts, m.expert_width) == (
        *(theirs["num_hidden_layers"], theirs["hidden_size"], theirs["num_attention_heads"]),
        *(theirs["num_key_value_heads"], theirs["num_local_experts"], theirs["intermediate_size"]),
    )
    assert ours.router.k == theirs["num_experts_per_tok"]
    assert m.heads * m.head_dim == m.width
    assert (ours.data.batch_size, ours.data.sequence_length) == (theirs["batch"], theirs["length"])
