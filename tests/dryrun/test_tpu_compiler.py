"""What XLA:TPU makes of small real programs, compiled for 16 chips that are not there."""

from collections.abc import Iterator

import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from moe.dryrun.buffers import peak
from moe.dryrun.collectives import collectives
from moe.dryrun.counts import count
from moe.dryrun.flops import by_phase, products
from moe.dryrun.hlo import parse

pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'jax[tpu]'")
pytestmark = pytest.mark.slow

MESH = {"data": 4, "tensor": 4}
L, B, S, D, F = 6, 128, 1024, 1024, 4096  # too large for the chips' VMEM
N, E, X, Y = 4096, 8, 512, 1024


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
        yield Mesh(np.array(devices).reshape(tuple(MESH.values())), tuple(MESH))


def array(mesh: Mesh, shape: tuple[int, ...], *spec: str | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec)))


def loss(weights, x):
    def layer(x, weights):
        wi, wo = weights
        return x + jax.nn.silu(x @ wi) @ wo, None

    return (jax.lax.scan(jax.checkpoint(layer), x, weights)[0].astype(jnp.float32) ** 2).mean()


def test_products_collectives_and_memory_of_a_scan(mesh):
    weights = (
        array(mesh, (L, D, F), None, "data", "tensor"),
        array(mesh, (L, F, D), None, "tensor", "data"),
    )
    x = array(mesh, (B, S, D), "data", None, None)
    compiled = jax.jit(jax.value_and_grad(loss)).lower(weights, x).compile()
    module = parse(compiled.as_text())
    assert count(module).unknown == ()

    one = 2 * (B // 4) * S * D * (F // 4)
    assert by_phase(products(module)) == {
        "forward": L * 2 * one,
        "backward": L * 4 * one,
        "recompute": L * one,
        "unstated": 0,
    }
    found = collectives(module, MESH)
    sums = [each for each in found if each.kind == "all-reduce" and each.axes == ("tensor",)]
    assert sum(each.count for each in sums) == 2 * L
    assert {each.operand_bytes for each in sums} == {(B // 4) * S * D * 2}
    assert all(each.axes for each in found)

    stated = compiled.memory_analysis().temp_size_in_bytes
    assert 0.5 * stated <= peak(module).bytes <= 2 * stated


def test_the_grouped_kernel_costs_the_ideal(mesh):
    gmm = pytest.importorskip("jax.experimental.pallas.ops.tpu.megablox").gmm
    one = Mesh(mesh.devices.flat[:1], ("data",))

    def loss(rows, weights, sizes):
        product = gmm(rows, weights, sizes, preferred_element_type=jnp.bfloat16)
        return (product.astype(jnp.float32) ** 2).mean()

    sizes = jax.ShapeDtypeStruct((E,), jnp.int32, sharding=NamedSharding(one, P()))
    gradient = jax.jit(jax.value_and_grad(loss, (0, 1)))
    module = parse(
        gradient.lower(array(one, (N, X)), array(one, (E, X, Y)), sizes).compile().as_text()
    )
    found = products(module)
    assert sorted(each.kind for each in found) == ["gmm", "gmm", "tgmm"]
    assert [each.flops for each in found] == [2 * N * X * Y] * 3
    assert [each.phase for each in found].count("backward") == 2
