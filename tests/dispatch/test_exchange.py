"""Every exchange gives the oracle's outputs, gradients and drops; a bounded buffer says what it dropped."""

import functools
import importlib.util
import math
import re

import jax
from jax import lax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import pytest

from moe.axes import BATCH_AXES, EXPERT, FSDP, MESH_AXES, TENSOR
from moe.dispatch import table
from moe.dispatch.exchange import arrived_edges
from moe.dispatch.exchange_ragged import plan_transfer, ragged_exchange, share
from moe.dispatch.reference import reference
from moe.dispatch.table import Exchange, make_dispatch
from moe.dispatch.transfer import move
from moe.errors import ConfigError
from moe.routing.types import Choices
from tests.dispatch.common import Experts, run, swiglu
from tests.dispatch.test_mesh import assert_close, make_mesh

B, S, D, F, E, K = 8, 6, 8, 4, 8, 2
FOLDED = (FSDP, EXPERT)
# Sizes of data, fsdp, expert, sequence, tensor, and what the experts lie on.
FLAT_MESH = (1, 1, 4, 2, 1), (EXPERT,)
FOLDED_MESH = (1, 2, 2, 1, 2), FOLDED


def specs(axes):
    return Experts(PartitionSpec(axes, None, None, TENSOR), PartitionSpec(axes, TENSOR, None))


def across(name, where, **options):
    sizes, axes = where
    if name == "grouped":
        options = {"backend": "ragged_dot", **options}  # quicker to compile
    return make_dispatch(
        name, make_mesh(sizes), param_specs=specs(axes), expert_axes=axes, **options
    )


@functools.cache
def make_case(kind):
    """`even`; `hot`: every token's first choice is expert 0; `empty`: only experts of half of the shards."""
    rng = np.random.default_rng(0)
    expert = rng.permuted(np.tile(np.arange(E), (B, S, 1)), axis=-1)[..., :K].astype(np.int32)
    if kind == "hot":
        expert = np.stack([0 * expert[..., 0], 1 + expert[..., 1] % (E - 1)], -1)
    if kind == "empty":
        expert = expert // 4 * 4 + expert % 2
    valid = rng.random((B, S, K)) < 0.9
    valid[1, 3:] = False  # a padded tail, and a row of padding only
    valid[2] = False
    gate = np.where(valid, rng.random((B, S, K)), 0).astype(np.float32)
    x = rng.normal(size=(B, S, D)).astype(np.float32)
    wi, wo = rng.normal(size=(E, D, 2, F)) / D**0.5, rng.normal(size=(E, F, D)) / F**0.5
    experts = Experts(jnp.asarray(wi, jnp.float32), jnp.asarray(wo, jnp.float32))
    return jnp.asarray(x), Choices(*map(jnp.asarray, (expert, gate, valid))), experts


@functools.cache
def oracle(kind):
    return run(reference, *make_case(kind))[1]


EVERY = [
    ("grouped", {"exchange": "all_to_all"}),
    ("grouped", {"exchange": "all_to_all", "buffer_factor": 4.0}),
    ("grouped", {"exchange": "ragged"}),
    ("grouped", {"exchange": "ragged", "buffer_factor": 4.0}),
    ("grouped", {"exchange": "all_gather"}),
    ("grouped", {"exchange": "ragged", "chunks": 3}),
    ("capacity", {"exchange": "all_to_all"}),
    ("capacity", {"exchange": "all_gather", "capacity_factor": 100.0}),
    ("capacity", {"exchange": "all_to_all", "chunks": 2}),
    ("einsum", {}),
]


def identify(case):
    name, options = case
    return "-".join([name, *(f"{value}" for value in options.values())])


@pytest.mark.parametrize("where", [FLAT_MESH, FOLDED_MESH], ids=["flat", "folded"])
@pytest.mark.parametrize("case", EVERY, ids=identify)
def test_exchange_equals_oracle(case, where):
    name, options = case
    if name != "grouped":
        options = {"group": 3, **options}
    dispatch, compiled = across(name, where, **options), None
    for kind in ("even", "hot", "empty"):
        compiled, got = run(dispatch, *make_case(kind), compiled=compiled)
        assert_close(oracle(kind), got)


