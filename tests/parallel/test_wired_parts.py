"""Parts of the model that are off by default take the same step on a mesh as on one device."""

import numpy as np
import pytest

from moe.cli import complete_config
from tests.parallel import test_invariance as invariance

MESH = {"data": 2, "expert": 2, "tensor": 2}
PARTS = {
    "depth_heads_paths": (
        "allow_noncausal=true",
        "model.pattern=depth_sparse,depth",
        "model.depth_capacity=0.5",
        "attention.name=projection_experts",
        "model.zero_experts=1",
        "model.constant_experts=1",
        "paths.survival=0.7",
        "paths.jump=0.5",
        "weight_noise.target=experts",
        "weight_noise.mode=factorised",
        "losses.predictor=0.01",
        "losses.head_balance=0.01",
        "losses.heterogeneous=0.01",
        "optimizer.accumulation=2",
    ),
    "conv_clusters_pool": (
        "task.name=classify",
        "task.pool=segment",
        "task.size=learned",
        "attention.name=kmeans",
        "attention.mode=top_w",
        "attention.clusters=4",
        "model.conv_experts=2",
        "model.copy_experts=2",
        "paths.survival=0.7",
        "paths.scope=sequence",
        "weight_noise.target=gate",
        "losses.commitment=0.01",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "parts",
    ["depth_heads_paths", "conv_clusters_pool"],
)
def test_one_step_is_the_same_on_a_mesh(parts):
    pairs = [tuple(override.split("=", 1)) for override in PARTS[parts]]
    config = complete_config(invariance.base_config(), [(key, text) for key, text in pairs])
    one = invariance.step_of(config, {"data": 1})
    invariance.same_step(one, invariance.step_of(config, MESH))
    told = one[0].losses
    wanted = {name.split(".")[1].split("=")[0] for name in PARTS[parts] if "losses." in name}
    assert wanted <= set(told)
    assert all(np.isfinite(value) and value > 0 for value in told.values())
