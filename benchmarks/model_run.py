"""A model in training on random tokens, by the framework's own `setup` and compiled step."""

import dataclasses
import time
from typing import Any

import jax
import numpy as np

from moe import programs, setup
from moe.config import ConfigDict
from moe.data.store import TokenStore
from moe.data.text import TextData
from moe.data.tokenizers import byte_tokenizer
from moe.data.types import Batch
from moe.training.state import initialize

NO_TEXT = TokenStore(("random",), {}, {}, "random")


def random_run(config: ConfigDict, vocab_size: int | None = None) -> setup.Run:
    """The run of a config, without text: its batches come from `random_batch`.

    Args:
        config: complete.
        vocab_size: of the embedding, at least that of bytes; None is that of bytes.
    """
    tokenizer = byte_tokenizer()
    if vocab_size is not None:
        tokenizer = dataclasses.replace(tokenizer, vocab_size=vocab_size)
    d = config.data
    data = TextData(tokenizer, {}, d.batch_size, d.sequence_length, config.seed, NO_TEXT)
    return setup.set_up(config, data=data)


def random_batch(run: setup.Run) -> Batch:
    """Uniform tokens, each row one document, nothing padded; on the device."""
    d = run.config.data
    size = (d.batch_size, d.sequence_length)
    drawn = np.random.default_rng(0).integers(0, run.spec.vocab_size, (2, *size), np.int32)
    positions = np.broadcast_to(np.arange(d.sequence_length, dtype=np.int32), size)
    batch = Batch(
        tokens=drawn[0],
        targets=drawn[1],
        segments=np.ones(size, np.int32),
        positions=positions,
        valid=np.ones(size, bool),
        domain=np.zeros(size[:1], np.int32),
    )
    return setup.to_device(run.mesh)(batch)


def fresh_state(run: setup.Run) -> Any:
    """The state before the first step."""
    make = jax.jit(
        lambda key: initialize(run.spec, run.transformation, key), out_shardings=run.shardings
    )
    with jax.set_mesh(run.mesh):
        return make(setup.root_key(run.config.seed, 0))


class Training:
    """A compiled step with its state; each call is one more step."""

    def __init__(self, run: setup.Run):
        """Compiles for `run`."""
        self.run, self.batch, self.state = run, random_batch(run), fresh_state(run)
        self._rest = setup.root_key(run.config.seed, 1), programs.hyper(run)
        with jax.set_mesh(run.mesh):
            self.compiled: Any = programs.compile_train_step(run, self.state)

    def __call__(self) -> float:
        """One step on the same batch, to its end; seconds."""
        with jax.set_mesh(self.run.mesh):
            started = time.perf_counter()
            self.state, told = self.compiled(self.state, self.batch, *self._rest)
            jax.block_until_ready((self.state, told))
            return time.perf_counter() - started

    @property
    def text(self) -> str:
        """Of the compiled program."""
        return self.compiled.as_text()

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.batch.tokens.size
