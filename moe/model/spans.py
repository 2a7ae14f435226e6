"""Spans of `size` positions inside packed documents, and which of them a token can look back at.

A span is the tokens of one document with the same `position // size`. How many spans a packed row has
depends on its documents, but only the last span of a document can be shorter than `size`, and nothing
of that document comes after it. What a token can look back at are thus complete spans, and a row of
`S` positions has room for at most `S // size` of those, however it is packed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.routing.selection import select


class Places(NamedTuple):
    """Where each token stands."""

    index: Int[Array, "B S"]  # in the row or the cache; what is later is hidden
    position: Int[Array, "B S"]  # in its document, from 0
    document: Int[Array, "B S"]  # 0 is padding


class Spans(NamedTuple):
    """The complete spans of each row in order, `M` slots; unused slots have no members."""

    member: Bool[Array, "B M L"]
    end: Int[Array, "B M"]  # index of the last member
    document: Int[Array, "B M"]  # 0: unused


def places(
    positions: Int[Array, "B S"],
    documents: Int[Array, "B S"],
    length: int | None = None,
    start: Int[Array, ""] | None = None,
) -> tuple[Places, Places]:
    """Places of the queries, and of the keys that they meet.

    Args:
        positions: of the queries in their documents.
        documents: of the queries, 0 for padding.
        length: positions of the cache; None where the queries meet each other.
        start: how many positions of the cache, which holds one document, were filled before these.
    """
    size = documents.shape[1]
    if length is None:
        index = jnp.broadcast_to(jnp.arange(size), documents.shape)
        here = Places(index, positions, documents)
        return here, here
    assert start is not None
    ones = jnp.ones_like(documents)
    index = jnp.broadcast_to(start + jnp.arange(size), documents.shape)
    filled = jnp.broadcast_to(jnp.arange(length), (documents.shape[0], length))
    return Places(index, positions, ones), Places(filled, filled, jnp.ones_like(filled))


def visible(queries: Places, keys: Places) -> Bool[Array, "B S L"]:
    """Earlier tokens of the same document and the token itself; padding sees padding."""
    same = queries.document[:, :, None] == keys.document[:, None, :]
    return same & (keys.index[:, None, :] <= queries.index[:, :, None])


def same_span(queries: Places, keys: Places, size: int | Int[Array, ""]) -> Bool[Array, "B S L"]:
    """Pairs of one document and one span, later keys included."""
    same = queries.document[:, :, None] == keys.document[:, None, :]
    span = queries.position[:, :, None] // size == keys.position[:, None, :] // size
    return same & span


def complete_spans(keys: Places, size: int | Int[Array, ""], count: int) -> Spans:
    """The complete spans of each row.

    Args:
        keys: places of `L` tokens; each document stands in one piece and starts at position 0. In a
            cache, what is not filled yet counts as filled: no query sees the spans that hold it.
        size: tokens a span; may be traced.
        count: `M`, at least `L // size`.
    """
    length = keys.index.shape[1]
    offset = keys.position % size
    last = keys.index + size - 1 - offset  # index of the last token of the span, if it is there
    owner = jnp.take_along_axis(keys.document, jnp.minimum(last, length - 1), axis=1)
    whole = (last < length) & (owner == keys.document) & (keys.document > 0)
    is_end = whole & (offset == size - 1)
    number = jnp.cumsum(is_end, axis=1) - is_end  # complete spans before the token's own
    slot = jnp.arange(count)[None, :, None]
    member = whole[:, None, :] & (number[:, None, :] == slot)
    end = jnp.max(jnp.where(member, keys.index[:, None, :], -1), axis=-1)
    return Spans(member, end, jnp.max(jnp.where(member, keys.document[:, None, :], 0), axis=-1))


def earlier(queries: Places, spans: Spans) -> Bool[Array, "B S M"]:
    """Complete spans of the query's own document that ended before it; its own is not among them."""
    same = queries.document[:, :, None] == spans.document[:, None, :]
    used = (spans.document > 0)[:, None, :]
    return used & same & (spans.end[:, None, :] < queries.index[:, :, None])


def span_means(x: Float[Array, "B L ..."], spans: Spans) -> Float[Array, "B M ..."]:
    """Mean over the members of each span, in float32; 0 for an unused slot."""
    flat = x.astype(jnp.float32).reshape(*x.shape[:2], -1)
    member = spans.member.astype(jnp.float32)
    total = jnp.einsum("bml,blx->bmx", member, flat, precision="highest")
    mean = total / jnp.maximum(member.sum(axis=-1, keepdims=True), 1.0)
    return mean.reshape(*mean.shape[:2], *x.shape[2:])


def best_of(
    scores: Float[Array, "B S H M"], allowed: Bool[Array, "B S #H M"], k: int
) -> Bool[Array, "B S H M"]:
    """Marks the `k` allowed spans of the largest scores, or all where fewer are allowed.

    A tie goes to the earlier span. No gradient reaches the scores.
    """
    batch, size, heads, count = scores.shape
    flat = jnp.where(allowed, scores, -jnp.inf).reshape(batch, size * heads, count)
    best = select(flat, min(k, count)).reshape(batch, size, heads, -1)
    return allowed & jnp.any(jax.nn.one_hot(best, count, dtype=bool), axis=-2)
