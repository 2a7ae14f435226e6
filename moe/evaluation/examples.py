"""What an evaluation keeps of every row, for metrics that are no quotient of two sums."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import Float, Int
import numpy as np


class Examples(NamedTuple):
    """Rows of a batch, or of a whole split on the host; `n` of them."""

    index: Int[Any, " n"]  # example in its split; -1 in padding rows, and rows of packed text are 0
    domain: Int[Any, " n"]
    nll: Float[Any, " n"]  # nats, summed over the row's predictions
    correct: Float[Any, " n"]  # predictions that hit
    count: Float[Any, " n"]  # predictions; 0 in a padding row
    bytes: Float[Any, " n"]  # that the targets stand for
    label: Int[Any, " n"] | None = None  # class
    prediction: Int[Any, "n ..."] | None = None  # class, or the best path of CTC
    valid: Any = None  # positions of that path [n S]
    embedding: Float[Any, "n 2 D"] | None = None  # of the two segments of a pair


def collect(examples: Examples) -> Examples:
    """Brings the rows of one batch to the host, padding rows left out."""
    host = jax.tree.map(np.asarray, jax.device_get(examples))
    real = host.count > 0
    return jax.tree.map(lambda a: a[real], host)


def join(parts: Sequence[Examples]) -> Examples:
    """All batches of a split as one, in the order in which they were read."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
