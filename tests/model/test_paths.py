"""Skipped layers and jumps from earlier layers: the plain Transformer in expectation, and its limits."""

from functools import partial
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import ConfigError
from moe.model.paths import (
    JumpIn,
    check,
    draw,
    empty_history,
    kept_layers,
    prune,
    remember,
    run_if,
    skip,
    survival_rates,
)
from moe.routing.types import LayerReport

B, S, D, N = 3, 5, 4, 4
DRAWS = 20_000


def arrays(*shapes: tuple[int, ...], seed: int = 0) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def jump(mode: str) -> JumpIn:
    """With weights as after some training."""
    module = JumpIn(N, mode)
    module.scale[...] = jnp.asarray([0.5, -1.0, 0.25, 2.0])
    if mode == "single":
        module.source[...] = jnp.asarray([0.3, -0.5, 1.0, 0.7])
    return module


def test_survival_falls_linearly_to_the_last_layer():
    np.testing.assert_allclose(survival_rates(4, 0.5), [0.875, 0.75, 0.625, 0.5])
    np.testing.assert_allclose(survival_rates(3, 0.8, "constant"), [0.8] * 3, rtol=1e-6)


def test_layers_survive_as_often_as_they_should():
    rates = survival_rates(6, 0.4)
    keys = jax.random.split(jax.random.key(0), (DRAWS, len(rates)))
    kept = jax.jit(jax.vmap(jax.vmap(lambda key, p: draw(key, p, (1,), "batch")[0]), (0, None)))(
        keys, rates
    )
    error = 5 * np.sqrt(rates * (1 - rates) / DRAWS)
    assert (np.abs(np.asarray(kept).mean(axis=0) - rates) < error).all()


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_a_skipped_layer_leaves_rows_bit_for_bit(scope):
    x, delta = arrays((B, S, D), (B, S, D))
    seen = set()
    for seed in range(12):
        key = jax.random.key(seed)
        y = skip(x, delta, key, 0.5, scope=scope, training=True)
        same = (np.asarray(y) == np.asarray(x)).all(axis=(1, 2))
        np.testing.assert_array_equal(same, ~draw(key, 0.5, (B,), scope))
        np.testing.assert_allclose(y[~same], (x + 2 * delta)[~same], rtol=1e-6)
        dropped = skip(x, delta, key, 0.5, scope=scope, training=True, rescale=False)
        np.testing.assert_array_equal(dropped[~same], (x + delta)[~same])
        seen.add(int(same.sum()))
    assert seen == {0, B} if scope == "batch" else seen & {1, 2}


def test_survival_one_and_evaluation_are_the_plain_layer():
    x, delta = arrays((B, S, D), (B, S, D))
    for key, p, training in ((0, 1.0, True), (0, 0.3, False)):
        y = skip(x, delta, jax.random.key(key), p, training=training)
        np.testing.assert_array_equal(y, x + delta)
    np.testing.assert_array_equal(skip(x, delta, None, 0.3, training=False), x + delta)


def test_expected_output_of_a_skipped_layer_is_that_of_evaluation():
    x, delta = arrays((1, 1, D), (1, 1, D))
    keys = jax.random.split(jax.random.key(1), DRAWS)
    y = np.asarray(jax.vmap(lambda key: skip(x, delta, key, 0.7, training=True))(keys))
    assert (np.abs(y.mean(axis=0) - x - delta) < 5 * y.std(axis=0) / np.sqrt(DRAWS)).all()


