"""A model small enough to compile in a second, its numbers without compiling, and packed batches."""

from collections.abc import Sequence
import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from configs import models
from moe.cli import complete_config
from moe.config import ConfigDict, default_config
from moe.data.types import Batch
from moe.dispatch.reference import reference
from moe.model.build import model_spec
from moe.model.layer import Call
from moe.model.transformer import ModelOutput, ModelSpec
from moe.training.state import Skeleton, bind, make_skeleton

VOCAB, B, S = 48, 3, 16


def config(*overrides: str) -> ConfigDict:
    """The defaults with `models.tiny()` and overrides as on the command line."""
    base = default_config()
    base.model.update(models.tiny())
    pairs = [override.split("=", 1) for override in overrides]
    return complete_config(base, [(key, text) for key, text in pairs])


def numbers(skeleton: Skeleton, seed: int = 0) -> tuple[dict, dict]:
    """Parameters and router state drawn by NumPy: nothing compiles."""
    rng = np.random.default_rng(seed)
    params = {}
    for path, variable in nnx.to_flat_state(skeleton.params):
        shape = variable.get_value().shape
        value = rng.normal(size=shape)
        if path[-1] == "scale":
            value = 1.0 + 0.1 * value
        elif path[-1] != "embedding":
            value = value * (0.7 if "gate" in path else 0.3)
        params[path] = nnx.Param(jnp.asarray(value, jnp.float32))
    router = {}
    for path, variable in nnx.to_flat_state(skeleton.router):
        leaf = variable.get_value()
        if path[-1] == "table":  # [repeats V K], k different experts for each id
            value = rng.random((*leaf.shape[:2], 8)).argsort(axis=-1)[..., : leaf.shape[2]]
        else:
            value = 0.1 * rng.normal(size=leaf.shape)
        router[path] = nnx.Variable(jnp.asarray(value, leaf.dtype))
    return _pure(params), _pure(router)


def _pure(flat: dict) -> dict:
    return nnx.to_pure_dict(nnx.from_flat_state(list(flat.items())))


class Model(NamedTuple):
    spec: ModelSpec
    skeleton: Skeleton
    params: dict
    router: dict
    forward: Any  # jitted (params, router, batch, call) -> ModelOutput

    def __call__(self, batch: Batch, **call: Any) -> Any:
        """Runs the compiled forward pass; `call` are fields of `Call`. Returns a `ModelOutput`."""
        return self.forward(self.params, self.router, batch, call)


@functools.cache
def model(*overrides: str, dispatch: Any = reference) -> Model:
    """The model of a config; compiled once for all tests that ask for the same one."""
    spec = model_spec(config(*overrides), VOCAB)
    skeleton = make_skeleton(spec)
    return Model(spec, skeleton, *numbers(skeleton), run_of(skeleton, dispatch))


def run_of(skeleton: Skeleton, dispatch: Any) -> Any:
    """The jitted `Model.forward`."""

    def forward(params: dict, router: dict, batch: Batch, fields: dict) -> ModelOutput:
        call = Call(batch.tokens, batch.valid, dispatch, **fields)
        return bind(skeleton, params, router)(batch.positions, batch.segments, call)

    return jax.jit(forward)


def batch(lengths: Sequence[Sequence[int]] = ((16,), (7, 6), (11,)), seed: int = 0) -> Batch:
    """A row for each entry, packed with documents of these lengths, then padding."""
    rng = np.random.default_rng(seed)
    shape = (len(lengths), S)
    tokens, targets = rng.integers(1, VOCAB, shape), rng.integers(1, VOCAB, shape)
    segments, positions = np.zeros(shape, int), np.zeros(shape, int)
    for row, documents in enumerate(lengths):
        start = 0
        for number, length in enumerate(documents, start=1):
            segments[row, start : start + length] = number
            positions[row, start : start + length] = np.arange(length)
            start += length
    valid = segments > 0
    ints = [jnp.asarray(a * valid, jnp.int32) for a in (tokens, targets, segments, positions)]
    domain = jnp.arange(len(lengths), dtype=jnp.int32) % 2
    return Batch(*ints, jnp.asarray(valid), domain)
