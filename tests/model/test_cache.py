"""Generation with a key/value cache sees what the full forward pass sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.dispatch.reference import reference
from moe.dispatch.table import make_dispatch
from moe.evaluation.generate import generate
from moe.model.build import model_spec, takes_padding
from moe.model.layer import Call, History
from moe.model.spec import Stem
from moe.model.transformer import empty_cache
from moe.training.state import bind, make_skeleton
from tests import tiny

LAYOUT = (
    "model.num_layers=3",
    "model.first_dense=1",
    "model.pattern=dense,sparse",
    "model.qk_norm=head",
)
PROMPT = 5


# Routers that look back, or hand something from layer to layer; the first is the one of the defaults.
ROUTERS = {
    "topk": (),
    "segment": ("router.segment_size=4",),
    "bigram_hash": (),
    "lory": ("router.k=1", "router.segment=4"),
    "recurrent": (),
    "expert_choice": (),
}
EXACT = make_dispatch("reference", None)


def of_router(name: str) -> tiny.Model:
    return tiny.model(*LAYOUT, f"router.name={name}", *ROUTERS[name], dispatch=EXACT)


@pytest.fixture(scope="module")
def model() -> tiny.Model:
    return of_router("topk")


@pytest.mark.parametrize("name", ROUTERS)
def test_cached_steps_equal_teacher_forcing(name):
    model = of_router(name)
    batch = tiny.batch(((16,), (16,), (16,)))
    full = model(batch)

    @jax.jit
    def advance(tokens, cache, start):
        positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
        ones = jnp.ones_like(tokens)
        call = Call(tokens, ones.astype(bool), EXACT)
        return bind(model.skeleton, model.params, model.router)(positions, ones, call, cache, start)

    cache = empty_cache(model.spec, tiny.B, tiny.S)
    for start, stop in ((0, PROMPT), *((t, t + 1) for t in range(PROMPT, tiny.S))):
        out = advance(batch.tokens[:, start:stop], cache, jnp.int32(start))
        cache = out.cache
        np.testing.assert_allclose(out.logits, full.logits[:, start:stop], atol=1e-4)
        if out.reports.expert.shape[2] == stop - start:  # soft plans report their whole history
            expected = full.reports.expert[:, :, start:stop]
            np.testing.assert_array_equal(out.reports.expert, expected)


def test_greedy_text_is_the_argmax_of_the_full_forward_pass(model):
    batch = tiny.batch(((16,), (16,), (16,)))
    prompt = np.asarray(batch.tokens[0, :PROMPT])
    new = generate(
        bind(model.skeleton, model.params, model.router),
        reference,
        prompt.tolist(),
        length=tiny.S - PROMPT,
        temperature=0.0,
        top_p=1.0,
        key=jax.random.key(0),
        rows=2,
    )
    assert new.shape == (tiny.S - PROMPT,)
    text = np.concatenate([prompt, new])
    full = model(batch._replace(tokens=batch.tokens.at[0].set(text)))
    np.testing.assert_array_equal(new, full.logits[0].argmax(axis=-1)[PROMPT - 1 : -1])


SEQ2SEQ = ("task.name=seq2seq", "model.qk_norm=head")
WIDTH, NEW = 8, 4  # of padded prompts, and tokens after them
SIZES = (8, 3)  # of prompts


def of_pictures(*overrides: str) -> tiny.Model:
    """Prompts may start with two patches."""
    spec = model_spec(tiny.config(*overrides), tiny.VOCAB, stem=Stem("patches", 2, 6))
    skeleton = make_skeleton(spec)
    return tiny.Model(spec, skeleton, *tiny.numbers(skeleton), tiny.run_of(skeleton, EXACT))


def decode(model: tiny.Model, tokens, sizes, more: dict) -> tuple[np.ndarray, np.ndarray]:
    """Prompts in one pass, then one token of each row at a time: logits of the prompt and of those.

    Args:
        model: to run.
        tokens: `[B P + NEW]`, prompts padded to P and what follows them.
        sizes: of the prompts.
        more: fields of the call for the prompts.
    """
    sizes, width = jnp.asarray(sizes), tokens.shape[1] - NEW
    places = jnp.broadcast_to(jnp.arange(width), (len(sizes), width))
    valid = places < sizes[:, None]

    @jax.jit
    def advance(tokens, positions, valid, cache, start, more):
        call = Call(tokens, valid, EXACT, **more)
        bound = bind(model.skeleton, model.params, model.router)
        out = bound(positions, valid.astype(jnp.int32), call, cache, start)
        return out.logits, out.cache

    cache = empty_cache(model.spec, len(sizes), tokens.shape[1])
    positions = jnp.where(valid, places, 0)
    first, cache = advance(tokens[:, :width], positions, valid, cache, jnp.int32(0), more)
    found = []
    for i in range(NEW):
        now = tokens[:, width + i : width + i + 1]
        ones = jnp.ones_like(now, bool)
        place = jnp.int32(width + i)
        logits, cache = advance(now, sizes[:, None] + i, ones, cache, place, {})
        found.append(logits[:, 0])
    return np.asarray(first), np.stack(found, axis=1)


@pytest.mark.parametrize("overrides", [(), ("attention.query_block=4",)])
def test_a_prefix_that_sees_itself_both_ways_is_cached(overrides):
    model = tiny.model(*SEQ2SEQ, *overrides, dispatch=EXACT)
    batch = tiny.batch(((12,), (12,), (12,)))
    prefix = batch.positions < jnp.asarray([8, 3, 6])[:, None]
    prefix = prefix & batch.valid
    full = model(batch, prefix=prefix)
    prompt, rest = decode(model, batch.tokens[:, :12], (8, 8, 8), {"prefix": prefix[:, :8]})
    np.testing.assert_allclose(prompt, full.logits[:, :8], atol=1e-4)
    np.testing.assert_allclose(rest, full.logits[:, 8:12], atol=1e-4)
    causal = model(batch).logits
    assert np.abs(causal - full.logits)[0, 0].max() > 1e-2


@pytest.mark.parametrize("attention", ["full", "routed_heads"])
def test_prompts_of_unequal_length_in_a_batch_are_what_they_are_alone(attention):
    """Full attention with two patches and a prefix."""
    pictures = attention == "full"
    options = SEQ2SEQ if pictures else ()
    model = of_pictures(*options, f"attention.name={attention}")
    rng = np.random.default_rng(3)
    tokens = jnp.asarray(rng.integers(1, tiny.VOCAB, (len(SIZES), WIDTH + NEW)), jnp.int32)
    more = {}
    if pictures:
        places = jnp.broadcast_to(jnp.arange(WIDTH), (len(SIZES), WIDTH))
        more = {
            "prefix": places < jnp.asarray(SIZES)[:, None],
            "modality": (places < 2).astype(jnp.int32),
            "frames": jnp.asarray(rng.normal(size=(len(SIZES), 2, 6)), jnp.float32),
        }
    together = decode(model, tokens, SIZES, more)
    assert takes_padding(model.spec)
    for row, size in enumerate(SIZES):
        own = jnp.concatenate([tokens[row, :size], tokens[row, WIDTH:]])[None]
        cut = {n: a[row : row + 1, : (2 if n == "frames" else size)] for n, a in more.items()}
        prompt, rest = decode(model, own, (size,), cut)
        np.testing.assert_allclose(together[0][row, :size], prompt[0], atol=1e-4)
        np.testing.assert_allclose(together[1][row], rest[0], atol=1e-4)


def test_routers_that_look_back_know_the_kinds_of_earlier_positions():
    """What a gate is told in generation after a picture is what one pass is told."""
    layer = History(*(jnp.zeros(s) for s in ((1, 6, 2), (1, 6), (1, 6))))
    layer = History(layer.inputs, *(a.astype(jnp.int32) for a in layer[1:]))
    told = jnp.asarray([[1, 1, 0]], jnp.int32)
    call = Call(told + 4, told >= 0, EXACT, modality=told)
    layer = layer.with_part(jnp.ones((1, 3, 2)), call, jnp.int32(0))
    layer = layer.with_part(
        jnp.ones((1, 1, 2)), call._replace(tokens=told[:, :1], modality=None), jnp.int32(3)
    )
    np.testing.assert_array_equal(layer.modality, [[1, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(layer.tokens, [[5, 5, 4, 1, 0, 0]])
