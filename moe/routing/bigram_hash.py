"""Hash layers over bigrams: a token's id and the one before it decide.

Roller et al. 2021 (arXiv:2106.04426).

A table of single ids cannot split a frequent id, whose tokens then cap the balance; the bigrams that end
in it go to many experts. There are too many bigrams for a table of their own, so they share one of fixed
size by a hash of both ids.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped, UInt32
import numpy as np

from moe.errors import ConfigError
from moe.routing import hash
from moe.routing.router import Router
from moe.routing.types import Routing, State


def route(
    logits: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    *,
    k: int,
    token_ids: Int[Array, "B S"],
    documents: Int[Array, "B S"],
    state: State | None = None,
) -> Routing:
    """Sends each token to the `k` experts listed for it and the token before, with gate 1/k each.

    Args:
        logits: only the shape `[B S E]` is read; a layer without a gate passes zeros.
        valid: `[B S]`, True for a real token.
        k: experts a token, the width of the table.
        token_ids: int32 `[B S]`, ids of the input tokens. That of the next token would leak the
            target.
        documents: `[B S]`; the first token of a document has none before it.
        state: `{"table": int32 [buckets K]}`.

    Returns:
        The decision; `logits` are zeros, `probs` is 1/k on the chosen experts.

    Raises:
        ValueError: no table, or one of another width.
    """
    if state is None:
        raise ValueError("bigram hash routing needs its table (state)")
    bucket = bucket_of(token_ids, previous_ids(token_ids, documents), state["table"].shape[0])
    return hash.route(logits, valid, k=k, state=state, token_ids=bucket)


def previous_ids(token_ids: Int[Array, "B S"], documents: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """Returns the id before each token, -1 for the first of a document."""
    same = documents[:, 1:] == documents[:, :-1]
    before = jnp.where(same, token_ids[:, :-1], -1)
    return jnp.pad(before, ((0, 0), (1, 0)), constant_values=-1)


def bucket_of(
    token_ids: Int[Array, "B S"], previous: Int[Array, "B S"], buckets: int
) -> Int[Array, "B S"]:
    """Hashes two ids into `[0, buckets)`: two odd multipliers and the finaliser of MurmurHash3."""
    mixed = _uint(token_ids) * np.uint32(0x9E3779B1) + _uint(previous + 1) * np.uint32(0x85EBCA77)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> np.uint32(shift))) * np.uint32(factor)
    mixed = mixed ^ (mixed >> np.uint32(16))
    return (mixed % np.uint32(buckets)).astype(jnp.int32)


def _uint(ids: Int[Array, "B S"]) -> UInt32[Array, "B S"]:
    return ids.astype(jnp.uint32)


def init_state(
    num_experts: int,
    vocab_size: int,
    k: int,
    key: PRNGKeyArray,
    token_counts: Shaped[np.ndarray, " V"] | None = None,
    *,
    buckets: int = 16384,
) -> State:
    """Draws the table.

    Args:
        num_experts: `E`.
        vocab_size: not used.
        k: different experts listed for each bucket.
        key: decides the table: layers differ by key.
        token_counts: not used; balance comes from the number of bigrams.
        buckets: rows of the table; the more, the fewer bigrams meet in one.

    Returns:
        `{"table": int32 [buckets K]}`; belongs in the checkpoint.
    """
    del vocab_size, token_counts
    draws = jax.random.uniform(key, (buckets, num_experts))
    return {"table": jax.lax.top_k(draws, k)[1]}


def check(num_experts: int, *, k: int, buckets: int = 16384) -> None:
    """Refuses a table that cannot use all experts.

    Raises:
        ConfigError: fewer buckets than experts.
    """
    del k
    if buckets < num_experts:
        raise ConfigError(
            f"router.buckets={buckets} must be at least model.num_experts={num_experts}, and should be "
            "many times that, so that no bucket weighs much; 16384 is the default."
        )


ROUTER = Router(
    route,
    paper="Roller et al. 2021, arXiv:2106.04426",
    equation="S = table[hash(id_t, id_{t-1})], gate = 1/k",
    cost="k experts",
    use="The hash control where single frequent ids would spoil the balance.",
    check=check,
    gate=None,
    causality="C1",
    stateful=True,
    init_state=init_state,
)
