"""The same numbers on every mesh: loss, gradients, drops, router state and parameters after a step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import models, routers
from moe import setup
from moe.cli import complete_config
from moe.config import ConfigDict, default_config
from moe.data.types import Batch
from moe.model.build import model_spec
from moe.parallel.mesh import make_mesh
from moe.parallel.rules import find_rules
from moe.training import optimizer
from moe.training.state import initialize, make_skeleton, state_shardings
from moe.training.step import StepMetrics

VOCAB, B, S = 64, 16, 16

MESHES = {
    "data2": {"data": 2},
    "expert4": {"expert": 4},
    "data8": {"data": 8},
    "data2_expert2_tensor2": {"data": 2, "expert": 2, "tensor": 2},
    "fsdp2_expert4": {"fsdp": 2, "expert": 4},
}
# Router, its options, dispatch, capacity factor. Sigmoid gates, biases, tables and draws are all here.
CASES = {
    "topk_grouped": ({"name": "topk", "k": 2}, "grouped", None),
    "topk_capacity": ({"name": "topk", "k": 2}, "capacity", 0.75),
    "switch_capacity": ({"name": "switch", "k": 1, "jitter": 0.01}, "capacity", 1.0),
    "deepseek_v3_grouped": (
        {"name": "deepseek_v3", "k": 2, "groups": 4, "groups_kept": 2, "bias_rate": 0.01},
        "grouped",
        None,
    ),
    "random_grouped": ({"name": "random", "k": 2}, "grouped", None),
    "hash_capacity": ({"name": "hash", "k": 2}, "capacity", 1.0),
}


def make_batch() -> Batch:
    """Rows of two documents, a padded tail, and one row of padding only."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, VOCAB, (B, S)).astype(np.int32)
    valid = np.ones((B, S), bool)
    valid[1, 10:] = False
    valid[2] = False
    segments = np.where(np.arange(S) < 7, 1, 2) * valid
    positions = np.where(np.arange(S) < 7, np.arange(S), np.arange(S) - 7)
    return Batch(
        tokens * valid,
        np.roll(tokens, -1, axis=1) * valid,
        segments.astype(np.int32),
        np.broadcast_to(positions, (B, S)).astype(np.int32),
        valid,
        np.zeros(B, np.int32),
    )


def base_config() -> ConfigDict:
    base = default_config()
    base.model.update(models.tiny())
    base.model.update({"width": 16, "pattern": ("dense", "sparse"), "expert_width": 16})
    base.data.update({"batch_size": B, "sequence_length": S})
    return base


def config_of(case: str) -> ConfigDict:
    base = base_config()
    if case in routers.PRESETS:
        base.model.num_experts = 16  # a square, and groups of several sizes
        routers.apply(base, case)
        for key, value in SHORT.get(case, {}).items():
            base.router[key] = value
    else:
        router, dispatch, factor = CASES[case]
        base.dispatch.update({"name": dispatch, "capacity_factor": factor})
        with base.unlocked():
            base.router = router
    return complete_config(base)


# Segments that fit into these short rows.
SHORT = {
    "lory": {"segment": 4},
    "segment": {"segment_size": 4},
    "segment_self": {"segment_size": 4},
    "document_pool": {"segment_size": 4},
}


def take_step(case: str, sizes: dict[str, int]) -> tuple[StepMetrics, dict, dict]:
    return step_of(config_of(case), sizes)


def step_of(config: ConfigDict, sizes: dict[str, int]) -> tuple[StepMetrics, dict, dict]:
    count = int(np.prod(list(sizes.values())))
    mesh = make_mesh(**{"data": 1, **sizes}, devices=jax.devices()[:count])
    classes = 3 if config.task.name == "classify" else 0
    spec = model_spec(config, VOCAB, np.arange(VOCAB), classes=classes)
    skeleton = make_skeleton(spec)
    adam = optimizer.adam(b1=0.9, b2=0.95, eps=1e-8)
    shardings = state_shardings(skeleton, adam, mesh, find_rules(config.mesh.rules))
    run = setup.Run(config, mesh, None, spec, skeleton, adam, shardings, jnp.ones(VOCAB, jnp.int32))
    with jax.set_mesh(mesh):
        state = jax.jit(lambda key: initialize(spec, adam, key), out_shardings=shardings)(
            setup.root_key(0, 0)
        )
        step = setup.jit_train_step(run)
        batch = setup.to_device(mesh)(make_batch())
        state, told = step(state, batch, setup.root_key(0, 1), setup.hyper(run))
        moments = jax.device_get(state.optimizer.mu)
        return jax.device_get(told), moments, jax.device_get(state.router)


# A covering subset for every run; the full product is marked slow.
COVER = {
    ("topk_grouped", "data2_expert2_tensor2"),
    ("topk_capacity", "fsdp2_expert4"),
    ("switch_capacity", "data8"),
    ("deepseek_v3_grouped", "expert4"),
    ("random_grouped", "data2"),
    ("hash_capacity", "data2_expert2_tensor2"),
}


@functools.cache
def alone(case: str) -> tuple[StepMetrics, dict, dict]:
    return take_step(case, {"data": 1})


@pytest.mark.parametrize(
    ("case", "mesh"),
    [
        pytest.param(c, m, marks=[] if (c, m) in COVER else pytest.mark.slow)
        for c in CASES
        for m in MESHES
    ],
)
def test_one_step_is_the_same_on_every_mesh(case, mesh):
    same_step(alone(case), take_step(case, MESHES[mesh]))


def same_step(one: tuple[StepMetrics, dict, dict], another: tuple[StepMetrics, dict, dict]) -> None:
    (told, moments, router), (other, other_moments, other_router) = one, another
    for name, value in told.losses.items():
        np.testing.assert_allclose(other.losses[name], value, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(other.grad_norm, told.grad_norm, rtol=1e-5)
    # The first moment after one step is the clipped gradient times 1 - b1.
    scale = max(float(np.abs(m).max()) for m in jax.tree.leaves(moments))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * scale),
        other_moments,
        moments,
    )
    np.testing.assert_array_equal(other.totals.requested, told.totals.requested)
    np.testing.assert_array_equal(other.totals.kept, told.totals.kept)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), other_router, router
    )


# One of each plan; the others are marked slow.
PRESETS = {"expert_choice", "soft_moe", "lory"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in PRESETS else pytest.mark.slow) for n in routers.PRESETS],
)
def test_every_router_is_the_same_on_a_mesh(name):
    same_step(alone(name), take_step(name, MESHES["data2_expert2_tensor2"]))


def test_capacity_cases_do_drop():
    told, _, _ = alone("topk_capacity")
    assert told.totals.kept.sum() < told.totals.requested.sum()
