"""FLOPs of matrix products against counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from moe.dryrun.flops import by_phase, by_source, phase, products, total, valid_taps
from moe.dryrun.hlo import parse
from tests.dryrun.texts import read

B, D, F, L = 16, 32, 64, 5


def compiled(f, *args):
    return parse(jax.jit(f).lower(*args).compile().as_text(), own=("moe/", "tests/"))


def loss(weights, x, *, remat):
    def layer(x, weights):
        wi, wo = weights
        return x + jnp.tanh(x @ wi) @ wo, None

    layer = jax.checkpoint(layer) if remat else layer
    return (jax.lax.scan(layer, x, weights)[0] ** 2).sum()


def arguments():
    return (jnp.ones((L, D, F)), jnp.ones((L, F, D))), jnp.ones((B, D))


def test_products_in_a_scan_and_their_gradients():
    forward = compiled(lambda w, x: loss(w, x, remat=False), *arguments())
    assert total(products(forward)) == L * 2 * (2 * B * D * F)

    found = products(compiled(jax.grad(lambda w, x: loss(w, x, remat=False)), *arguments()))
    assert by_phase(found) == {
        "forward": L * 2 * (2 * B * D * F),
        "backward": L * 4 * (2 * B * D * F),
        "recompute": 0,
        "unstated": 0,
    }
    assert {each.count for each in found} == {L}
    assert {each.flops_each for each in found} == {2 * B * D * F}


def test_rematerialised_products_are_told_apart():
    found = products(compiled(jax.grad(lambda w, x: loss(w, x, remat=True)), *arguments()))
    sums = by_phase(found)
    # The second product of the layer is not needed again for the gradients.
    assert sums["recompute"] == L * 2 * B * D * F
    assert sums["backward"] == 2 * sums["forward"] == L * 4 * (2 * B * D * F)


def test_products_go_by_the_line_that_asked_for_them():
    found = products(compiled(lambda w, x: loss(w, x, remat=False), *arguments()))
    assert list(by_source(found).values()) == [total(found)]
    (line,) = by_source(found)
    assert line.startswith("tests/dryrun/test_flops.py:")


@pytest.mark.parametrize(
    ("equation", "left", "right", "flops"),
    [
        ("bij,bjk->bik", (3, 4, 5), (3, 5, 6), 2 * 3 * 4 * 5 * 6),
        ("ecd,edf->ecf", (4, 8, 16), (4, 16, 32), 2 * 4 * 8 * 16 * 32),
        ("abcd,cdef->abef", (2, 3, 4, 5), (4, 5, 6, 7), 2 * 2 * 3 * 4 * 5 * 6 * 7),
    ],
)
def test_dots_of_any_dimensions(equation, left, right, flops):
    module = compiled(lambda x, y: jnp.einsum(equation, x, y), jnp.ones(left), jnp.ones(right))
    assert total(products(module)) == flops


def test_a_convolution_counts_the_taps_that_meet_the_input():
    def f(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        )

    module = compiled(f, jnp.ones((2, 10, 3)), jnp.ones((4, 3, 5)))
    assert total(products(module)) == 2 * 2 * 7 * 4 * 3 * 5
    # 10 outputs of 4 taps with padding 1 and 2: 1 + 2 + 1 taps hang over the edges.
    assert valid_taps(10, 10, 4, 1, 1, 1, 1) == 10 * 4 - 4


def test_a_batched_dot_that_tpu_makes_a_dilated_convolution_of():
    """`[8 4096 512] x [8 4096 1024] -> [8 512 1024]`: each of 8 batches once, not 8 x 8 times."""
    assert valid_taps(8, 8, 8, 7, 0, 8, 1) == 8
    found = {each.name: each for each in products(read("tpu_grouped"))}
    dense = found["convolution-base-dilated"]
    assert dense.flops == 2 * 8 * 4096 * 512 * 1024
    assert str(dense.source) == "moe/dispatch/tpu_matmul.py:27"


def test_grouped_kernels_cost_their_rows_times_one_matrix():
    found = {each.name: each for each in products(read("tpu_grouped"))}
    ideal = 2 * 4096 * 512 * 1024
    kernels = ["jvp_jit_gmm__.2", "transpose_jvp_jit_gmm___.2", "transpose_jvp_jit_tgmm___.2"]
    assert [(found[name].kind, found[name].phase, found[name].flops) for name in kernels] == [
        ("gmm", "forward", ideal),
        ("gmm", "backward", ideal),
        ("tgmm", "backward", ideal),
    ]


def test_other_kernels_state_their_cost_or_are_unknown():
    found = {each.name: each for each in products(read("tpu_grouped"))}
    assert (found["attention.1"].kind, found["attention.1"].flops) == ("attention", 123456)
    assert (found["silent.1"].kind, found["silent.1"].flops) == ("unknown kernel", 0)
    known = products(read("tpu_grouped"), {"pallas_call": lambda operands, outputs: 7})
    assert {each.name: each.flops for each in known}["silent.1"] == 7


def test_products_of_cuda_are_cublas_calls_and_triton_fusions():
    found = products(read("cuda_cublas"))
    assert [(each.kind, each.flops) for each in found] == [
        ("cublas", 2 * 8 * 128 * 512 * 256),
        ("cublas", 2 * 8 * 128 * 256 * 384),
    ]
    (fused,) = products(read("cuda_exchange"))
    assert (fused.kind, fused.flops) == ("dot", 2 * 4 * 512 * 512 * 256)


def test_a_product_fused_with_a_step_of_a_collective_is_counted():
    (found,) = products(read("tpu_async"))
    assert (found.count, found.flops_each) == (6, 2 * 8 * 128 * 512 * 512)
    assert found.phase == "recompute"
    assert str(found.source) == "moe/model/experts.py:16"


RAGGED = """HloModule m, is_scheduled=true

