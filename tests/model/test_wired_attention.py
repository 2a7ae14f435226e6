"""Every attention inside the Transformer: packed training form, evaluation, cached generation, options."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.dispatch.table import make_dispatch
from moe.errors import ConfigError
from moe.model.attention_table import ATTENTION
from moe.model.build import model_size, model_spec
from moe.model.layer import Call
from moe.model.transformer import empty_cache
from moe.training.state import bind
from tests import tiny

LAYOUT = ("model.num_layers=2", "model.first_dense=1")
OPTIONS = {
    "full": (),
    "block": ("attention.block=3", "attention.top_k=2"),
    "kmeans": ("attention.clusters=3",),
    "segment": ("attention.size=learned", "attention.mixture=straight_through"),
    "projection_experts": ("attention.experts=6",),
    "routed_heads": ("attention.top_k=1", "attention.shared_heads=2"),
}
EXACT = make_dispatch("reference", None)
FULL = ((16,), (16,), (16,))


def of_kind(name: str, *more: str) -> tiny.Model:
    overrides = (*LAYOUT, "data.sequence_length=16", f"attention.name={name}", *OPTIONS[name])
    return tiny.model(*overrides, *more, dispatch=EXACT)


def test_every_attention_is_tested():
    assert set(OPTIONS) == set(ATTENTION)


@pytest.mark.parametrize("name", ATTENTION)
def test_cached_steps_equal_one_pass_and_nothing_looks_ahead(name):
    model, batch = of_kind(name), tiny.batch(FULL)
    full = model(batch)

    @jax.jit
    def advance(tokens, cache, start):
        positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
        ones = jnp.ones_like(tokens)
        call = Call(tokens, ones.astype(bool), EXACT)
        return bind(model.skeleton, model.params, model.router)(positions, ones, call, cache, start)

    cache = empty_cache(model.spec, tiny.B, tiny.S)
    for start, stop in ((0, 9), *((t, t + 1) for t in range(9, tiny.S))):
        out = advance(batch.tokens[:, start:stop], cache, jnp.int32(start))
        cache = out.cache
        np.testing.assert_allclose(out.logits, full.logits[:, start:stop], atol=1e-4)
    later = jnp.arange(tiny.S) > 7
    tokens = jnp.where(later, (batch.tokens + 7) % tiny.VOCAB, batch.tokens)
    other = model(batch._replace(tokens=tokens))
    np.testing.assert_allclose(other.logits[:, :8], full.logits[:, :8], atol=1e-5)
    assert np.abs(other.logits[:, 8:] - full.logits[:, 8:]).max() > 0.1


@pytest.mark.parametrize("name", ATTENTION)
def test_training_form_learns_and_offers_its_terms(name):
    model, batch = of_kind(name), tiny.batch()

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        call = Call(batch.tokens, batch.valid, EXACT, key=jax.random.key(0), training=True)
        out: Any = bind(model.skeleton, params, model.router)(batch.positions, batch.segments, call)
        assert set(out.terms) == set(ATTENTION[name].terms)
        nll = -jax.nn.log_softmax(out.logits)[..., 0]
        return jnp.where(batch.valid, nll, 0.0).sum() + sum(t.sum() for t in out.terms.values())

    value, gradient = loss(model.params)
    assert np.isfinite(value)
    for leaf in jax.tree.leaves(gradient["blocks"]["layer0"]["attention"]):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 0


def test_terms_are_means_over_all_layers():
    """The dense layers before the pattern count too, and padding adds nothing."""
    model, batch = of_kind("routed_heads"), tiny.batch()
    value = model(batch).terms["head_balance"]
    assert value.shape == (tiny.B, tiny.S)
    assert (np.asarray(value)[~np.asarray(batch.valid)] == 0).all()
    assert (np.asarray(value)[np.asarray(batch.valid)] > 0.5).all()
    flat = jax.tree_util.tree_map_with_path(
        lambda path, a: a * 0 if "gate" in jax.tree_util.keystr(path[-2:]) else a, model.params
    )
    even = model._replace(params=flat)(batch).terms["head_balance"]
    np.testing.assert_allclose(even[batch.valid], 1.0, rtol=1e-5)


def test_noise_of_the_segment_size_is_drawn_in_training_only():
    model, batch = of_kind("segment"), tiny.batch(FULL)
    keys = [jax.random.key(i) for i in range(6)]
    run = jax.jit(lambda key: _train(model, batch, key))
    drawn = np.stack([run(key) for key in keys])
    assert np.abs(drawn - drawn[0]).max() > 0.01
    quiet = [model(batch, key=key).logits for key in keys[:2]]
    np.testing.assert_array_equal(*quiet)


def _train(model, batch, key):
    call = Call(batch.tokens, batch.valid, EXACT, key=key, training=True)
    bound = bind(model.skeleton, model.params, model.router)
    return bound(batch.positions, batch.segments, call).logits


@pytest.mark.parametrize("name", ["full", "projection_experts", "routed_heads"])
def test_a_classifier_reads_later_tokens(name):
    config = tiny.config(f"attention.name={name}", "task.name=classify", "data.sequence_length=16")
    spec = model_spec(config, tiny.VOCAB, classes=3)
    assert not spec.causal
    language = of_kind(name)
    causal, free = (_first_position(language, causal) for causal in (True, False))
    np.testing.assert_allclose(causal[0], causal[1], atol=1e-6)
    assert np.abs(free[0] - free[1]).max() > 1e-3


def _first_position(model: tiny.Model, causal: bool):
    """Logits of position 0 with two texts after it."""
    spec = model.spec._replace(causal=causal)
    skeleton = tiny.make_skeleton(spec)
    batch = tiny.batch(FULL)
    other = batch.tokens.at[:, 1:].set((batch.tokens[:, 1:] + 7) % tiny.VOCAB)

    @jax.jit
    def run(tokens):
        call = Call(tokens, batch.valid, EXACT)
        out = bind(skeleton, model.params, model.router)(batch.positions, batch.segments, call)
        return out.logits[:, 0]

    return run(batch.tokens), run(other)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("attention.name=blok",), "did you mean 'block'"),
        (("attention.name=block", "attention.blocks=3"), "attention.block"),
        (("attention.name=block", "attention.block=300"), "block=300"),
        (("attention.name=kmeans", "attention.mode=top_w"), "allow_noncausal=True"),
        (("attention.name=routed_heads", "attention.top_k=4"), "shared=1"),
        (("attention.name=projection_experts", "model.qk_norm=full"), "qk_norm='full'"),
        (("attention.name=block", "attention.top_k=two"), "int"),
    ],
)
def test_what_cannot_work_is_refused(overrides, words):
    with pytest.raises(ConfigError, match=words):
        model_spec(tiny.config(*overrides), tiny.VOCAB)


def test_another_name_starts_from_its_own_options():
    config = tiny.config("attention.block=8", "attention.name=block")
    assert config.attention.to_dict() == {"name": "block", "block": 8, "top_k": 3}
    assert tiny.config().attention.to_dict() == {"name": "full", "query_block": None}
    classify = tiny.config("attention.name=kmeans", "attention.mode=top_w", "task.name=classify")
    assert model_spec(classify, tiny.VOCAB, classes=2).attention.name == "kmeans"


def test_size_counts_projection_experts():
    """A token meets all of their projections: they are computed for every expert."""
    plain, heads = (
        model_size(model_spec(tiny.config(*overrides), tiny.VOCAB), 16)
        for overrides in ((), ("attention.name=projection_experts", "attention.experts=6"))
    )
    per_layer = 2 * 32 * (6 - 4) * 8 + 2 * 32 * (1 - 2) * 8 + 32 * 6
    assert heads.parameters_total - plain.parameters_total == 2 * per_layer
