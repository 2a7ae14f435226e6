"""Continues a prompt with a key/value cache: greedy, or sampled with temperature and top-p."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key
import numpy as np

from moe.dispatch.types import Dispatch
from moe.errors import ConfigError
from moe.evaluation.causality import check_generation
from moe.model.block import LayerCache
from moe.model.layer import Call
from moe.model.transformer import Transformer, empty_cache


def generate(
    model: Transformer,
    dispatch: Dispatch,
    prompt: Sequence[int],
    *,
    length: int,
    temperature: float,
    top_p: float,
    key: Key[Array, ""],
    rows: int = 1,
) -> Int[np.ndarray, " N"]:
    """Samples `length` tokens after the prompt.

    Args:
        model: with its numbers.
        dispatch: how tokens reach experts; causal routers only.
        prompt: at least one token.
        length: tokens to add.
        temperature: 0 takes the most likely token.
        top_p: samples from the smallest set of tokens whose probability reaches this (nucleus sampling,
            Holtzman et al. 2020, arXiv:1904.09751); 1 is all.
        key: the same key gives the same text.
        rows: copies of the prompt, so that a batch-sharded mesh has one for each shard.

    Raises:
        ConfigError: a model that cannot generate, an empty prompt, or numbers out of range.
    """
    check_generation(model.spec)
    check_numbers(length=length, temperature=temperature, top_p=top_p)
    if len(prompt) == 0:
        raise ConfigError("generation needs a prompt of at least one token.")
    tokens = jnp.tile(jnp.asarray(prompt, jnp.int32)[None], (rows, 1))
    run = jax.jit(partial(_generate, model, dispatch, length=length))
    return np.asarray(run(tokens, jnp.float32(temperature), jnp.float32(top_p), key))[0]


def check_numbers(*, length: int, temperature: float, top_p: float) -> None:
    """Raises ConfigError for a number that is out of range."""
    if length < 1:
        raise ConfigError(f"length={length} must be at least 1.")
    if not temperature >= 0.0:
        raise ConfigError(f"temperature={temperature} must not be negative; 0 is greedy.")
    if not 0.0 < top_p <= 1.0:
        raise ConfigError(f"top_p={top_p} must be greater than 0 and at most 1; 1 is all tokens.")


def _generate(
    model: Transformer,
    dispatch: Dispatch,
    prompt: Int[Array, "B S"],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
    key: Key[Array, ""],
    *,
    length: int,
) -> Int[Array, "B N"]:
    rows, size = prompt.shape

    def advance(
        tokens: Array, cache: LayerCache, start: Array, key: Array
    ) -> tuple[Array, LayerCache]:
        positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
        ones = jnp.ones_like(tokens)
        call = Call(tokens, ones.astype(bool), dispatch, key=jax.random.fold_in(key, 0))
        out = model(positions, ones, call, cache, start)
        assert out.cache is not None
        chosen = sample(out.logits[0, -1], temperature, top_p, jax.random.fold_in(key, 1))
        return jnp.full((rows, 1), chosen), out.cache

    def turn(carry: tuple, index: Array) -> tuple[tuple, Array]:
        token, cache = carry
        key_now = jax.random.fold_in(key, index)
        following, cache = advance(token, cache, size + index - 1, key_now)
        return (following, cache), following[:, 0]

    cache = empty_cache(model.spec, rows, size + length)
    first, cache = advance(prompt, cache, jnp.int32(0), jax.random.fold_in(key, 0))
    _, rest = jax.lax.scan(turn, (first, cache), jnp.arange(1, length))
    return jnp.concatenate([first, rest.T], axis=1)


def sample(
    logits: Float[Array, " V"],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
    key: Key[Array, ""],
) -> Int[Array, ""]:
    """One token from the nucleus; the most likely one where the temperature is 0."""
    probs = jax.nn.softmax(logits / jnp.maximum(temperature, 1e-6))
    order = jnp.argsort(-probs)
    before = jnp.cumsum(probs[order]) - probs[order]  # mass of the more likely tokens
    keep = jnp.zeros_like(probs, bool).at[order].set(before < top_p)
    drawn = jax.random.categorical(key, jnp.where(keep, jnp.log(probs), -jnp.inf))
    return jnp.where(temperature > 0, drawn, logits.argmax()).astype(jnp.int32)


def until(tokens: Int[np.ndarray, " N"], boundary: int) -> Int[np.ndarray, " M"]:
    """The tokens before the first document boundary."""
    ends = np.flatnonzero(tokens == boundary)
    return tokens[: ends[0]] if len(ends) else tokens
