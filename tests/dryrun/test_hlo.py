"""The text of compiled modules: shapes, attributes, stack frames, execution counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.dryrun.counts import count, trip_count
from moe.dryrun.hlo import Source, parse
from moe.dryrun.shapes import Shape, leaves, parse_shape
from tests.dryrun.texts import read


def compiled_text(f, *args):
    return jax.jit(f).lower(*args).compile().as_text()


def counts_of(module, opcode):
    """Executions of each instruction of an opcode."""
    times = count(module).times
    return [
        times[c.name] for c in module.computations.values() for each in c if each.opcode == opcode
    ]


def test_shapes_with_layouts_and_nested_tuples():
    shape = parse_shape(
        "((bf16[8,128]{1,0:T(8,128)(2,1)S(1)}), /*index=1*/f32[]{:T(128)}, (pred[<=3], u32[2]{0:S(2)}))"
    )
    assert shape == (
        (Shape("bf16", (8, 128), "1,0:T(8,128)(2,1)S(1)"),),
        Shape("f32", (), ":T(128)"),
        (Shape("pred", (3,)), Shape("u32", (2,), "0:S(2)")),
    )
    assert [leaf.memory_space for leaf in leaves(shape)] == [1, 0, 0, 2]
    assert [leaf.bytes for leaf in leaves(shape)] == [2048, 4, 3, 8]


@pytest.mark.parametrize(
    ("text", "plain", "padded"),
    [
        ("f32[4096,8]{1,0:T(8,128)}", 4096 * 8 * 4, 4096 * 128 * 4),
        ("f32[4096,8]{0,1:T(8,128)}", 4096 * 8 * 4, 4096 * 8 * 4),
        ("bf16[3,5,130]{2,1,0:T(8,128)(2,1)}", 3 * 5 * 130 * 2, 3 * 8 * 256 * 2),
        ("f32[]{:T(128)}", 4, 512),
        ("s4[7]{0}", 4, 4),
        ("f8e4m3fn[16,2]", 32, 32),
        ("token[]", 0, 0),
    ],
)
def test_bytes_and_padding(text, plain, padded):
    shape = parse_shape(text)
    assert (shape.bytes, shape.padded_bytes) == (plain, padded)


def test_our_innermost_frame_is_found_behind_a_library_frame():
    module = read("tpu_async")
    started = module.computations["async_start"]["all-gather.38"]
    assert module.source(started) == Source("moe/model/experts.py", 16, "Experts.__call__")
    assert [frame[1] for frame in module.stack(3)] == [299, 16, 23]
    assert str(module.source(started)) == "moe/model/experts.py:16"


def test_a_line_that_xla_does_not_print_is_an_error():
    text = "HloModule m\n\nENTRY %main (p: f32[]) -> f32[] {\n  %p = f32[] nonsense\n}\n"
    with pytest.raises(ValueError, match="not an instruction"):
        parse(text)
    with pytest.raises(ValueError, match="neither a computation nor a table"):
        parse("HloModule m\n\nnonsense\n")


def test_the_trip_count_of_a_scan_in_a_scan_multiplies():
    def f(w, x):
        def outer(x, _):
            return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=5)[0], None

        return jax.lax.scan(outer, x, None, length=3)[0]

    module = parse(compiled_text(f, jnp.ones((16, 16)), jnp.ones((8, 16))))
    assert counts_of(module, "dot") == [15]
    assert count(module).unknown == ()


def without_trip_counts(text):
    """As XLA:TPU prints loops."""
    return text.replace('"known_trip_count"', '"not_known"')


@pytest.mark.parametrize("bounds", [(0, 7, 7), (3, 9, 6)])
def test_the_trip_count_is_read_off_the_loop_where_xla_does_not_state_it(bounds):
    low, high, trips = bounds

    def f(w, x):
        return jax.lax.fori_loop(low, high, lambda i, x: jnp.tanh(x @ w) * i, x)

    text = compiled_text(f, jnp.ones((16, 16)), jnp.ones((8, 16)))
    assert counts_of(parse(text), "dot") == [trips]
    assert counts_of(parse(without_trip_counts(text)), "dot") == [trips]


def test_a_loop_that_ends_by_its_data_is_one_trip_and_named():
    def f(w, x):
        return jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: x @ w, x)

    module = parse(compiled_text(f, jnp.ones((16, 16)), jnp.ones((8, 16))))
    counts = count(module)
    assert len(counts.unknown) == 1
    assert counts_of(module, "dot") == [1]


def test_a_tpu_loop_counts_from_its_copied_start_to_its_condition():
    module = read("tpu_async")
    loop = module.entry["while.29"]
    assert trip_count(module, module.entry, loop) == 6
    assert count(module).times["async_collective_fusion.77"] == 6


def test_a_conditional_counts_as_its_dearest_branch():
    def f(flag, w, x):
        def cheap(x):
            return x @ w

        return jax.lax.cond(flag, lambda x: cheap(cheap(x)), cheap, x)

    text = compiled_text(f, True, jnp.ones((16, 16)), jnp.ones((8, 16)))
    module = parse(text)
    by_products = count(module, lambda _, each: each.opcode == "dot").times
    dots = [
        by_products[c.name]
        for c in module.computations.values()
        for each in c
        if each.opcode == "dot"
    ]
    assert sorted(dots) == [0, 1, 1]


def test_a_module_of_twenty_megabytes_takes_seconds():
    line = '  %add.{i} = f32[8,128]{{1,0:T(8,128)}} add(%p, %p), metadata={{op_name="a/b"}}, backend_config={{'
    body = "\n".join(line.format(i=i) + '"x":"' + "y" * 300 + '"}' for i in range(50_000))
    text = (
        "HloModule m, is_scheduled=true\n\nENTRY %main (p: f32[8,128]) -> f32[8,128] {\n"
        "  %p = f32[8,128]{1,0:T(8,128)} parameter(0)\n"
        f"{body}\n  ROOT %r = f32[8,128]{{1,0:T(8,128)}} add(%add.0, %add.49999)\n}}\n"
    )
    module = parse(text)
    assert len(text) > 18_000_000
    assert len(module.entry.instructions) == 50_002
    assert module.entry.root.operands == ("add.0", "add.49999")
    assert np.sum([each.shapes[0].elements for each in module.entry]) == 50_002 * 1024
