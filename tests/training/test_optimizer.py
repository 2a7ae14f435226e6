"""Schedules at their corners, the mask of weight decay, and AdamW against the one of Optax."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe.model.build import model_spec
from moe.training import optimizer
from moe.training.state import make_skeleton
from tests import tiny


def values(kind: str, *steps: int, warmup: int = 10) -> list[float]:
    made = optimizer.schedule(
        kind=kind, steps=100, warmup_steps=warmup, decay_fraction=0.2, final_fraction=0.1
    )
    return [float(jnp.asarray(made(jnp.int32(step)))) for step in steps]


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_warm_up_is_linear_and_moves_at_once(kind):
    np.testing.assert_allclose(values(kind, 0, 4, 9, 10), [0.1, 0.5, 1.0, 1.0], rtol=1e-6)
    assert values(kind, 0, warmup=0) == [1.0]
    assert values(kind, 0, warmup=1) == [1.0]
    assert values(kind, 99, warmup=500) == [1.0], "a warm-up longer than the run ends with it"


def test_cosine_ends_at_the_final_fraction():
    np.testing.assert_allclose(values("cosine", 55, 100), [0.55, 0.1], rtol=1e-5)
    assert values("cosine", 11)[0] < 1.0


def test_wsd_is_stable_and_then_falls_linearly():
    np.testing.assert_allclose(values("wsd", 50, 80, 90, 100), [1.0, 1.0, 0.55, 0.1], rtol=1e-5)


def test_constant_stays():
    assert values("constant", 50, 100) == [1.0, 1.0]


def test_decay_reaches_matrices_but_no_norm_and_no_gate():
    config = tiny.config("model.qk_norm=head", "model.first_dense=1", "model.num_layers=3")
    skeleton = make_skeleton(model_spec(config, tiny.VOCAB))
    mask = optimizer.decay_mask(skeleton.params)
    layer = mask["blocks"]["layer0"]
    assert all(layer["attention"][name] for name in ("wq", "wk", "wv", "wo"))
    assert layer["mlp"]["experts"] == {"wi": True, "wo": True}
    assert mask["first"]["layer0"]["mlp"] == {"wi": True, "wo": True}
    assert mask["embedding"]
    assert mask["head"]
    assert layer["mlp"]["gate"] == {"kernel": False}
    flat = nnx.traversals.flatten_mapping(mask)
    assert not any(decays for path, decays in flat.items() if path[-1] == "scale")
    assert sum(path[-1] == "scale" for path in flat) == 2 * 4 + 1
    assert set(flat) == {path for path, _ in nnx.to_flat_state(skeleton.params)}


@pytest.mark.parametrize("clip_norm", [0.1, 1e6])
def test_update_is_adamw(clip_norm):
    """Optax's own chain, with its schedule compiled in, is the readable twin."""
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=(4, 3)), jnp.float32) for name in "ab"}
    decay = {"a": True, "b": False}
    twin = optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(0.05, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, mask=decay),
    )
    adam = optimizer.adam(b1=0.9, b2=0.95, eps=1e-8)
    ours, state = params, adam.init(params)
    theirs, twin_state = params, twin.init(params)
    for _ in range(3):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
        done = optimizer.update(
            adam,
            grads,
            ours,
            state,
            decay=decay,
            fraction=jnp.float32(0.5),
            learning_rate=jnp.float32(0.1),
            weight_decay=jnp.float32(0.1),
            clip_norm=jnp.float32(clip_norm),
            norm=optax.tree.norm(grads),
        )
        ours, state = done.params, done.optimizer
        updates, twin_state = twin.update(grads, twin_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
        norm = np.sqrt(sum(float((g * g).sum()) for g in grads.values()))
        assert float(done.grad_norm) == pytest.approx(norm, rel=1e-5), "before clipping"
    assert float(done.learning_rate) == pytest.approx(0.05)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, theirs)


def test_bfloat16_moments_are_kept_small_and_computed_large():
    params = {"w": jnp.linspace(-1.0, 1.0, 64).reshape(8, 8)}
    whole = optimizer.adam(b1=0.9, b2=0.95, eps=1e-8)
    half = optimizer.adam(b1=0.9, b2=0.95, eps=1e-8, moment_dtype="bfloat16")
    states = [whole.init(params), half.init(params)]
    assert {a.dtype for a in jax.tree.leaves(states[1].mu)} == {jnp.dtype("bfloat16")}
    for step in range(20):
        grads = {"w": jnp.cos(params["w"] * (step + 1))}
        expected, states[0] = whole.update(grads, states[0], params)
        found, states[1] = half.update(grads, states[1], params)
    assert found["w"].dtype == jnp.float32
    assert states[1].nu["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(found["w"], expected["w"], atol=0.03)
    assert not np.array_equal(found["w"], expected["w"])
