"""Parameters and cost of the presets, by shape alone, and the numbers a fresh model starts from."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import models
from moe.cli import complete_config
from moe.config import default_config
from moe.errors import ConfigError
from moe.model.build import model_size, model_spec
from moe.model.transformer import ModelSpec
from moe.training.optimizer import adam
from moe.training.state import initialize, make_skeleton
from tests import tiny


def spec_of(preset: dict, vocab_size: int, k: int) -> ModelSpec:
    config = default_config()
    config.model.update(preset)
    config.router.k = k
    return model_spec(complete_config(config), vocab_size)


# Parameter counts of the released checkpoints, and the active ones that their papers round.
@pytest.mark.parametrize(
    ("preset", "vocab_size", "k", "total", "active"),
    [
        (models.olmoe_1b_7b, 50_304, 8, 6_919_161_856, 1.28e9),
        (models.mixtral_8x7b, 32_000, 2, 46_702_792_704, 12.9e9),
        (models.qwen3_30b_a3b, 151_936, 8, 30_532_122_624, 3.3e9),
    ],
)
def test_public_shapes_have_the_published_parameters(preset, vocab_size, k, total, active):
    before = jax.live_arrays()
    spec = spec_of(preset(), vocab_size, k)
    size = model_size(spec, sequence_length=4096)
    shapes = jax.eval_shape(
        lambda: initialize(spec, adam(b1=0.9, b2=0.95, eps=1e-8), jax.random.key(0))
    )
    assert size.parameters_total == total
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes.params)) == total
    assert size.parameters_active == pytest.approx(active, rel=0.02)
    new = {id(array) for array in jax.live_arrays()} - {id(array) for array in before}
    assert not new, "the shapes alone must do"


def test_size_counts_every_matrix():
    """Two layers of width 32: 4 heads of 8, 2 key/value heads, 8 experts of 32, 1 shared, top-2."""
    spec = spec_of(models.tiny() | {"shared_experts": 1}, 48, 2)
    attention = 32 * 8 * (4 + 2 + 2) + 32 * 32
    expert, norms, head = 3 * 32 * 32, 2 * 32, 48 * 32
    layer = attention + norms + 32 * 8 + expert
    size = model_size(spec, sequence_length=15)
    assert size.parameters_total == 2 * (layer + 8 * expert) + 2 * head + 32
    assert size.parameters_active == 2 * (layer + 2 * expert) + 2 * head + 32
    matrices = 2 * (layer - norms + 2 * expert) + head
    scores_and_values = 2 * 2 * 32 * 8  # layers, products, heads x head_dim, 8 of 15 positions seen
    assert size.flops_per_token == 2 * (matrices + scores_and_values)


def test_fresh_parameters_have_unit_fan_in_and_a_key_of_their_own():
    spec = spec_of(models.tiny() | {"width": 64, "expert_width": 128}, 48, 2)
    make = jax.jit(lambda key: initialize(spec, adam(b1=0.9, b2=0.95, eps=1e-8), key).params)
    params = make(jax.random.key(0))
    layer = params["blocks"]["layer0"]
    wi, wo = layer["mlp"]["experts"]["wi"], layer["mlp"]["experts"]["wo"]
    assert wi.shape == (2, 8, 64, 2, 128)
    assert wi.dtype == jnp.float32
    # The expert axis is no fan-in; output projections shrink with the depth of the residual.
    truncated = 0.88  # standard deviation of a unit normal cut at 2
    np.testing.assert_allclose(wi.std(), truncated * 64**-0.5, rtol=0.02)
    np.testing.assert_allclose(wo.std(), truncated * 128**-0.5 / 2, rtol=0.02)
    np.testing.assert_allclose(layer["attention"]["wq"].std(), truncated * 64**-0.5, rtol=0.02)
    np.testing.assert_allclose(params["embedding"].std(), 1.0, rtol=0.05)
    flat = [np.asarray(wi[i, e]).ravel() for i in range(2) for e in range(8)]
    assert len({row[:8].tobytes() for row in flat}) == 16, "layers and experts start different"
    again, other = make(jax.random.key(0)), make(jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert np.abs(params["embedding"] - other["embedding"]).max() > 0


def test_axes_name_every_parameter_axis():
    """A parameter without letters would silently be replicated."""
    spec = model_spec(tiny.config("model.first_dense=1", "model.shared_experts=1"), 48)
    for path, variable in nnx.to_flat_state(make_skeleton(spec).params):
        axes = variable.get_metadata().get("axes")
        stacked = path[0] in ("first", "blocks")
        assert axes is not None, path
        assert len(axes) == len(variable.get_value().shape) - stacked, path


def test_refuses_a_router_that_cannot_learn_only_in_training():
    config = tiny.config("router.k=1")
    with pytest.raises(ConfigError, match=r"router\.k=1 with router\.normalize='renormalize'"):
        model_spec(config, 48)
    assert model_spec(config, 48, training=False).router.k == 1
