"""Every row of the table builds, attends, generates and refuses by the same few functions."""

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
import numpy as np
import pytest

from moe.errors import ConfigError
from moe.model.attention_table import (
    ATTENTION,
    causality_of,
    check_attention,
    empty_cache,
    find_attention,
    make_attention,
)
from moe.model.attention_types import AttentionOutput
from moe.parallel.mesh import make_mesh
from moe.parallel.rules import BATCH_SPEC, RULES, parameter_spec
from tests.model import variants
from tests.model.variants import COMMON, D, H, Q, X

# Options under which 12 positions have something to choose from.
SMALL = {
    "full": {},
    "block": {"block": 3, "top_k": 2},
    "kmeans": {"clusters": 2},
    "segment": {"size": "ratio", "ratio": 0.25},
    "projection_experts": {"experts": 6},
    "routed_heads": {"top_k": 1, "shared_heads": 2},
}


def make(name: str, options=None):
    options = SMALL[name] if options is None else options
    return variants.drawn(
        lambda rngs: make_attention(
            name, options, D, H, Q, X, sequence_length=12, rngs=rngs, **COMMON
        )
    )


@pytest.mark.parametrize("name", ATTENTION)
def test_defaults_and_small_options_pass_the_check(name):
    check_attention(name, sequence_length=256)
    check_attention(name, sequence_length=12, **SMALL[name])
    assert causality_of(name, {}) == "C1"


@pytest.mark.parametrize("name", ATTENTION)
def test_cached_steps_equal_one_pass_and_keep_the_dtype(name):
    module = make(name)
    x, positions, documents = variants.inputs([12], [12])
    sizes = {"width": D, "kv_heads": Q, "head_dim": X}

    @jax.jit
    def steps(x):
        cache, outs = empty_cache(name, SMALL[name], 2, 12, dtype=x.dtype, **sizes), []
        for start, stop in ((0, 7), (7, 12)):
            part = slice(start, stop)
            out = AttentionOutput(
                *module(x[:, part], positions[:, part], documents[:, part], cache, jnp.int32(start))
            )
            cache, outs = out.cache, [*outs, out.output]
        return jnp.concatenate(outs, axis=1)

    whole = jax.jit(lambda x: AttentionOutput(*module(x, positions, documents)))
    out = whole(x)
    np.testing.assert_allclose(steps(x), out.output, atol=1e-5)
    assert set(out.terms) == set(ATTENTION[name].terms)
    low = x.astype(jnp.bfloat16)
    assert jax.eval_shape(steps, low).dtype == jnp.bfloat16
    assert jax.eval_shape(whole, low).output.dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ATTENTION)
def test_every_parameter_names_its_axes_and_gets_a_gradient(name):
    graph, params = nnx.split(make(name))
    inputs = variants.inputs([12], [5, 7])

    @jax.jit
    @jax.grad
    def gradient(params):
        out = AttentionOutput(*nnx.merge(graph, params)(*inputs))
        return jnp.sum(jnp.sin(out.output)) + sum(jnp.sum(term) for term in out.terms.values())

    grads = dict(nnx.to_flat_state(gradient(params)))
    for path, variable in nnx.to_flat_state(params):
        value = variable.get_value()
        assert len(variable.get_metadata()["axes"]) == value.ndim, path
        assert np.abs(grads[path].get_value()).max() > 0, path


@pytest.mark.parametrize(
    ("name", "options"), [*SMALL.items(), ("kmeans", {"clusters": 2, "mode": "top_w"})]
)
def test_a_mesh_gives_the_same_outputs_and_gradients(name, options):
    """Batch over two devices, heads and centroids over two."""
    graph, params = nnx.split(make(name, options))
    inputs = variants.inputs([12], [5, 7], [9], [3, 3, 3])

    def loss(params, inputs):
        output = AttentionOutput(*nnx.merge(graph, params)(*inputs)).output
        return jnp.sum(jnp.sin(output)), output

    step = jax.value_and_grad(loss, has_aux=True)
    (_, output), gradient = jax.jit(step)(params, inputs)
    mesh = make_mesh(data=2, tensor=2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, nnx_shardings(params, mesh))
        rows = jax.device_put(inputs, NamedSharding(mesh, BATCH_SPEC))
        (_, spread), spread_gradient = jax.jit(step)(placed, rows)
    np.testing.assert_allclose(spread, output, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), spread_gradient, gradient
    )


def nnx_shardings(params, mesh):
    """A state like `params` with the sharding of each array in its place."""
    flat = [
        (path, variable.replace(NamedSharding(mesh, spec_of(variable))))
        for path, variable in nnx.to_flat_state(params)
    ]
    return nnx.from_flat_state(flat)


def spec_of(variable):
    return parameter_spec(
        variable.get_metadata()["axes"], variable.get_value().ndim, RULES["separate"]
    )


def test_top_w_clusters_are_refused_in_a_language_model():
    assert causality_of("kmeans", {"mode": "top_w"}) == "C3"
    with pytest.raises(ConfigError, match=r"top_w.*later tokens"):
        check_attention("kmeans", sequence_length=64, mode="top_w")
    check_attention("kmeans", sequence_length=64, mode="top_w", allow_noncausal=True)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("blok", {}, "did you mean 'block'"),
        ("block", {"blocks": 3}, "did you mean 'block'"),
        ("full", {"top_k": 3}, "it takes query_block"),
        ("block", {"block": 65}, "block=65"),
        ("block", {"block": 8, "top_k": 0}, "top_k=0"),
        ("kmeans", {"clusters": 65}, "clusters=65"),
        ("kmeans", {"mode": "top_w", "window": 65}, "window=65"),
        ("segment", {"segment": 65}, "segment=65"),
        ("segment", {"size": "content"}, "SegmentPool"),
        ("segment", {"size": "ratio", "ratio": 0.7}, "ratio=0.7"),
        ("projection_experts", {"experts": 2, "top_k": 3}, "k=3 with heads=2"),
        ("routed_heads", {"top_k": 4}, "shared=1"),
    ],
)
def test_what_cannot_work_is_refused_by_name(name, options, words):
    with pytest.raises(ConfigError, match=words):
        check_attention(name, sequence_length=64, allow_noncausal=True, **options)
    if "mean" not in words:
        assert find_attention(name) is ATTENTION[name]
