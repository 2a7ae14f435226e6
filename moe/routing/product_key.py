"""Product-key retrieval: E experts on a grid, found by the best rows and the best columns.

He 2024, "Mixture of A Million Experts" (PEER, arXiv:2407.04153), after Lample et al. 2019
(arXiv:1907.05242). Differs from PEER in two ways.

* A query is normalised by itself (layer norm without scale), not over the batch: batch statistics
  would let every token of a training batch, later ones included, decide where a token goes (C3).
* Losses and metrics want every expert's logit, so `[B S E]` sums of two numbers are formed beside
  the search, which does not read them.
"""

import math

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.errors import ConfigError
from moe.routing.gates import Gated
from moe.routing.router import Router
from moe.routing.selection import gather, select
from moe.routing.types import Choices, Routing
from moe.routing.variable_k import variable_choices


class ProductKeyGate(nnx.Module):
    """Two half scores for each head: `q = LN(W_h x) = [q1; q2]`, `q1 . c_i` and `q2 . c'_j`.

    Args:
        width: model width `D`.
        num_experts: `E`, a square.
        rngs: its `params` stream draws queries from normal(0, D^-1/2) and keys from
            normal(0, (key_dim / 2)^-1/2), so that half scores start at unit scale.
        heads: `H`; all search the same keys.
        key_dim: size of a query, even; 0 stands for D, or D + 1.

    Attributes:
        query: float32 `[D H key_dim]`.
        row_keys: float32 `[sqrt(E) key_dim/2]`.
        column_keys: float32 `[sqrt(E) key_dim/2]`.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        rngs: nnx.Rngs,
        heads: int = 1,
        key_dim: int = 0,
    ):
        key_dim = key_dim or width + width % 2
        side, half = math.isqrt(num_experts), key_dim // 2
        normal = nnx.initializers.normal
        query = normal(width**-0.5)(rngs.params(), (width, heads, key_dim), jnp.float32)
        rows, columns = (
            normal(half**-0.5)(rngs.params(), (side, half), jnp.float32) for _ in range(2)
        )
        self.query = nnx.Param(query, axes=("D", None, None))
        self.row_keys = nnx.Param(rows, axes=(None, None))
        self.column_keys = nnx.Param(columns, axes=(None, None))

    def __call__(self, tokens: Float[Array, "B S D"]) -> Gated:
        """Scores rows and columns for every token, in float32.

        Returns:
            `row_scores` and `column_scores [B S H sqrt(E)]`; as logits, their sums at each place
            of the grid, averaged over heads.
        """
        highest = jax.lax.Precision.HIGHEST
        tokens, query = tokens.astype(jnp.float32), self.query[...]
        query = jnp.einsum("bsd,dhx->bshx", tokens, query, precision=highest)
        first, second = jnp.split(jax.nn.standardize(query, epsilon=1e-6), 2, axis=-1)
        rows = jnp.einsum("bshx,nx->bshn", first, self.row_keys[...], precision=highest)
        columns = jnp.einsum("bshx,nx->bshn", second, self.column_keys[...], precision=highest)
        logits = on_grid(rows, columns, jnp.add).mean(axis=2)
        return Gated(logits, {"row_scores": rows, "column_scores": columns})


def on_grid(rows: Float[Array, "B S H N"], columns: Float[Array, "B S H N"], combine) -> Array:
    """Combines every row with every column: `[B S H E]`, expert `i * N + j` at row i, column j."""
    B, S, H, N = rows.shape
    return combine(rows[..., :, None], columns[..., None, :]).reshape(B, S, H, N * N)


def route(
    logits: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    *,
    k: int,
    row_scores: Float[Array, "B S H N"],
    column_scores: Float[Array, "B S H N"],
) -> Routing:
    """Finds `k / H` experts for each of `H` heads without comparing all `E`.

    Gates are a softmax over each head's scores, so a token's sum to H, as the heads' outputs are
    summed in PEER (h heads of k experts there are `k = h k` here). An expert that several heads
    found is named once, with the sum of its gates; the other entries are then not valid.

    Args:
        logits: float32 `[B S E]`, for losses and metrics only.
        valid: `[B S]`, True for a real token.
        k: experts a token, all heads together; a multiple of H.
        row_scores: float32 `[B S H sqrt(E)]`.
        column_scores: float32 `[B S H sqrt(E)]`.

    Returns:
        The decision; `probs` is the mean over heads of the softmax over all experts, which is the
        product of the softmaxes of rows and columns.
    """
    B, S, H, N = row_scores.shape
    rows, columns = (x.reshape(B, S * H, N) for x in (row_scores, column_scores))
    expert = retrieve(rows, columns, k // H)
    score = gather(rows, expert // N) + gather(columns, expert % N)
    gate = jax.nn.softmax(score).reshape(B, S, k)
    halves = (jax.nn.softmax(x) for x in (row_scores, column_scores))
    probs = on_grid(*halves, jnp.multiply).mean(axis=2)
    return Routing(logits, probs, merge(expert.reshape(B, S, k), gate, valid))


def retrieve(rows: Float[Array, "B S N"], columns: Float[Array, "B S N"], k: int) -> Array:
    """Returns the `k` experts `i * N + j` of the largest `rows_i + columns_j`: int32 `[B S k]`.

    Any of them lies in one of the k best rows and one of the k best columns, so only the k^2
    places where those cross are compared.
    """
    B, S, N = rows.shape
    m = min(k, N)
    row, column = select(rows, m), select(columns, m)  # [B S m]
    places = (row[..., :, None] * N + column[..., None, :]).reshape(B, S, m * m)
    sums = gather(rows, row)[..., :, None] + gather(columns, column)[..., None, :]
    best = select(sums.reshape(B, S, m * m), k)
    chosen = jax.nn.one_hot(best, m * m, dtype=bool)  # [B S k m*m]
    return jnp.where(chosen, places[..., None, :], 0).sum(axis=-1)


def merge(
    expert: Int[Array, "B S K"], gate: Float[Array, "B S K"], valid: Bool[Array, "B S"]
) -> Choices:
    """Adds the gates of equal experts into the first entry that names them."""
    same = expert[..., :, None] == expert[..., None, :]  # [B S K K]
    total = jnp.where(same, gate[..., None, :], 0.0).sum(axis=-1)
    earlier = jnp.tril(jnp.ones_like(same), -1)
    return variable_choices(expert, total, ~(same & earlier).any(axis=-1), valid)


def check(num_experts: int, *, k: int, heads: int = 1, key_dim: int = 0) -> None:
    """Refuses experts that are not on a square grid and heads that do not share k.

    Raises:
        ConfigError: E is no square, `heads` does not divide k into at least 2 each, or `key_dim`
            is odd.
    """
    side = math.isqrt(num_experts)
    if side * side != num_experts:
        raise ConfigError(
            f"model.num_experts={num_experts} with router.name='product_key' must be a square, "
            f"because experts lie on a grid of rows and columns: use {side * side} or "
            f"{(side + 1) ** 2}."
        )
    if heads < 1 or k % heads:
        raise ConfigError(
            f"router.heads={heads} must be at least 1 and divide router.k={k}: each head finds an "
            "equal part of a token's experts."
        )
    if k == heads:
        raise ConfigError(
            f"router.k={k} with router.heads={heads} leaves one expert to each head, whose gate is "
            "then always 1, so the keys would get no gradient and never learn. Set router.k="
            f"{2 * heads} or more."
        )
    if key_dim < 0 or key_dim % 2:
        raise ConfigError(
            f"router.key_dim={key_dim} must be even and not negative: a query is split in halves, one "
            "for rows and one for columns; 0 stands for the model's width."
        )


ROUTER = Router(
    route,
    paper="He 2024, arXiv:2407.04153; Lample et al. 2019, arXiv:1907.05242",
    equation="score(i, j) = q1 . c_i + q2 . c'_j with q = LN(x W_h), top k/h of each head, softmax",
    cost="D h d_k + sqrt(E) d_k h + (k/h)^2 h + k experts",
    use="There are so many small experts that comparing all of them costs too much.",
    check=check,
    gate=ProductKeyGate,
    fixed_k=False,  # an expert that two heads found counts once
    permutes_experts=False,  # only whole rows and whole columns of the grid can change places
)
