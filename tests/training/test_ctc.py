import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.data.audio import alignment_frames
from moe.data.types import Batch
from moe.training.ctc import ctc_greedy, ctc_matches, ctc_rows

BLANK = 3
VOCABULARY = 4
LABELS = [[0, 2], [1, 1], [2], [], [0, 0], [1, 0]]  # 0 is what padding of targets is, too
FRAMES = [4, 3, 5, 2, 5, 2]
LENGTH = 5


def batch_of(labels, frames, length):
    targets = np.zeros((len(labels), length), np.int32)
    scored = np.zeros((len(labels), length), bool)
    for row, ids in enumerate(labels):
        targets[row, : len(ids)] = ids
        scored[row, : len(ids)] = True
    places = np.arange(length)[None, :]
    valid = places < np.array(frames)[:, None]
    none = np.zeros_like(targets)
    return Batch(none, targets, none, none, valid, none[:, 0], scored=scored)


def logits_of(length):
    shape = (len(LABELS), length, VOCABULARY)
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def collapse(path):
    """Labels of an alignment, by their definition: merge repeats, then drop blanks."""
    merged = [k for k, _ in itertools.groupby(path)]
    return [k for k in merged if k != BLANK]


def brute_force(logits, labels, frames):
    """Minus the logarithm of the summed probability of every path that collapses to the labels."""
    scores = logits[:frames].astype(np.float64)
    logs = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    paths = itertools.product(range(VOCABULARY), repeat=frames)
    likelihoods = [
        np.exp(sum(logs[t, k] for t, k in enumerate(path)))
        for path in paths
        if collapse(path) == labels
    ]
    return -np.log(sum(likelihoods))


rows_of = jax.jit(lambda logits, batch: ctc_rows(logits, batch, blank=BLANK))


def test_rows_agree_with_the_sum_over_all_alignments():
    logits = logits_of(LENGTH)
    rows = rows_of(logits, batch_of(LABELS, FRAMES, LENGTH))
    assert rows.dtype == jnp.float32
    expected = [brute_force(*row) for row in zip(logits, LABELS, FRAMES, strict=True)]
    np.testing.assert_allclose(rows, expected, rtol=1e-5)


def test_padding_changes_nothing():
    short = rows_of(logits_of(LENGTH), batch_of(LABELS, FRAMES, LENGTH))
    logits = np.full((len(LABELS) + 1, LENGTH + 4, VOCABULARY), 7.0, np.float32)
    logits[:-1, :LENGTH] = logits_of(LENGTH)
    logits[:-1, LENGTH:, 1] = -50
    long = rows_of(logits, batch_of([*LABELS, []], [*FRAMES, 0], LENGTH + 4))
    np.testing.assert_allclose(long[:-1], short, rtol=1e-6)
    assert long[-1] == 0  # a row of padding


def test_gradients_by_finite_difference():
    logits, batch = logits_of(LENGTH).astype(np.float64), batch_of(LABELS, FRAMES, LENGTH)
    weights = np.arange(1.0, len(LABELS) + 1)

    def total(logits):
        return float(
            weights @ [brute_force(*row) for row in zip(logits, LABELS, FRAMES, strict=True)]
        )

    loss = jax.jit(jax.grad(lambda z: jnp.vdot(weights, ctc_rows(z, batch, blank=BLANK))))
    gradient = np.asarray(loss(logits.astype(np.float32)))
    draw = np.random.default_rng(2)
    for _ in range(3):
        direction = draw.normal(size=logits.shape)
        step = 1e-4 * direction
        difference = (total(logits + step) - total(logits - step)) / 2e-4
        np.testing.assert_allclose(np.vdot(gradient, direction), difference, rtol=1e-3)
    invalid = ~np.asarray(batch.valid)
    assert not gradient[invalid].any()


def test_half_precision_logits_are_summed_in_float32():
    logits = logits_of(LENGTH).astype(jnp.bfloat16)
    batch = batch_of(LABELS, FRAMES, LENGTH)
    rows = ctc_rows(jnp.asarray(logits), batch, blank=BLANK)
    np.testing.assert_array_equal(rows, rows_of(logits.astype(np.float32), batch))


def test_labels_that_do_not_fit_cost_far_more_than_any_that_do():
    labels = [[1, 1, 1]]
    assert alignment_frames(labels[0]) == 5
    fits, not_quite = (
        float(rows_of(logits_of(LENGTH)[:1], batch_of(labels, [n], LENGTH))[0]) for n in (5, 4)
    )
    assert fits < 100
    assert not_quite > 1e4


def test_without_labels_is_a_mistake():
    batch = batch_of(LABELS, FRAMES, LENGTH)._replace(scored=None)
    with pytest.raises(ValueError, match=r"batch\.scored"):
        ctc_rows(jnp.zeros((len(LABELS), LENGTH, VOCABULARY)), batch, blank=BLANK)


def test_greedy_collapses_every_path():
    for path in itertools.product(range(VOCABULARY), repeat=4):
        found = ctc_greedy(np.array([*path, 1, 2]), np.arange(6) < 4, BLANK)
        assert found.tolist() == collapse(path)
    assert ctc_greedy(np.array([1, 2]), np.zeros(2, bool), BLANK).size == 0


def test_matches_are_what_the_greedy_labels_say():
    paths = np.array(list(itertools.product(range(VOCABULARY), repeat=4)), np.int32)
    paths = np.pad(paths, ((0, 0), (0, 1)), constant_values=2)  # behind the last frame
    for labels in LABELS:
        batch = batch_of([labels] * len(paths), [4] * len(paths), LENGTH)
        found = np.asarray(ctc_matches(jnp.asarray(paths), batch, blank=BLANK))
        expected = [
            ctc_greedy(path, valid, BLANK).tolist() == labels
            for path, valid in zip(paths, batch.valid, strict=True)
        ]
        assert any(expected)
        np.testing.assert_array_equal(found, expected)
