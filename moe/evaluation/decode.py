"""Batched decoding with a cache, for prompts of unequal length: greedy, sampled, and beam search.

Prompts are right-padded to `P` positions. New tokens stand behind all of them in the cache, at `P`,
`P + 1`, ...; their rotary positions go on where the row's own prompt ends, and the padding between is
of segment 0, which no token of segment 1 attends to.
"""

from collections.abc import Callable
from functools import partial
import math
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key, Shaped
import numpy as np

from moe.axes import BATCH_AXES
from moe.data.types import Batch
from moe.dispatch.types import Dispatch
from moe.errors import ConfigError, find_row
from moe.evaluation.beam import beam_search
from moe.evaluation.causality import check_generation
from moe.model.block import LayerCache
from moe.model.build import takes_padding
from moe.model.layer import Call
from moe.model.spec import ModelSpec
from moe.model.transformer import Transformer, empty_cache

NO_BOUNDARY = -1  # no token has this id: rows go on to the last position


class Decoding(NamedTuple):
    """How to choose tokens."""

    method: str = "greedy"  # or sample, beam
    length: int = 64  # N: tokens to add at most, the boundary that ends a row counted
    beam: int = 4  # hypotheses a row, of beam
    alpha: float = 0.6  # of the length penalty, of beam
    temperature: float = 1.0  # of sample; 0 takes the most likely token
    top_p: float = 1.0  # of sample: probability of the set that is drawn from


class Prompts(NamedTuple):
    """Beginnings of rows, right-padded; host arrays."""

    tokens: Int[Any, "B P"]
    size: Int[Any, " B"]  # tokens of each prompt; 0 in a row that is to stay empty
    prefix: Bool[Any, "B P"] | None = None  # positions that the whole prompt may see
    modality: Int[Any, "B P"] | None = None  # kind of each position
    frames: Float[Any, "B M F"] | None = None  # patches of a picture, or of sound


def prompts_of(batch: Batch) -> Prompts:
    """The part of every row before its first scored target, whose position belongs to it.

    Args:
        batch: rows of one document each, on the host; a row without scored targets gets size 0.

    Returns:
        Prompts with `P` = `S`, so that every batch of a split compiles to the same program.

    Raises:
        ConfigError: packed rows, which have no prompt.
    """
    if batch.scored is None or np.asarray(batch.segments).max(initial=0) > 1:
        raise ConfigError(
            "decoding needs rows of one example with a source and a target, as task.name='seq2seq' has. "
            "Set evaluation.decode='none' for other tasks."
        )
    scored = np.asarray(batch.scored) & np.asarray(batch.valid)
    size = np.where(scored.any(axis=1), scored.argmax(axis=1) + 1, 0).astype(np.int32)
    inside = np.arange(scored.shape[1])[None] < size[:, None]

    def cut(a: Any) -> Any:
        return None if a is None else np.where(inside, a, np.zeros_like(a))

    frames = None if batch.frames is None else np.asarray(batch.frames)
    return Prompts(cut(batch.tokens), size, cut(batch.prefix), cut(batch.modality), frames)


def decode(
    model: Transformer,
    dispatch: Dispatch,
    prompts: Prompts,
    decoding: Decoding,
    key: Key[Array, ""],
    *,
    boundary: int | None,
) -> Int[np.ndarray, "B N"]:
    """Goes on from each prompt until the boundary.

    Compiled once for each shape of prompts, `decoding.method`, its length and beam width.

    Args:
        model: with its numbers.
        dispatch: how tokens reach experts; the same object for every call, or it compiles again.
        prompts: all rows of the batch, the same on every process.
        decoding: how to choose.
        key: of sampling, and of routers that draw; row `i` draws the same next to any other rows.
        boundary: the token that ends a row; None goes on to the last position.

    Returns:
        New tokens, int32; from the boundary on, all are the boundary.

    Raises:
        ConfigError: numbers out of range, an empty batch, a model that cannot generate, or prompts
            of unequal length for one that cannot tell padding apart.
    """
    check_generation(model.spec)
    check_decoding(decoding)
    prompts = _evened(model.spec, jax.tree.map(np.asarray, prompts))
    rows = len(prompts.size)
    if boundary is not None:
        _check_boundary(boundary, model.spec.vocab_size)
    graph, state = nnx.split(model)
    numbers = tuple(jnp.float32(x) for x in (decoding.alpha, decoding.temperature, decoding.top_p))
    fixed = decoding._replace(alpha=0.0, temperature=0.0, top_p=1.0)  # those are traced
    end = NO_BOUNDARY if boundary is None else boundary
    new = _decode(graph, dispatch, fixed, state, _filled_up(prompts), numbers, jnp.int32(end), key)
    return np.asarray(new)[:rows]