def expected_kept(choices, n, positions, R):
    """What buffers of `R` rows keep, in Python, of these positions: `(expert, b, s, k)` in order."""
    expert, valid = np.asarray(choices.expert), np.asarray(choices.valid)
    kept = np.zeros((B, S, K), bool)
    for j in range(n):  # receivers
        parts = []
        for rows in np.split(np.arange(B), n):
            at = [(expert[b, s, k], b, s, k) for b in rows for s in positions for k in range(K)]
            parts.append(sorted(r for r in at if valid[r[1:]] and r[0] // (E // n) == j))
        total = max(sum(map(len, parts)), R)
        for part in parts:
            for row in part[: len(part) * R // total]:
                kept[row[1:]] = True
    return kept


@pytest.mark.parametrize("where", [FLAT_MESH, FOLDED_MESH], ids=["flat", "folded"])
def test_bounded_parts_drop_the_last_experts_rows_of_every_pair(where):
    x, choices, experts = make_case("hot")
    dispatch = across("grouped", where, exchange="all_to_all", buffer_factor=1.25)
    _, got = run(dispatch, x, choices, experts)
    parts = (
        [range(S)] if where == FOLDED_MESH else [range(3), range(3, 6)]
    )  # of a row, exchanged apart
    kept = np.zeros((B, S, K), bool)
    for positions in parts:
        P = math.ceil(1.25 * B * len(positions) * K / 4 / 4)
        for rows in np.split(np.arange(B), 4):
            sent: dict[int, list] = {j: [] for j in range(4)}
            at = [(b, s, k) for b in rows for s in positions for k in range(K)]
            for place in (place for place in at if np.asarray(choices.valid)[place]):
                expert = int(np.asarray(choices.expert)[place])
                sent[expert // (E // 4)].append((expert, *place))
            for queue in sent.values():
                for _, *place in sorted(queue)[:P]:
                    kept[tuple(place)] = True
    assert 0 < kept.sum() < np.asarray(choices.valid).sum()
    np.testing.assert_array_equal(got["kept"], kept)
    left = choices._replace(valid=choices.valid & kept)
    assert_close(run(reference, x, left, experts)[1], got)


@pytest.mark.parametrize("where", [FLAT_MESH, FOLDED_MESH], ids=["flat", "folded"])
def test_a_bounded_buffer_drops_the_same_share_of_every_sender_and_says_so(where):
    x, choices, experts = make_case("hot")
    dispatch = across("grouped", where, exchange="ragged", buffer_factor=1.25)
    compiled, got = run(dispatch, x, choices, experts)
    if where == FOLDED_MESH:
        kept = expected_kept(choices, 4, range(S), 30)
    else:  # halves of a row are exchanged apart
        halves = range(3), range(3, 6)
        kept = np.logical_or(*(expected_kept(choices, 4, half, 15) for half in halves))
    assert 0 < kept.sum() < np.asarray(choices.valid).sum()
    np.testing.assert_array_equal(got["kept"], kept)
    left = choices._replace(valid=choices.valid & kept)
    assert_close(run(reference, x, left, experts)[1], got)
    nothing = ~kept.any(-1)
    assert nothing.sum() > (~np.asarray(choices.valid).any(-1)).sum()
    assert not np.asarray(got["output"])[nothing].any()
    assert not np.asarray(got["x"])[nothing].any()
    assert not np.asarray(got["gate"])[~kept].any()
    assert_close(oracle("even"), run(dispatch, *make_case("even"), compiled=compiled)[1])


def test_shares_of_a_full_buffer():
    asked = jnp.array([[0, 7, 1], [3, 7, 2], [9, 7, 3]])
    given = share(asked, 10)
    assert given.tolist() == [[0, 3, 1], [2, 3, 2], [7, 3, 3]]
    assert share(asked, 21).tolist() == asked.tolist()
    many = jnp.asarray(np.random.default_rng(0).integers(0, 40_000, (64, 64)), jnp.int32)
    for R in (99_999, 1_000_000, 1_250_000):
        assert (share(many, R).sum(0) <= R).all()


@functools.cache
def make_transfer():
    """Compiled `rows -> (received, gradient of rows)` on four shards, by sizes that are traced."""
    mesh = make_mesh((1, 1, 4, 1))

    @jax.shard_map(
        mesh=mesh,
        in_specs=(jax.P(EXPERT), jax.P(), jax.P(), jax.P(EXPERT)),
        out_specs=jax.P(EXPERT),
    )
    def both(rows, asked, given, cotangent):
        transfer = plan_transfer(asked, given, lax.axis_index(EXPERT))
        length = cotangent.shape[0]
        send = lambda rows: move(rows, length, transfer, (EXPERT,), is_native=False)  # noqa: E731
        received, pull = jax.vjp(send, rows)
        return received, *pull(cotangent)

    return jax.jit(both)


@pytest.mark.parametrize("full", [False, True])
def test_stand_in_is_a_ragged_all_to_all(full):
    """Against `jax.lax.ragged_all_to_all` as its documentation has it, in NumPy."""
    rng = np.random.default_rng(int(full))
    asked = rng.integers(0, 5, (4, 4))
    asked[1], asked[:, 2] = 0, 0  # a shard that sends nothing, and one that receives nothing
    given = np.minimum(asked, 2) if full else asked
    rows, cotangent = rng.normal(size=(4, 18, 3)), rng.normal(size=(4, 20, 3))
    received, gradient = np.zeros((4, 20, 3)), np.zeros((4, 18, 3))
    for j in range(4):
        output_offset = 0
        for i in range(4):
            source = slice(asked[i, :j].sum(), asked[i, :j].sum() + given[i, j])
            target = slice(output_offset, output_offset + given[i, j])
            received[j, target] = rows[i, source]
            gradient[i, source] = cotangent[j, target]
            output_offset += given[i, j]
    flat = [jnp.asarray(a.reshape(-1, 3), jnp.float32) for a in (rows, cotangent)]
    sizes = [jnp.asarray(a, jnp.int32) for a in (asked, given)]
    got = make_transfer()(flat[0], *sizes, flat[1])
    np.testing.assert_allclose(got[0].reshape(4, 20, 3), received, rtol=1e-6)
    np.testing.assert_allclose(got[1].reshape(4, 18, 3), gradient, rtol=1e-6)


def test_arrived_rows_are_sorted_by_expert():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 4, (3, 4))
    counts[:, 1], counts[2] = 0, 0
    starts = np.cumsum(counts, axis=1) - counts + 13 * np.arange(3)[:, None]  # parts of 13 rows
    edges, sizes = arrived_edges(jnp.asarray(counts), jnp.asarray(starts), 39)
    rows = [starts[i, j] + r for j in range(4) for i in range(3) for r in range(counts[i, j])]
    assert sizes.tolist() == counts.sum(0).tolist()
    assert np.asarray(edges.source)[np.asarray(edges.filled)].tolist() == rows
    assert np.nonzero(edges.kept[:, 0])[0].tolist() == sorted(rows)
    assert np.asarray(edges.target)[rows, 0].tolist() == list(range(len(rows)))


def test_auto_sends_the_fewest_rows_that_the_platform_can():
    def auto(path, n, K, *, native, buffer_factor=None):
        how = Exchange("auto", buffer_factor, "tpu", native, (EXPERT,))
        return how.resolved(path, n, K)

    assert auto("grouped", 1, 2, native=True) == "none"
    assert auto("grouped", 2, 2, native=True) == "all_gather"
    assert auto("capacity", 8, 8, native=False) == "all_gather"
    assert auto("grouped", 4, 2, native=True) == "ragged"
    assert (
        auto("grouped", 4, 2, native=False) == auto("capacity", 4, 2, native=True) == "all_to_all"
    )
    assert auto("grouped", 2, 2, native=True, buffer_factor=1.5) == "ragged"
    assert auto("grouped", 2, 2, native=False, buffer_factor=1.5) == "all_to_all"


@pytest.mark.parametrize(
    ("platform", "kind", "count", "native"),
    [
        ("tpu", "TPU v5", 64, True),
        ("tpu", "TPU v5 lite", 16, True),
        ("tpu", "TPU v5 lite", 64, False),
        ("gpu", "NVIDIA H100", 8, True),
        ("cpu", "cpu", 8, False),
    ],
)
def test_where_a_ragged_exchange_compiles(platform, kind, count, native):
    assert table.has_ragged_all_to_all(platform, kind, count) is native


@pytest.mark.parametrize(
    ("name", "options"), [("grouped", {"exchange": "ragged"}), ("einsum", {"group": 3})]
)
def test_bfloat16(name, options):
    x, choices, experts = make_case("even")
    dispatch = across(name, FLAT_MESH, **options)
    small = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (x, experts))
    got = run(dispatch, small[0], choices, small[1])[1]
    for key, want in oracle("even").items():
        assert got[key].dtype == (want.dtype if key in ("kept", "gate") else jnp.bfloat16)
        scale = float(np.abs(want).max())
        np.testing.assert_allclose(got[key].astype(jnp.float32), want, atol=2e-2 * scale)


def test_chunks_on_one_device():
    """Of the chunks, as many as divide the 16 token groups: 4."""
    x, choices, experts = make_case("hot")
    one = functools.partial(make_dispatch, "capacity", None, capacity_factor=0.5, group=3)
    assert_close(run(one(), x, choices, experts)[1], run(one(chunks=12), x, choices, experts)[1])
    loop = jax.make_jaxpr(lambda x: one(chunks=12)(x, choices, experts, swiglu).output)(x)
    assert "length=4" in str(loop)


def test_lowers_for_tpu():
    """Without a TPU or its compiler: rows travel four times, and no gradient asks for more."""
    mesh = make_mesh((1, 2, 2, 1, 2))
    path = functools.partial(
        ragged_exchange, axes=FOLDED, backend="ragged_dot", buffer_factor=2.0, is_native=True
    )
    dispatch = table.across(path, mesh, specs(FOLDED), FOLDED)

    def loss(x, gate, choices, experts):
        return dispatch(x, choices._replace(gate=gate), experts, swiglu).output.sum()

    x, choices, experts = make_case("even")
    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 3))).trace(x, choices.gate, choices, experts)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@ragged_all_to_all(") == 4


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler")
@pytest.mark.parametrize(
    ("sizes", "axes"), [((1, 1, 16, 1, 1), (EXPERT,)), ((1, 2, 4, 1, 2), FOLDED)]
)
def test_compiles_for_tpu(sizes, axes, monkeypatch):
    """Rows travel there and back, and so do their gradients; weights stay where they are."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
    mesh = Mesh(np.array(devices).reshape(sizes), MESH_AXES)
    dispatch = make_dispatch(
        "grouped", mesh, param_specs=specs(axes), expert_axes=axes, buffer_factor=2.0
    )
    B, S, D, F, E, K = 32, 256, 512, 256, 32, 4

    def loss(x, gate, experts, expert, valid):
        out = dispatch(x, Choices(expert, gate, valid), experts, swiglu).output
        return out.astype(jnp.float32).mean()

    def like(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    wi, wo = specs(axes)
    rows = PartitionSpec(BATCH_AXES)
    compiled = (
        jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        .lower(
            like((B, S, D), jnp.bfloat16, rows),
            like((B, S, K), jnp.float32, rows),
            Experts(like((E, D, 2, F), jnp.bfloat16, wi), like((E, F, D), jnp.bfloat16, wo)),
            like((B, S, K), jnp.int32, rows),
            like((B, S, K), jnp.bool_, rows),
        )
        .compile()
    )
    text = compiled.as_text()
    assert len(re.findall(r" ragged-all-to-all(?:-start)?\(", text)) == 4
    assert not re.search(r"bf16\S* all-gather", text)


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("capacity", {"exchange": "ragged"}, "auto, all_to_all, all_gather"),
        ("einsum", {"exchange": "all_gather"}, "use one of auto"),
        ("grouped", {"exchange": "all2all"}, "auto, all_to_all, ragged, all_gather"),
        ("grouped", {"exchange": "all_gather", "buffer_factor": 1.0}, "ragged or all_to_all"),
        ("capacity", {"buffer_factor": 1.0}, "name=grouped"),
        ("reference", {"chunks": 2}, "grouped, capacity"),
        ("grouped", {"backend": "cuda"}, "not a grouped matrix product"),
        ("grouped", {"expert_axes": (EXPERT, TENSOR)}, ", ".join(BATCH_AXES)),
    ],
)
def test_options_that_do_not_go_together(name, options, told):
    with pytest.raises(ConfigError, match=told):
        make_dispatch(name, None, **options)


def test_no_ragged_exchange_by_name_where_none_compiles(monkeypatch):
    monkeypatch.setattr(table, "_platform", lambda mesh: "tpu")
    monkeypatch.setattr(table, "_has_ragged", lambda mesh: False)
    mesh = make_mesh((1, 1, 4, 1, 1))
    with pytest.raises(ConfigError, match="exchange=all_to_all with"):
        make_dispatch("grouped", mesh, exchange="ragged", buffer_factor=1.25)
    make_dispatch("grouped", mesh, buffer_factor=1.25)
