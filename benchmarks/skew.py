"""What uneven choices cost: the same executable on tokens that choose evenly and on tokens that do not.

The gate's kernel picks the first `E` features of a token as its logits, and the tokens are made with
the wanted choices there: the router works as ever, and decides what it is told to.
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import layer
from benchmarks.layer import Shape
from benchmarks.rows import Row, times
from benchmarks.timing import interleave, timed
from moe.model.layer import SparseMLP

SHAPE, BOUND = Shape(4096, 256, 1024, 8, 2), 1.2
CASES = {
    "hot": "one expert with half of the tokens",
    "idle": "half of the experts with none",
    "hot and idle": "both at once",
}


def measure(repeats: int, shape: Shape = SHAPE, bound: float = BOUND) -> list[Row]:
    """Every case relative to balanced, forward and backward."""
    run, params = layer.pure(obedient(shape), layer.call_sparse)
    _, cotangent = layer.draw(shape)
    tokens = {case: planted(shape, chosen(shape, case)) for case in ("balanced", *CASES)}
    both = layer.compiled(layer.with_backward(run), params, tokens["balanced"], cotangent)
    took = interleave({c: timed(both, params, x, cotangent) for c, x in tokens.items()}, repeats)
    name = f"{shape} {{}} / balanced"
    return [
        times(name.format(what), took[case], took["balanced"], bound)
        for case, what in CASES.items()
    ]


def obedient(shape: Shape) -> SparseMLP:
    """The sparse layer whose logits are the first `E` features of a token."""
    module = layer.sparse_layer(shape)
    module.gate.kernel[...] = jnp.eye(shape.D, shape.E)
    return module


def chosen(shape: Shape, case: str) -> np.ndarray:
    """`[T K]` int: distinct experts of each token, in an order without rhythm.

    Args:
        shape: `K` experts must be left beside the hot one.
        case: "balanced" or one of CASES.
    """
    T, E, K = shape.T, shape.E, shape.K
    experts = np.arange(E // 2 if "idle" in case else E)
    picks = (np.arange(T)[:, None] * K + np.arange(K)) % experts.size  # as even as can be
    if "hot" in case:  # the others share what is left, and half of the tokens start with expert 0
        picks = 1 + (np.arange(T)[:, None] * K + np.arange(K)) % (experts.size - 1)
        picks[: T // 2, 0] = 0
    return experts[np.random.default_rng(0).permutation(picks)]


def planted(shape: Shape, picks: np.ndarray) -> jax.Array:
    """`[B S D]` normal tokens whose first `E` features are greatest at the chosen experts."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(shape.T, shape.D)).astype(np.float32)
    x[:, : shape.E] = 0.1 * rng.normal(size=(shape.T, shape.E))
    np.put_along_axis(x, picks, 4.0, axis=1)
    return jnp.asarray(x.reshape(layer.ROWS, -1, shape.D))
