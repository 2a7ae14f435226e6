"""Positions of a row on several devices: the same step as on one."""

import functools

import numpy as np
import pytest

from moe import setup
from moe.cli import complete_config
from moe.errors import ConfigError
from moe.parallel.mesh import make_mesh
from tests.parallel import test_invariance as invariance

MESHES = {
    "sequence2": {"sequence": 2},
    "data2_sequence2_tensor2": {"data": 2, "sequence": 2, "tensor": 2},
    "expert2_sequence4": {"expert": 2, "sequence": 4},
}
# A token group is what a device holds of a row, on the mesh with the shortest parts.
OVERRIDES = {
    "topk_grouped": [],
    "topk_capacity": [("dispatch.group", "4")],
    "hash_capacity": [("dispatch.group", "4")],
    "deepseek_v3_grouped": [],
    "random_grouped": [],
}
COVER = {
    ("topk_grouped", "data2_sequence2_tensor2"),
    ("topk_capacity", "expert2_sequence4"),
    ("deepseek_v3_grouped", "sequence2"),
}


def config_of(case, *more):
    return complete_config(invariance.config_of(case), [*OVERRIDES.get(case, ()), *more])


@functools.cache
def alone(case):
    return invariance.step_of(config_of(case), {"data": 1})


@pytest.mark.parametrize(
    ("case", "mesh"),
    [
        pytest.param(c, m, marks=[] if (c, m) in COVER else pytest.mark.slow)
        for c in OVERRIDES
        for m in MESHES
    ],
)
def test_one_step_is_the_same(case, mesh):
    one = alone(case)
    invariance.same_step(one, invariance.step_of(config_of(case), MESHES[mesh]))
    if "capacity" in case:
        assert one[0].totals.kept.sum() < one[0].totals.requested.sum()


# Attentions, routers and layers that look at whole rows, left to the partitioner.
WHOLE_ROWS = {
    "block": ("attention.name=block", "attention.block=4", "attention.top_k=2"),
    "kmeans": ("attention.name=kmeans", "attention.clusters=4"),
    "segment": ("attention.name=segment", "attention.segment=4"),
    "projection_experts": ("attention.name=projection_experts",),
    "routed_heads": ("attention.name=routed_heads",),
    "query_block": ("attention.query_block=3", "optimizer.accumulation=2", "model.remat=full"),
    "depth": ("allow_noncausal=true", "model.pattern=depth_sparse,depth"),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n == "query_block" else pytest.mark.slow) for n in WHOLE_ROWS],
)
def test_one_step_is_the_same_with(name):
    config = config_of("topk_grouped", *(tuple(o.split("=")) for o in WHOLE_ROWS[name]))
    one = invariance.step_of(config, {"data": 1})
    invariance.same_step(one, invariance.step_of(config, MESHES["expert2_sequence4"]))
    assert np.isfinite(one[0].grad_norm)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["expert_choice", "soft_moe", "lory", "switch"])
def test_plans_that_are_not_token_choice(name):
    config = invariance.config_of(name)
    one = invariance.alone(name)
    invariance.same_step(one, invariance.step_of(config, MESHES["data2_sequence2_tensor2"]))


def test_a_row_that_cannot_be_cut_is_refused():
    config = invariance.config_of("topk_grouped")
    config.data.sequence_length = 30
    with pytest.raises(
        ConfigError, match=r"sequence_length=30 is not divisible by mesh.sequence=4: .* 32"
    ):
        setup._check_batch(config, make_mesh(sequence=4))
