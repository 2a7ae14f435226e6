"""Continues one prompt, greedy or sampled with temperature and top-p."""

from collections.abc import Sequence

from jaxtyping import Array, Int, Key
import numpy as np

from moe.dispatch.types import Dispatch
from moe.errors import ConfigError
from moe.evaluation.decode import Decoding, Prompts, check_decoding, decode, sample, until
from moe.model.transformer import Transformer

__all__ = ["check_numbers", "generate", "sample", "until"]


def generate(
    model: Transformer,
    dispatch: Dispatch,
    prompt: Sequence[int],
    *,
    length: int,
    temperature: float,
    top_p: float,
    key: Key[Array, ""],
    rows: int = 1,
) -> Int[np.ndarray, " N"]:
    """Samples `length` tokens after the prompt; document boundaries are tokens like others.

    Args:
        model: with its numbers.
        dispatch: how tokens reach experts; causal routers only.
        prompt: at least one token.
        length: tokens to add.
        temperature: 0 takes the most likely token.
        top_p: samples from the smallest set of tokens whose probability reaches this; 1 is all.
        key: the same key gives the same text.
        rows: copies of the prompt, so that a batch-sharded mesh has one for each shard.

    Raises:
        ConfigError: a model that cannot generate, an empty prompt, or numbers out of range.
    """
    check_numbers(length=length, temperature=temperature, top_p=top_p)
    if len(prompt) == 0:
        raise ConfigError("generation needs a prompt of at least one token.")
    tokens = np.tile(np.asarray(prompt, np.int32)[None], (rows, 1))
    prompts = Prompts(tokens, np.full(rows, len(prompt), np.int32))
    decoding = _decoding(length, temperature, top_p)
    return decode(model, dispatch, prompts, decoding, key, boundary=None)[0]


def check_numbers(*, length: int, temperature: float, top_p: float) -> None:
    """Raises ConfigError for a number that is out of range."""
    check_decoding(_decoding(length, temperature, top_p))


def _decoding(length: int, temperature: float, top_p: float) -> Decoding:
    return Decoding("sample", length=length, temperature=temperature, top_p=top_p)
