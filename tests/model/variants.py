"""What the tests of every kind of attention share: small modules, packed rows, plain arithmetic."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

D, H, Q, X = 8, 4, 2, 4
COMMON = {"qk_norm": "none", "rope_base": 100.0, "norm_eps": 1e-5, "out_scale": 1.0}


def drawn(make, seed: int = 0) -> nnx.Module:
    """The module that `make(rngs)` returns, with numbers drawn by NumPy: nothing compiles."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(params=0))))
    rng = np.random.default_rng(seed)
    draw = jax.tree.map(lambda a: jnp.asarray(rng.uniform(-0.8, 0.8, a.shape), a.dtype), state)
    return nnx.merge(graph, draw)


def attention(kind: type, seed: int = 0, kv_heads: int = Q, **options) -> nnx.Module:
    """A small attention module of class `kind`."""
    arguments = COMMON | options
    return drawn(lambda rngs: kind(D, H, kv_heads, X, rngs=rngs, **arguments), seed)


def inputs(*rows: list[int], size: int = 0, seed: int = 1) -> tuple[jax.Array, ...]:
    """`x`, positions and documents of rows that are packed with documents of these lengths, then padding."""
    size = size or max(map(sum, rows))
    documents, positions = np.zeros((2, len(rows), size), np.int32)
    for row, lengths in enumerate(rows):
        start = 0
        for number, length in enumerate(lengths, start=1):
            documents[row, start : start + length] = number
            positions[row, start : start + length] = np.arange(length)
            start += length
    x = np.random.default_rng(seed).normal(size=(len(rows), size, D)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(positions), jnp.asarray(documents)


def plain_heads(full, x, positions) -> tuple[np.ndarray, ...]:
    """Rotated queries, keys and values [B S H X] in float64, keys repeated for every query head."""
    turned = full.rotated(full.heads(x), positions)
    q, k, v = (np.asarray(a, np.float64) for a in turned)
    return q, *(a.repeat(q.shape[2] // a.shape[2], axis=2) for a in (k, v))


def plain_softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def plain_output(full, out: np.ndarray) -> np.ndarray:
    return np.einsum("bshx,hxd->bsd", out, np.asarray(full.wo[...], np.float64))


def future_leaks(module, x, positions, documents, at: int) -> tuple[float, float]:
    """How far a change of all inputs after `at` moves the outputs up to it, and those after it."""
    other = x.at[:, at + 1 :].set(np.random.default_rng(9).normal(size=x[:, at + 1 :].shape))
    call = jax.jit(lambda x: module(x, positions, documents).output)
    moved = np.abs(call(x) - call(other))
    return moved[:, : at + 1].max(), moved[:, at + 1 :].max()


def cached_equals_full(module, cache, length: int, prompt: int, atol: float = 1e-5) -> None:
    """Runs a prompt, then one token at a time, and compares with the pass over everything."""
    x, positions, documents = inputs([length], [length])
    full = jax.jit(lambda x: module(x, positions, documents).output)(x)

    @jax.jit
    def advance(x, cache, start):
        at = jnp.broadcast_to(start + jnp.arange(x.shape[1]), x.shape[:2])
        return module(x, at, jnp.ones_like(at), cache, start)

    for start, stop in ((0, prompt), *((t, t + 1) for t in range(prompt, length))):
        out = advance(x[:, start:stop], cache, jnp.int32(start))
        cache = out.cache
        np.testing.assert_allclose(out.output, full[:, start:stop], atol=atol)