def check_decoding(decoding: Decoding) -> None:
    """Raises ConfigError for a number out of range, or an unknown method."""
    find_row(METHODS, "evaluation.decode", decoding.method, "no way to decode")
    if decoding.length < 1:
        raise ConfigError(f"length={decoding.length} must be at least 1.")
    if decoding.beam < 1:
        raise ConfigError(f"beam={decoding.beam} must be at least 1; 1 is greedy.")
    if not 0.0 <= decoding.alpha < math.inf:
        raise ConfigError(
            f"length_penalty={decoding.alpha} must not be negative; 0 compares plain probabilities, "
            "which are higher for short texts."
        )
    if not decoding.temperature >= 0.0:
        raise ConfigError(f"temperature={decoding.temperature} must not be negative; 0 is greedy.")
    if not 0.0 < decoding.top_p <= 1.0:
        raise ConfigError(
            f"top_p={decoding.top_p} must be greater than 0 and at most 1; 1 is all tokens."
        )


def _check_boundary(boundary: int, vocab_size: int) -> None:
    if not 0 <= boundary < vocab_size:
        raise ConfigError(f"boundary={boundary} is not one of the {vocab_size} ids of the model.")


def _evened(spec: ModelSpec, prompts: Prompts) -> Prompts:
    """Prompts without padding, for models that would take it for text; others as they are."""
    sizes = np.unique(prompts.size[prompts.size > 0])
    if len(sizes) == 0:
        raise ConfigError("generation needs a prompt of at least one token.")
    if takes_padding(spec):
        return prompts
    if len(sizes) > 1:
        name = (
            f"router.name={spec.router.name!r} or a conv expert"
            if spec.looks_back
            else f"attention.name={spec.attention.name!r}"
        )
        raise ConfigError(
            f"prompts of {sizes[0]} to {sizes[-1]} tokens cannot be decoded together: {name} looks back "
            "at earlier positions and would read padding as text. Decode prompts of equal length "
            "together, or choose a router of class C0 and attention.name='full'."
        )
    size = int(sizes[0])
    cut = [None if a is None else a[:, :size] for a in (prompts.prefix, prompts.modality)]
    return Prompts(prompts.tokens[:, :size], prompts.size, *cut, prompts.frames)


def _filled_up(prompts: Prompts) -> Prompts:
    """With empty rows, so that each shard of the mesh has as many."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else math.prod(mesh.shape[name] for name in BATCH_AXES)
    missing = -len(prompts.size) % shards
    return jax.tree.map(lambda a: np.pad(a, [(0, missing), *[(0, 0)] * (a.ndim - 1)]), prompts)


class Step(NamedTuple):
    """What the model says of the next token of every row."""

    logits: Float[Array, "B V"]
    cache: LayerCache


@partial(jax.jit, static_argnums=(0, 1, 2))
def _decode(
    graph: nnx.GraphDef,
    dispatch: Dispatch,
    decoding: Decoding,
    state: Any,
    prompts: Prompts,
    numbers: tuple[Array, Array, Array],
    boundary: Int[Array, ""],
    key: Key[Array, ""],
) -> Int[Array, "B N"]:
    model = nnx.merge(graph, state)
    routing_key, key = jax.random.split(key)
    first = _read(model, dispatch, prompts, decoding.length, jax.random.fold_in(routing_key, 0))
    width = prompts.tokens.shape[1]

    def advance(
        tokens: Int[Array, " B"], cache: LayerCache, index: Int[Array, ""], live: Bool[Array, " B"]
    ) -> Step:
        """Logits behind the new token `index`, which goes to position `width + index`."""
        copies = tokens.shape[0] // prompts.size.shape[0]
        position = jnp.repeat(prompts.size, copies) + index
        segments = live.astype(jnp.int32)[:, None]
        key_now = jax.random.fold_in(routing_key, index + 1)
        call = Call(tokens[:, None], live[:, None], dispatch, key=key_now)
        out = model(position[:, None], segments, call, cache, width + index)
        assert out.logits is not None
        assert out.cache is not None
        return Step(out.logits[:, 0], out.cache)

    method = METHODS[decoding.method]
    tokens = method(advance, first, prompts.size > 0, decoding, numbers, boundary, key)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:  # every process reads all rows
        tokens = jax.lax.with_sharding_constraint(tokens, PartitionSpec())
    return tokens


def _read(
    model: Transformer, dispatch: Dispatch, prompts: Prompts, length: int, key: Key[Array, ""]
) -> Step:
    """The prompts in one pass, into a cache with room for `length` tokens more."""
    rows, width = prompts.tokens.shape
    places = jnp.broadcast_to(jnp.arange(width), (rows, width))
    valid = places < prompts.size[:, None]
    call = Call(
        prompts.tokens,
        valid,
        dispatch,
        key=key,
        modality=prompts.modality,
        prefix=prompts.prefix,
        frames=prompts.frames,
    )
    cache = empty_cache(model.spec, rows, width + length)
    positions = jnp.where(valid, places, 0)
    out = model(positions, valid.astype(jnp.int32), call, cache, jnp.int32(0))
    assert out.logits is not None
    assert out.cache is not None
    last = jnp.maximum(prompts.size - 1, 0)
    return Step(jnp.take_along_axis(out.logits, last[:, None, None], axis=1)[:, 0], out.cache)


Advance = Callable[[Array, Any, Array, Array], Step]
Choose = Callable[[Array, Array], Array]


def _one_by_one(
    advance: Advance,
    first: Step,
    live: Bool[Array, " B"],
    length: int,
    boundary: Int[Array, ""],
    choose: Choose,
) -> Int[Array, "B N"]:
    """One hypothesis a row; `choose` picks each row's token from `[B V]` logits and the index."""
    tokens = jnp.full((live.shape[0], length), boundary)

    def put(tokens: Array, logits: Array, index: Array, live: Array) -> tuple[Array, Array, Array]:
        chosen = jnp.where(live, choose(logits, index), boundary)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, chosen[:, None], index, axis=1)
        return tokens, chosen, live & (chosen != boundary)

    def goes_on(carry: tuple) -> Bool[Array, ""]:
        _, _, live, index, _ = carry
        return (index < length) & live.any()

    def turn(carry: tuple) -> tuple:
        tokens, token, live, index, cache = carry
        # A row that has ended feeds a valid id, as padding.
        out = advance(jnp.where(live, token, 0), cache, index - 1, live)
        return *put(tokens, out.logits, index, live), index + 1, out.cache

    start = put(tokens, first.logits, jnp.int32(0), live)
    return jax.lax.while_loop(goes_on, turn, (*start, jnp.int32(1), first.cache))[0]


