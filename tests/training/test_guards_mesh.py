"""Guards on eight devices: a clean run has the bits of one without them, by every preset of rules."""

from collections.abc import Generator
import contextlib
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from moe import programs, setup
from moe.cli import complete_config
from moe.invariance import VOCAB, make_batch
from moe.invariance_cells import parse_mesh
from moe.parallel.feed import to_device
from moe.training import guards
from moe.training.state import initialize
from tests.parallel.test_invariance import config_of
from tests.training.test_guards import assert_same, on_host

STEPS = 3
# What is fused decides bits: compiled as a run is, and not in a hurry as other tests are.
FULL = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
MESHES = {
    "separate": "fsdp2_expert4",
    "zero1": "fsdp4_expert2:zero1",
    "folded": "fsdp2_expert4:folded",
    "folded_data": "data2_fsdp2_expert2:folded_data",
    "hybrid": "fsdp2_expert2_sequence2:hybrid",
}


@contextlib.contextmanager
def judged_fit() -> Generator[None]:
    """A step that is traced inside takes every update."""
    with mock.patch.multiple(
        guards,
        all_finite=lambda tree: jnp.asarray(True),
        is_spike=lambda *arguments: jnp.asarray(False),
    ):
        yield


def trained(mesh: str) -> tuple:
    """What some steps learn, and their losses and norms."""
    sizes = parse_mesh(mesh)[0]
    pairs = [(f"mesh.{name}", str(size)) for name, size in sizes.items()]
    # State beside the parameters; a rate and a bound at which every number moves.
    options = [("router.bias_rate", "0.01"), ("optimizer.clip_norm", "0.5")]
    config = complete_config(config_of("deepseek_v3_grouped"), [*pairs, *options])
    devices = setup.mesh_of(config, jax.devices()[:8])
    run = setup.assemble(
        config, devices, vocab_size=VOCAB, token_counts=np.arange(VOCAB), classes=0
    )
    window = config.guards.window
    fresh = jax.jit(
        lambda key: initialize(run.spec, run.transformation, key, window),
        out_shardings=run.shardings,
    )
    with jax.set_mesh(devices):
        state, batch = fresh(setup.root_key(0, 0)), to_device(devices)(make_batch())
        key = jax.device_put(setup.root_key(0, 1), NamedSharding(devices, PartitionSpec()))
        step, numbers = programs.jit_train_step(run), programs.hyper(run)
        step = step.lower(state, batch, key, numbers).compile(compiler_options=FULL)
        told = []
        for _ in range(STEPS):
            state, found = step(state, batch, key, numbers)
            told.append(on_host((found.losses, found.grad_norm, found.update_applied)))
    assert all(bool(one[2]) for one in told)
    return on_host((state.params, state.router, state.optimizer)), told


@pytest.mark.slow
@pytest.mark.parametrize("rules", MESHES)
def test_a_clean_run_is_the_same_to_the_last_bit_without_guards(rules):
    with judged_fit():
        bare = trained(MESHES[rules])
    assert_same(bare, trained(MESHES[rules]))
