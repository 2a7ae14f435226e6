"""The classifier's pooling of rows: mean, or weights over segments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import ConfigError
from moe.model.build import model_size, model_spec
from moe.training.state import make_skeleton
from tests import tiny
from tests.model import wired

SEGMENT = ("task.name=classify", "task.pool=segment", "model.num_layers=1")


def classifier(*overrides: str) -> tiny.Model:
    config = tiny.config("data.sequence_length=16", *overrides)
    spec = model_spec(config, tiny.VOCAB, classes=3)
    skeleton = make_skeleton(spec)
    params, router = tiny.numbers(skeleton)
    return tiny.Model(spec, skeleton, params, router, tiny.run_of(skeleton, wired.EXACT))


@pytest.mark.parametrize("size", ["ratio", "fixed", "learned", "content"])
def test_segment_pooling_learns_in_training_form(size):
    options = (f"task.size={size}", "task.segment=5", "task.mixture=straight_through")
    model, batch = classifier(*SEGMENT, *options), tiny.batch()
    gradient, out = wired.gradients(model, batch)
    assert out.logits.shape == (tiny.B, 3)
    wired.assert_learns({n: gradient[n] for n in ("head", "pool", "embedding")})
    assert np.isfinite(model(batch).logits).all()


def test_padding_changes_nothing_and_later_segments_count():
    model, batch = classifier(*SEGMENT), tiny.batch()
    junk = jnp.where(batch.valid, batch.tokens, 5)
    out = model(batch).logits
    np.testing.assert_array_equal(model(batch._replace(tokens=junk)).logits, out)
    last = batch.tokens.at[0, 15].add(1)
    assert np.abs(model(batch._replace(tokens=last)).logits[0] - out[0]).max() > 1e-3


def test_the_size_is_drawn_in_training_only():
    model = classifier(*SEGMENT, "task.size=learned", "task.mixture=straight_through")
    batch = tiny.batch(wired.FULL)
    run = jax.jit(lambda key: wired.train(model, batch, key).logits)
    drawn = np.stack([run(jax.random.key(seed)) for seed in range(6)])
    assert np.abs(drawn - drawn[0]).max() > 1e-3
    quiet = [model(batch, key=jax.random.key(seed)).logits for seed in (0, 1)]
    np.testing.assert_array_equal(*quiet)


def test_the_mean_has_no_parameter_of_its_own():
    mean, segment = (
        model_size(model_spec(tiny.config(*more), tiny.VOCAB, classes=3), 16)
        for more in (SEGMENT[::2], SEGMENT)
    )
    encoder = 32 * 8 * (4 + 2 + 2) + 32 * 32
    assert segment.parameters_total == mean.parameters_total + encoder + 32 * 8 + 8


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("task.pool=segment",), "task.name='classify'"),
        (("task.name=classify", "task.pool=max"), "task.pool='max'"),
        ((*SEGMENT, "task.ratio=0.7"), "ratio=0.7"),
        ((*SEGMENT, "task.summary=first"), "pool='first'"),
    ],
)
def test_what_cannot_work_is_refused(overrides, words):
    with pytest.raises(ConfigError, match=words):
        model_spec(tiny.config(*overrides), tiny.VOCAB)