def _greedy(
    advance: Advance,
    first: Step,
    live: Bool[Array, " B"],
    decoding: Decoding,
    numbers: tuple[Array, Array, Array],
    boundary: Int[Array, ""],
    key: Key[Array, ""],
) -> Int[Array, "B N"]:
    def choose(logits: Float[Array, "B V"], index: Int[Array, ""]) -> Int[Array, " B"]:
        return logits.argmax(axis=-1).astype(jnp.int32)

    return _one_by_one(advance, first, live, decoding.length, boundary, choose)


def _sampled(
    advance: Advance,
    first: Step,
    live: Bool[Array, " B"],
    decoding: Decoding,
    numbers: tuple[Array, Array, Array],
    boundary: Int[Array, ""],
    key: Key[Array, ""],
) -> Int[Array, "B N"]:
    _, temperature, top_p = numbers
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(live.shape[0]))

    def choose(logits: Float[Array, "B V"], index: Int[Array, ""]) -> Int[Array, " B"]:
        def one(row: Array, key: Array) -> Array:
            return sample(row, temperature, top_p, jax.random.fold_in(key, index))

        return jax.vmap(one)(logits, keys)

    return _one_by_one(advance, first, live, decoding.length, boundary, choose)


def _beam(
    advance: Advance,
    first: Step,
    live: Bool[Array, " B"],
    decoding: Decoding,
    numbers: tuple[Array, Array, Array],
    boundary: Int[Array, ""],
    key: Key[Array, ""],
) -> Int[Array, "B N"]:
    W = decoding.beam

    def copied(a: Shaped[Array, "L B ..."]) -> Shaped[Array, "L R ..."]:
        return jnp.repeat(a, W, axis=1)

    def reordered(
        a: Shaped[Array, "L R ..."], origin: Int[Array, "B W"]
    ) -> Shaped[Array, "L R ..."]:
        # Within the hypotheses of a row, so that no row crosses to another device.
        parts = a.reshape(a.shape[0], *origin.shape, *a.shape[2:])
        where = origin.reshape(1, *origin.shape, *[1] * (parts.ndim - 3))
        return jnp.take_along_axis(parts, where, axis=2).reshape(a.shape)

    def step(tokens: Array, origin: Array, cache: Any, index: Array, live: Array) -> Any:
        cache = jax.tree.map(lambda a: reordered(a, origin), cache)
        rows = jnp.repeat(live, W)
        out = advance(jnp.where(rows, tokens.reshape(-1), 0), cache, index, rows)
        return out.logits.reshape(*tokens.shape, -1), out.cache

    cache = jax.tree.map(copied, first.cache)
    return beam_search(step, first.logits, cache, live, W, decoding.length, numbers[0], boundary)


METHODS = {"greedy": _greedy, "sample": _sampled, "beam": _beam}


def sample(
    logits: Float[Array, " V"],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
    key: Key[Array, ""],
) -> Int[Array, ""]:
    """One token from the nucleus (Holtzman et al. 2020, arXiv:1904.09751).

    That is the smallest set of tokens whose probability reaches `top_p`. The most likely token where
    the temperature is 0.
    """
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
