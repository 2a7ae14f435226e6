"""A 32-bit digest of every array of a state: the same on any mesh, different after any flipped bit.

Array stores do not check their payload, so a checkpoint carries these digests and a restore
compares them. The digest of an array is the sum, modulo 2**32, of a mix of every element's bits
with the element's index in the whole array. A sum does not ask in which order or on which device
its terms were made; the mix is a bijection of the element's bits, so one changed element always
changes the sum, and many changed elements keep it with a chance of 2**-32. The pass that makes it
sees every value, so it counts those that are not finite as well.
"""

from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Shaped, UInt32

# Odd multipliers and shifts of the xxHash32 avalanche
# (https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md).
_PRIME_1, _PRIME_2, _PRIME_3 = 2654435761, 2246822519, 3266489917


class Summary(NamedTuple):
    """What one pass over an array finds."""

    digest: int
    not_finite: int  # values, modulo 2**32; 0 where the dtype has none


def leaf_names(tree: PyTree) -> list[str]:
    """Names of the leaves, `params/layers/gate/kernel`, in the order of `jax.tree.leaves`."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]


def digest(tree: PyTree) -> dict[str, int]:
    """Digests of all leaves by name. Every process must call it when arrays span processes."""
    return {name: found.digest for name, found in summaries(tree).items()}


def summaries(tree: PyTree) -> dict[str, Summary]:
    """Digest and count of values that are not finite of all leaves by name; called as `digest`."""
    # One program a shape, compiled once for parameter and moments: one for the whole tree takes
    # seconds to compile. One at a time: the reductions of several arrays in flight at once can
    # starve each other of threads on virtual CPU devices and never end.
    found = [
        Summary(*jax.device_get(_summarise(leaf)).tolist())
        for leaf in jax.tree.leaves(jax.block_until_ready(tree))
    ]
    return dict(zip(leaf_names(tree), found, strict=True))


@jax.jit
def _summarise(array: Shaped[Array, "..."]) -> UInt32[Array, " 2"]:
    words = _words(array)
    index = jnp.zeros(words.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(words.ndim)):
        step = jnp.uint32(stride % 2**32)
        index += lax.broadcasted_iota(jnp.uint32, words.shape, axis) * step
        stride *= words.shape[axis]
    mixed = (words ^ (index * jnp.uint32(_PRIME_1))) * jnp.uint32(_PRIME_2)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(_PRIME_3)
    terms = (mixed ^ (mixed >> 13), _not_finite(array, words.shape))
    # One reduction of both: two of them read the array twice.
    zeros = (jnp.uint32(0), jnp.uint32(0))
    totals = lax.reduce(
        terms, zeros, lambda x, y: (x[0] + y[0], x[1] + y[1]), tuple(range(words.ndim))
    )
    return jnp.stack(totals)


def _not_finite(array: Shaped[Array, "..."], shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """1 for each word of `shape` that belongs to a value that is not finite."""
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return jnp.zeros(shape, jnp.uint32)
    wrong = ~jnp.isfinite(array)
    if wrong.shape != shape:  # elements of several words: the first one counts
        wrong = jnp.zeros(shape, bool).at[(..., *(0,) * (len(shape) - wrong.ndim))].set(wrong)
    return wrong.astype(jnp.uint32)


def _words(array: Shaped[Array, "..."]) -> UInt32[Array, "..."]:
    """The bits of the elements as uint32; 8-byte elements become two words on a new last axis."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    if jnp.iscomplexobj(array):
        array = jnp.stack([array.real, array.imag], axis=-1)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[array.dtype.itemsize]
    return lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
