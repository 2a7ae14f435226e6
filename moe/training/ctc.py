"""Connectionist temporal classification (Graves et al., 2006): labels without their places in time."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np
import optax

from moe.data.types import Batch


def ctc_rows(logits: Float[Array, "B S V"], batch: Batch, *, blank: int) -> Float[Array, " B"]:
    """Negative log-likelihood of each row's labels, summed over all of their alignments, in nats.

    Whoever makes the rows refuses labels longer than the frames allow
    (`moe.data.audio.alignment_frames`): here they would cost about 1e5 nats. A row without frames
    and labels costs nothing.

    Args:
        logits: of every position of the encoder.
        batch: `targets[:U]` where `scored` are the labels, `valid` the positions with sound; both
            start at the first position.
        blank: id that stands for no label, the tokenizer's boundary.

    Returns:
        float32.
    """
    if batch.scored is None:
        raise ValueError("CTC needs batch.scored: it says which targets are labels.")
    # optax picks the log-probabilities of labels by a product, which TPUs round to bfloat16.
    with jax.default_matmul_precision("highest"):
        return optax.ctc_loss(
            logits.astype(jnp.float32),
            1 - batch.valid.astype(jnp.float32),
            batch.targets,
            1 - batch.scored.astype(jnp.float32),
            blank_id=blank,
        )


def ctc_matches(path: Int[Array, "B S"], batch: Batch, *, blank: int) -> Bool[Array, " B"]:
    """Whether the labels of a path are exactly those of the row; `ctc_greedy` inside jit.

    Args:
        path: an id at each position.
        batch: as for `ctc_rows`.
        blank: id that stands for no label.
    """
    assert batch.scored is not None
    before = jnp.pad(path, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    starts = (path != before) & (path != blank) & batch.valid
    B, S = path.shape
    place = jnp.where(starts, jnp.cumsum(starts, axis=1) - 1, S)  # S is dropped
    labels = jnp.zeros_like(path).at[jnp.arange(B)[:, None], place].set(path, mode="drop")
    same = jnp.where(batch.scored, labels == batch.targets, True).all(axis=1)
    return same & (starts.sum(axis=1) == batch.scored.sum(axis=1))


def ctc_greedy(
    path: Int[np.ndarray, " S"], valid: Bool[np.ndarray, " S"], blank: int
) -> Int[np.ndarray, " U"]:
    """Labels of the most likely id at each position: repeats are one label, blanks none."""
    path = path[valid]
    starts = np.ones(path.size, bool)
    starts[1:] = path[1:] != path[:-1]
    return path[starts & (path != blank)]
