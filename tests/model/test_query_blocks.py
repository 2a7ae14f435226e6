"""Attention by blocks of queries: the same numbers with less memory, on one device and on a mesh."""

from flax import nnx
import jax
from jax.sharding import NamedSharding
import numpy as np
import pytest

from moe.errors import ConfigError
from moe.model.attention import Attention
from moe.model.attention_table import check_attention
from moe.parallel.mesh import make_mesh
from moe.parallel.rules import RULES, TOKEN_SPEC, parameter_shardings

B, S, D, H, Q, X = 4, 16, 8, 4, 2, 4


def make(block, causal=True):
    return nnx.split(
        Attention(
            *(D, H, Q, X),
            qk_norm="head",
            rope_base=1e4,
            norm_eps=1e-5,
            out_scale=1.0,
            causal=causal,
            query_block=block,
            rngs=nnx.Rngs(0),
        )
    )


def inputs():
    """Two documents a row; padding at the end of one row, and a row of padding."""
    x = np.random.default_rng(0).normal(size=(B, S, D)).astype(np.float32)
    segments = np.where(np.arange(S) < 7, 1, 2) * np.ones((B, 1), np.int32)
    segments[1, 10:] = 0
    segments[2] = 0
    return x, np.broadcast_to(np.arange(S, dtype=np.int32), (B, S)), segments.astype(np.int32)


def step(block, causal=True):
    """Output and gradients of one layer, as a function of its arrays."""
    graph, _ = make(block, causal)

    def loss(state, x, positions, segments, prefix=None):
        y, _ = nnx.merge(graph, state)(x, positions, segments, prefix=prefix)
        return (y**2).sum(), y

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def with_prefix():
    """Three positions of each document, and some of padding."""
    x, positions, segments = inputs()
    return x, positions, segments, np.isin(positions, (0, 1, 2, 7, 8, 9, 12))


def same(want, got):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), want, got)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block", [1, 4, 5, 64])
def test_blocks_are_the_whole(block, causal):
    state = make(None)[1]
    same(step(None, causal)(state, *inputs()), step(block, causal)(state, *inputs()))


@pytest.mark.parametrize("block", [4, 5])
def test_blocks_see_the_prefix(block):
    state = make(None)[1]
    same(step(None)(state, *with_prefix()), step(block)(state, *with_prefix()))


@pytest.mark.parametrize(
    ("block", "make_inputs"),
    [*((b, inputs) for b in (None, 4, 3)), *((b, with_prefix) for b in (None, 3))],
)
def test_sharded_positions(block, make_inputs):
    mesh, state = make_mesh(data=2, sequence=2, tensor=2), make(None)[1]
    shardings = parameter_shardings(state, mesh, RULES["separate"])
    spread = jax.tree.map(lambda leaf: leaf, state)
    nnx.replace_by_pure_dict(spread, jax.device_put(nnx.to_pure_dict(state), shardings))
    whole = make_inputs()
    arrays = jax.device_put(whole, NamedSharding(mesh, TOKEN_SPEC))
    with jax.set_mesh(mesh):
        compiled = step(block).lower(spread, *arrays).compile()
        same(step(None)(state, *whole), compiled(spread, *arrays))
    # Keys, values, segments and prefix of a shard's rows are all that is gathered.
    gathered = [line for line in compiled.as_text().splitlines() if " all-gather(" in line]
    assert len(gathered) == len(whole)
    assert all(f"[{B // 2},{S}" in line.split("all-gather(")[0] for line in gathered)


def test_memory_grows_with_the_block_not_the_square():
    length, state = 1024, make(None)[1]
    shapes = [(1, length, D), (1, length), (1, length)]
    arrays = [jax.ShapeDtypeStruct(s, t) for s, t in zip(shapes, "fii", strict=True)]
    whole, blocks = (
        step(block).lower(state, *arrays).compile().memory_analysis().temp_size_in_bytes
        for block in (None, 32)
    )
    assert whole > H * length * length * 4
    assert blocks < whole / 8


def test_a_block_has_a_query():
    check_attention("full", sequence_length=8, query_block=3)
    with pytest.raises(ConfigError, match=r"attention.query_block=0 must be at least 1"):
        check_attention("full", sequence_length=8, query_block=0)