def test_a_layer_that_does_not_run_reports_nobody():
    E, K = 4, 2
    expert = jnp.ones((B, S, K), jnp.int32)
    sums = {name: jnp.ones((B,)) for name in LayerReport._fields if name.startswith("row_")}
    wide = ("requested", "kept", "ranked", "first", "gates", "probs")
    sums |= {f"row_{name}": jnp.ones((B, E)) for name in wide}
    report = LayerReport(**{**sums, "row_terms": {}}, logit_max=jnp.float32(3), expert=expert)

    @jax.jit
    def layer(keep: jax.Array) -> Any:
        return run_if(keep, lambda: (jnp.ones((B, S, D)), report))

    delta, told = layer(jnp.bool(True))
    jax.tree.map(np.testing.assert_array_equal, (delta, told), (jnp.ones((B, S, D)), report))
    delta, told = layer(jnp.bool(False))
    np.testing.assert_array_equal(told.expert, -1)
    for leaf in jax.tree.leaves((delta, told._replace(expert=None))):
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize("mode", ["bernoulli", "single"])
@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_expected_input_is_that_of_evaluation(mode, scope):
    x, history = arrays((2, 1, D), (N, 2, 1, D))
    module = jump(mode)
    call = partial(module, x, history, 3, rate=0.6, temperature=0.5, scope=scope)
    keys = jax.random.split(jax.random.key(2), DRAWS)
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: call(key, training=True)))(keys))
    expected = call(None, training=False)
    assert (np.abs(drawn.mean(axis=0) - expected) < 5 * drawn.std(axis=0) / np.sqrt(DRAWS)).all()
    assert np.abs(expected - x).max() > 0.1
    moved = (drawn != np.asarray(x)[None]).any(axis=(2, 3))  # [draws rows]
    assert (moved[:, 0] != moved[:, 1]).any() == (scope == "sequence")


def test_bernoulli_jumps_are_the_enumerated_masks():
    """Every draw is one of the 8 sums over subsets of three sources, never of the layer itself."""
    x, history = arrays((1, 1, D), (N, 1, 1, D))
    module = jump("bernoulli")
    subsets = [
        x + sum((m / 0.5) * module.scale[s] * history[s] for s, m in enumerate(mask))
        for mask in itertools.product((0, 1), repeat=3)
    ]
    keys = jax.random.split(jax.random.key(3), 200)
    drawn = jax.vmap(lambda key: module(x, history, 3, key, rate=0.5, training=True))(keys)
    distance = np.abs(np.asarray(drawn)[:, None] - np.stack(subsets)[None]).max(axis=(2, 3, 4))
    assert (distance.min(axis=1) < 1e-5).all()
    assert len(set(distance.argmin(axis=1))) == 8


@pytest.mark.parametrize("mode", ["bernoulli", "single"])
def test_no_jump_without_rate_weight_or_source(mode):
    x, history = arrays((B, S, D), (N, B, S, D))
    key, trained, fresh = jax.random.key(0), jump(mode), JumpIn(N, mode)
    for training in (True, False):
        off = trained(x, history, 3, key, rate=jnp.float32(0), training=training)
        new = fresh(x, history, 3, key, rate=0.5, training=training)
        first = trained(x, history, 0, key, rate=1.0, training=training)
        for y in (off, new, first):
            np.testing.assert_array_equal(y, x)


def test_gradient_of_the_drawn_source_is_that_of_the_expectation():
    x, history = arrays((1, 1, D), (N, 1, 1, D))
    probe = jnp.cos(jnp.arange(D))

    def value(source: jax.Array, key: Any, training: bool) -> jax.Array:
        module = jump("single")
        module.source[...] = source
        y = module(x, history, 3, key, rate=1.0, training=training)
        return (y * probe[None, None]).sum()

    start = jump("single").source[...]
    keys = jax.random.split(jax.random.key(4), DRAWS)
    slopes = jax.jit(jax.vmap(lambda key: jax.grad(value)(start, key, True)))(keys)
    exact = jax.grad(value)(start, None, False)
    slopes = np.asarray(slopes)
    assert (np.abs(slopes.mean(axis=0) - exact) <= 5 * slopes.std(axis=0) / np.sqrt(DRAWS)).all()
    assert np.abs(exact[:3]).min() > 1e-3
    assert exact[3] == 0.0