ENTRY %main (x: f32[64,8], w: f32[4,8,16], s: s32[4]) -> (f32[64,16], f32[4,8,16]) {
  %x = f32[64,8]{1,0} parameter(0)
  %w = f32[4,8,16]{2,1,0} parameter(1)
  %s = s32[4]{0} parameter(2)
  %kept = f32[64,16]{1,0} ragged-dot(%x, %w, %s), lhs_contracting_dims={1}, rhs_contracting_dims={1}, lhs_ragged_dims={0}, rhs_group_dims={0}
  %contracted = f32[4,8,16]{2,1,0} ragged-dot(%x, %kept, %s), lhs_contracting_dims={0}, rhs_contracting_dims={0}, lhs_ragged_dims={0}
  ROOT %tuple.1 = (f32[64,16]{1,0}, f32[4,8,16]{2,1,0}) tuple(%kept, %contracted)
}
"""  # noqa: E501


def test_ragged_dot_meets_one_matrix_a_row():
    found = products(parse(RAGGED))
    assert [each.kind for each in found] == ["ragged-dot", "ragged-dot"]
    assert [each.flops for each in found] == [2 * 64 * 8 * 16] * 2


@pytest.mark.parametrize(
    ("name", "op_name", "expected"),
    [
        ("dot.1", "jit(f)/jvp()/dot_general", "forward"),
        ("dot.1", "jit(f)/transpose", "forward"),
        ("dot.1", "jit(f)/transpose(jvp())/while/body/dot_general", "backward"),
        ("dot.1", "jit(f)/transpose(jvp())/checkpoint/rematted_computation/dot", "recompute"),
        ("dot.1.remat2", "jit(f)/jvp()/dot_general", "recompute"),
        ("ragged-dot-none", "ragged-dot-none", "unstated"),
    ],
)
def test_phases(name, op_name, expected):
    assert phase(name, op_name) == expected
