"""Generation with a key/value cache sees what the full forward pass sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.dispatch.reference import reference
from moe.dispatch.table import make_dispatch
from moe.evaluation.generate import generate
from moe.model.layer import Call
from moe.model.transformer import empty_cache
from moe.training.state import bind
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
