"""A whole model in its three forms: training with gradients, evaluation, and cached generation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe.dispatch.table import make_dispatch
from moe.model.layer import Call
from moe.model.transformer import empty_cache
from moe.training.state import bind
from tests import tiny

EXACT = make_dispatch("reference", None)
FULL = ((16,), (16,), (16,))


def model(*overrides: str) -> tiny.Model:
    """With one layer of each stack unless overridden, and rows of 16."""
    return tiny.model("data.sequence_length=16", *overrides, dispatch=EXACT)


def check_cached(made: tiny.Model, prompt: int = 9) -> None:
    """A prompt at once, then token after token, gives the logits and choices of one pass."""
    batch = tiny.batch(FULL)
    full = made(batch)

    @jax.jit
    def advance(tokens, cache, start):
        positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
        ones = jnp.ones_like(tokens)
        call = Call(tokens, ones.astype(bool), EXACT)
        return bind(made.skeleton, made.params, made.router)(positions, ones, call, cache, start)

    cache = empty_cache(made.spec, tiny.B, tiny.S)
    for start, stop in ((0, prompt), *((t, t + 1) for t in range(prompt, tiny.S))):
        out = advance(batch.tokens[:, start:stop], cache, jnp.int32(start))
        cache = out.cache
        np.testing.assert_allclose(out.logits, full.logits[:, start:stop], atol=1e-4)
        if full.reports is not None:
            now = full.reports.expert[:, :, start:stop]
            np.testing.assert_array_equal(out.reports.expert, now)


def check_causal(made: tiny.Model, at: int = 7) -> None:
    """In evaluation, tokens after `at` change nothing up to it."""
    batch = tiny.batch(FULL)
    later = jnp.arange(tiny.S) > at
    other = jnp.where(later, (batch.tokens + 7) % tiny.VOCAB, batch.tokens)
    one, two = made(batch).logits, made(batch._replace(tokens=other)).logits
    np.testing.assert_allclose(two[:, : at + 1], one[:, : at + 1], atol=1e-5)
    assert np.abs(two[:, at + 1 :] - one[:, at + 1 :]).max() > 0.1


def train(made: tiny.Model, batch: Any, key: Any, params: Any = None) -> Any:
    """The training form; traceable."""
    call = Call(batch.tokens, batch.valid, EXACT, key=key, training=True)
    bound = bind(made.skeleton, made.params if params is None else params, made.router)
    return bound(batch.positions, batch.segments, call)


def gradients(made: tiny.Model, batch: Any, seed: int = 0) -> Any:
    """Of logits and terms in training form, and its output."""

    def loss(params):
        out = train(made, batch, jax.random.key(seed), params)
        probe = jnp.cos(jnp.arange(out.logits.size)).reshape(out.logits.shape)
        return (out.logits * probe).sum() + sum(t.sum() for t in out.terms.values()), out

    return jax.jit(jax.grad(loss, has_aux=True))(made.params)


def assert_learns(tree: Any) -> None:
    """Every parameter has a finite gradient that is not 0."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)
