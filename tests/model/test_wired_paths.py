"""Layers that tokens pass by, layers left out and jumps between layers, inside the whole model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import ConfigError
from moe.evaluation import causality
from moe.model.build import model_size, model_spec
from tests import tiny
from tests.model import wired

DEPTH = ("allow_noncausal=true", "model.pattern=depth_sparse,depth", "model.depth_capacity=0.5")
OFF = ("paths.survival=0.5", "paths.schedule=constant")


def test_depth_sends_a_share_in_training_and_teaches_the_predictor():
    model, batch = wired.model(*DEPTH), tiny.batch(wired.FULL)
    gradient, out = wired.gradients(model, batch)
    wired.assert_learns(gradient["blocks"])
    assert out.terms["predictor"].shape == (tiny.B, tiny.S)
    went = (np.asarray(out.reports.expert) >= 0).any(axis=-1)
    np.testing.assert_array_equal(went.sum(axis=-1), 8)
    np.testing.assert_array_equal(out.reports.row_tokens, 8)


def test_depth_sees_ahead_in_training_alone():
    model, batch = wired.model(*DEPTH), tiny.batch(wired.FULL)
    wired.check_causal(model)
    wired.check_cached(model)
    run = jax.jit(lambda tokens: wired.train(model, batch._replace(tokens=tokens), None).reports)
    later = jnp.arange(tiny.S) > 7
    others = [jnp.where(later, (batch.tokens + n) % tiny.VOCAB, batch.tokens) for n in range(1, 6)]
    before = np.asarray(run(batch.tokens).expert)[:, :, :8]
    assert any((np.asarray(run(t).expert)[:, :, :8] != before).any() for t in others)


def test_depth_with_heads_as_experts_generates_too():
    wired.check_cached(wired.model(*DEPTH, "attention.name=routed_heads", "attention.top_k=1"))


def test_a_classifier_chooses_by_the_whole_row_in_evaluation_too():
    config = tiny.config("task.name=classify", *DEPTH[1:], "data.sequence_length=16")
    assert not model_spec(config, tiny.VOCAB, classes=2).causal


def test_size_of_a_depth_layer_is_scaled():
    """Half of the tokens: half of the matrices and a quarter of the attention."""
    dense, depth = (
        model_size(model_spec(tiny.config(*more), tiny.VOCAB), 15)
        for more in (("model.pattern=dense",), ("model.pattern=depth", *DEPTH[::2]))
    )
    layer = 32 * 8 * (4 + 2 + 2) + 32 * 32 + 3 * 32 * 64
    extra = 32 + 32 * 8 + 8  # router and predictor, which all tokens meet
    norms = 2 * 32
    assert depth.parameters_total == dense.parameters_total + 2 * (extra + 1)
    assert depth.parameters_active == dense.parameters_active + 2 * (
        extra + 1 - (layer + norms) / 2
    )
    scores = 2 * 2 * 32 * 8
    more = 2 * (2 * (extra - layer / 2) - 0.75 * scores)
    assert depth.flops_per_token == dense.flops_per_token + more


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_a_layer_left_out_reports_nobody(scope):
    model, batch = wired.model(*OFF, f"paths.scope={scope}"), tiny.batch()
    run = jax.jit(lambda key: wired.train(model, batch, key))
    kept = []
    for seed in range(8):
        out = run(jax.random.key(seed))
        assert np.isfinite(out.logits).all()
        expert = np.asarray(out.reports.expert)
        ran = np.asarray(out.reports.row_tokens) > 0  # [L B]
        np.testing.assert_array_equal((expert >= 0).any(axis=(2, 3)), ran)
        np.testing.assert_array_equal(
            np.asarray(out.reports.row_requested).sum(axis=-1),
            2 * ran * np.asarray(batch.valid).sum(axis=1),
        )
        kept.append(ran)
    kept = np.stack(kept)
    assert 0 < kept.mean() < 1
    assert (kept[..., :1] == kept).all() == (scope == "batch")
    assert (kept[:, 0] != kept[:, 1]).any(), "each layer has a draw of its own"


def test_rows_whose_layers_are_all_left_out_are_the_embedding():
    model, batch = wired.model(*OFF, "paths.scope=sequence"), tiny.batch()
    run = jax.jit(lambda key: wired.train(model, batch, key))
    for seed in range(20):
        out = run(jax.random.key(seed))
        alone = ~(np.asarray(out.reports.row_tokens) > 0).any(axis=0)
        if alone.any():
            break
    x = np.asarray(model.params["embedding"])[np.asarray(batch.tokens)]
    scale = np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5)
    expected = x / scale * np.asarray(model.params["norm"]["scale"]) @ model.params["head"]
    np.testing.assert_allclose(out.logits[alone], expected[alone], atol=1e-4)


def test_evaluation_and_survival_one_leave_nothing_out():
    model, plain, batch = wired.model(*OFF), wired.model(), tiny.batch()
    np.testing.assert_array_equal(model(batch).logits, plain(batch).logits)
    gradient, _ = wired.gradients(wired.model(*OFF, "paths.scope=sequence"), batch)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_a_recurrent_gate_keeps_its_memory_over_a_skipped_layer():
    model, batch = wired.model(*OFF, "router.name=recurrent"), tiny.batch()
    gradient, out = wired.gradients(model, batch, seed=3)
    assert np.isfinite(out.logits).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("mode", ["bernoulli", "single"])
def test_jumps_learn_stay_causal_and_generate(mode):
    model = wired.model("model.num_layers=3", "paths.jump=0.5", f"paths.jump_mode={mode}")
    wired.check_causal(model)
    wired.check_cached(model)
    batch = tiny.batch()
    run = jax.jit(lambda key: wired.train(model, batch, key).logits)
    drawn = [run(jax.random.key(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.abs(drawn[0] - drawn[2]).max() > 0.01
    scales = jax.tree.map(np.zeros_like, model.params["blocks"]["layer0"]["jump"])
    params = {
        **model.params,
        "blocks": {"layer0": model.params["blocks"]["layer0"] | {"jump": scales}},
    }
    plain = wired.model("model.num_layers=3")
    bare = {n: v for n, v in params["blocks"]["layer0"].items() if n != "jump"}
    expected = plain._replace(params={**params, "blocks": {"layer0": bare}})(batch).logits
    np.testing.assert_allclose(model._replace(params=params)(batch).logits, expected, atol=1e-5)
    assert np.abs(model(batch).logits - expected).max() > 0.01


def test_without_a_jump_rate_there_is_no_parameter():
    assert "jump" not in wired.model().params["blocks"]["layer0"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("model.pattern=depth",), "allow_noncausal=True"),
        ((*DEPTH, "attention.name=block"), "attention.name='full'"),
        ((*DEPTH, "router.name=segment", "router.segment_size=4"), "reads earlier tokens"),
        ((*DEPTH, "model.conv_experts=1"), "reads earlier tokens"),
        ((*DEPTH[:2], "model.depth_capacity=1.5"), r"capacity 1\.5"),
        (("paths.survival=0.0",), "paths.survival=0.0"),
        (("paths.jump=2.0",), "paths.jump=2.0"),
        (("paths.scope=token",), "paths.scope='token'"),
    ],
)
def test_what_cannot_work_is_refused(overrides, words):
    with pytest.raises(ConfigError, match=words):
        model_spec(tiny.config(*overrides), tiny.VOCAB)


def test_who_may_generate_and_who_has_two_forms():
    depth, top_w = (
        model_spec(tiny.config("allow_noncausal=true", *more), tiny.VOCAB)
        for more in (DEPTH, ("attention.name=kmeans", "attention.mode=top_w"))
    )
    causality.check_generation(depth)
    assert causality.has_causal_gap(depth)
    assert not causality.has_causal_gap(top_w)
    with pytest.raises(ConfigError, match=r"attention\.name='kmeans' cannot generate"):
        causality.check_generation(top_w)