def network(weights: dict, x: jax.Array, key: Any, *, training: bool) -> jax.Array:
    """A scan over position-wise layers with jumps and skips."""
    rates = jnp.asarray(survival_rates(len(weights["kernel"]), 0.5))
    depth = len(rates)

    def layer(carry: tuple, scanned: tuple) -> tuple[tuple, None]:
        x, history = carry
        kernel, scale, rate, index = scanned
        module = JumpIn(N)
        module.scale[...] = scale
        now = None if key is None else jax.random.fold_in(key, index)
        jump_key, skip_key = (None, None) if now is None else jax.random.split(now)
        h = module(x, history, index, jump_key, rate=0.5, training=training)
        y = skip(h, jnp.tanh(h @ kernel), skip_key, rate, training=training)
        return (y, remember(history, x, index)), None

    carry = (x, empty_history(N, x))
    scanned = (weights["kernel"], weights["scale"], rates, jnp.arange(depth))
    return jax.lax.scan(layer, carry, scanned)[0][0]


def weights() -> dict:
    kernel, scale = arrays((N, D, D), (N, N), seed=7)
    return {"kernel": kernel, "scale": 0.5 * scale}


def test_scan_with_a_buffer_is_the_loop_over_a_list():
    (x,), w = arrays((B, S, D)), weights()
    states, h = [], np.asarray(x, np.float64)
    for kernel, scale in zip(np.asarray(w["kernel"]), np.asarray(w["scale"]), strict=True):
        h_in = h + sum(scale[s] * states[s] for s in range(len(states)))
        states.append(h)
        h = h_in + np.tanh(h_in @ kernel)
    y = jax.jit(partial(network, training=False))(w, x, None)
    np.testing.assert_allclose(y, h, rtol=1e-4, atol=1e-4)


def test_depth_pruned_network_runs_the_remaining_layers():
    assert kept_layers(6, 2) == [0, 2, 4]
    assert kept_layers(6, 3) == [0, 1, 3, 4]
    (x,), w = arrays((B, S, D)), weights() | {"scale": jnp.zeros((N, N))}
    y = network(prune(w, kept_layers(N, 2)), x, None, training=False)
    h = np.asarray(x)
    for i in (0, 2):
        h = h + np.tanh(h @ np.asarray(w["kernel"][i]))
    np.testing.assert_allclose(y, h, atol=1e-5)


def test_earlier_positions_see_no_later_one():
    (x, other), w = arrays((B, S, D), (B, S, D)), weights()
    run = jax.jit(partial(network, training=True))
    for seed, t in itertools.product(range(3), range(S - 1)):
        key = jax.random.key(seed)
        later = x.at[:, t + 1 :].set(other[:, t + 1 :])
        np.testing.assert_array_equal(run(w, later, key)[:, : t + 1], run(w, x, key)[:, : t + 1])


def test_gradients_are_finite_where_a_layer_never_runs():
    x, delta = arrays((B, S, D), (B, S, D))
    grad = jax.grad(lambda d: skip(x, d, jax.random.key(0), 0.0, training=True).sum())(delta)
    np.testing.assert_array_equal(grad, 0.0)
    (slope,) = jax.tree.leaves(
        jax.grad(lambda w: network(w, x, jax.random.key(0), training=True).sum())(weights())[
            "scale"
        ]
    )
    assert np.isfinite(slope).all()
    assert np.abs(slope).max() > 0
    np.testing.assert_array_equal(np.triu(slope), 0.0)  # no layer jumps from itself or a later one


GOOD = {
    "survival": 0.9,
    "schedule": "linear",
    "scope": "batch",
    "jump": 0.5,
    "jump_mode": "single",
    "jump_temperature": 1.0,
}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"survival": 0.0}, "survival=0.0"),
        ({"jump": 1.5}, "paths.jump=1.5"),
        ({"jump_temperature": 0.0}, "jump_temperature=0.0"),
        ({"schedule": "cosine"}, "schedule='cosine'"),
        ({"scope": "token"}, "scope='token'"),
        ({"jump_mode": "all"}, "jump_mode='all'"),
    ],
)
def test_refuses(bad, message):
    check(**GOOD)
    with pytest.raises(ConfigError, match=message):
        check(**(GOOD | bad))
