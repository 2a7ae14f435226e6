"""Mixture-of-Depths: only some tokens go through a block, the others pass by on the residual.

Raposo et al. 2024 (arXiv:2404.02258). In training each row sends its C tokens of the largest router
score through the block, which sees nothing but them: attention costs (C/S)^2 and the rest C/S of a
plain block. That choice depends on later tokens. A small predictor therefore learns, from each token
alone, whether it would be among them, and decides in evaluation and generation.
"""

from collections.abc import Callable
from functools import partial
import math
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped
import optax

from moe.errors import ConfigError
from moe.model.experts import fan_in_init
from moe.model.layer import Call
from moe.routing.gates import project
from moe.routing.selection import select
from moe.routing.types import LayerReport


class Chosen(NamedTuple):
    """The `C` positions of each row that go through the block, in order, and the same as a mask."""

    index: Int[Array, "B C"]  # ascending, so that causal masks keep their meaning
    mask: Bool[Array, "B S"]


class Depth(NamedTuple):
    """What one layer tells of its choice; 0 and False for padding."""

    chosen: Bool[Array, "B S"]  # went through the block
    bce: Float[Array, "B S"]  # loss of the predictor, nats; no gradient beyond the predictor
    agree: Bool[Array, "B S"]  # predictor and top-C choice are of one mind


class Delta(NamedTuple):
    """What a block would do to the tokens it is given."""

    change: Float[Array, "B S D"]  # its output less its input
    reports: tuple[LayerReport, ...] = ()  # of the sparse layers inside
    terms: dict[str, Float[Array, "B S"]] = {}  # noqa: RUF012 - unweighted losses, for each token
    cache: Any = None
    memory: Any = None  # of the gates; arrays [B S ...]


class Passed(NamedTuple):
    """What comes of a layer with a choice of tokens; all of it over whole rows."""

    output: Float[Array, "B S D"]
    reports: tuple[LayerReport, ...]
    terms: dict[str, Float[Array, "B S"]]  # of the block
    cache: Any
    memory: Any
    depth: Depth


# (x, positions, segments, call, key, cache, start, memory) -> Delta
BlockDelta = Callable[..., Delta]


def slots(capacity: float, length: int) -> int:
    """`C = ceil(capacity S)`, at least 1 and at most S. The paper takes capacity 0.125."""
    return min(length, max(1, math.ceil(capacity * length - 1e-9)))


def check(capacity: float) -> None:
    """Refuses a capacity that is no share.

    Raises:
        ConfigError: outside (0, 1].
    """
    if not 0.0 < capacity <= 1.0:
        raise ConfigError(
            f"depth capacity {capacity} is not in (0, 1]: it is the share of a row's tokens that "
            "go through the block, 0.125 in the paper; 1 sends all of them."
        )


def top_tokens(score: Float[Array, "B S"], valid: Bool[Array, "B S"], count: int) -> Chosen:
    """The `count` real tokens of the largest score in each row; a tie goes to the earlier one.

    Always `count` positions: a row with fewer real tokens fills up with padding, which is not in
    the mask. Comparing with the C-th largest score instead would take another number on ties.
    """
    ranked = jnp.where(valid, score, -jnp.inf)
    index = jnp.sort(select(ranked[:, None], count)[:, 0], axis=-1)
    hit = (index[:, :, None] == jnp.arange(score.shape[1])[None, None]).any(axis=1)
    return Chosen(index, hit & valid)


def take(a: Shaped[Array, "B S ..."], index: Int[Array, "B C"]) -> Shaped[Array, "B C ..."]:
    """`a[b, index[b, c]]`, differentiable by a gather: `index` ascends and has no position twice."""
    return _gathered(a, index, jnp.ones_like(index, dtype=bool), a.shape[1])


def spread(
    a: Shaped[Array, "B C ..."], index: Int[Array, "B C"], size: int, fill: Any = 0
) -> Array:
    """The inverse of `take`: `[B S ...]` with `fill` at positions that are not in `index`."""
    back, here = _inverse(index, size)
    return jnp.where(_trailing(here, a.ndim), _gathered(a, back, here, a.shape[1]), fill)


def _trailing(a: Shaped[Array, "B S"], ndim: int) -> Shaped[Array, "B S ..."]:
    return jnp.expand_dims(a, range(2, ndim))


def _inverse(index: Int[Array, "B C"], size: int) -> tuple[Int[Array, "B S"], Bool[Array, "B S"]]:
    """Where in `index` each of `size` positions stands, and whether it does."""
    equal = index[:, None, :] == jnp.arange(size)[None, :, None]  # [B S C]
    return equal.argmax(axis=-1).astype(index.dtype), equal.any(axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _gathered(a: Array, index: Array, here: Array, size: int) -> Array:
    """Rows of `a` at `index`; those that are not `here` get no gradient. `size` is the axis of `a`."""
    del here, size
    return jnp.take_along_axis(a, _trailing(index, a.ndim), axis=1, mode="clip")


def _gathered_forward(a: Array, index: Array, here: Array, size: int) -> tuple[Array, tuple]:
    return _gathered(a, index, here, size), (index, here)


def _gathered_backward(size: int, saved: tuple, cotangent: Array) -> tuple[Array, None, None]:
    # A position is read at most once, so the transpose of this gather is a gather too; XLA runs a
    # scatter one row at a time on the CPU.
    index, here = saved
    back, read = _inverse(jnp.where(here, index, -1), size)
    rows = jnp.take_along_axis(cotangent, _trailing(back, cotangent.ndim), axis=1, mode="clip")
    return jnp.where(_trailing(read, rows.ndim), rows, 0), None, None


_gathered.defvjp(_gathered_forward, _gathered_backward)


def take_call(call: Call, index: Int[Array, "B C"]) -> Call:
    """The call for the chosen tokens: whatever it knows of each token, `[B S]`, is taken along."""
    shape = call.tokens.shape
    fields: dict[str, Any] = {
        name: take(value, index)
        for name, value in call._asdict().items()
        if isinstance(value, jax.Array) and value.shape[:2] == shape
    }
    return call._replace(**fields)


def spread_report(report: LayerReport, index: Int[Array, "B C"], size: int) -> LayerReport:
    """The report of a block that saw the chosen tokens, as of the whole row: the others chose nobody."""
    return report._replace(
        expert=spread(report.expert, index, size, fill=-1),
        token_terms={n: spread(v, index, size) for n, v in report.token_terms.items()},
    )


def _few(
    block: BlockDelta, chosen: Chosen, x: Array, of_tokens: tuple, call: Call, key: Any, memory: Any
) -> Delta:
    """Runs a block on nothing but the chosen tokens; its answers stand where they belong."""
    index, size = chosen.index, x.shape[1]
    few = [take(a, index) for a in (x, *of_tokens)]
    inner = jax.tree.map(lambda m: take(m, index), memory)
    done = block(*few, take_call(call, index), key, None, None, inner)

    def everywhere(a: Array) -> Array:
        return spread(a, index, size)

    return Delta(
        everywhere(done.change),
        tuple(spread_report(report, index, size) for report in done.reports),
        jax.tree.map(everywhere, done.terms),
        None,
        jax.tree.map(everywhere, done.memory),
    )


def _masked(call: Call, mask: Bool[Array, "B S"]) -> Call:
    """The call in which all but some tokens are padding."""
    documents = None if call.documents is None else jnp.where(mask, call.documents, 0)
    return call._replace(valid=mask, documents=documents)


def _where(mask: Bool[Array, "B S"], new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(_trailing(mask, a.ndim), a, b), new, old)


class MixtureOfDepths(nnx.Module):
    """Sends the chosen tokens through a block: `y_t = x_t + r_t F(x)_t`, others `y_t = x_t`, bit for bit.

    `r_t = x_t w` is the router's score, raw as in the paper: through it the router learns from the
    task. The predictor is a two-layer perceptron on `x_t` whose gradient stops there.

    Args:
        width: model width `D`.
        capacity: share of a row's tokens that go through the block in training, in (0, 1].
        hidden: hidden width of the predictor; 0 takes D/4, at least 8.
        rngs: its `params` stream draws all weights.

    Raises:
        ConfigError: a capacity outside (0, 1].
    """

    def __init__(self, width: int, capacity: float, *, hidden: int = 0, rngs: nnx.Rngs):
        check(capacity)
        hidden = hidden or max(8, width // 4)
        self.capacity = capacity
        self.router = nnx.Param(
            nnx.initializers.normal(width**-0.5)(rngs.params(), (width, 1)), axes=("D", None)
        )
        self.predictor_in = nnx.Param(
            fan_in_init(width)(rngs.params(), (width, hidden)), axes=("D", None)
        )
        self.predictor_out = nnx.Param(
            fan_in_init(hidden)(rngs.params(), (hidden, 1)), axes=(None, None)
        )
        self.predictor_bias = nnx.Param(jnp.zeros((1,)), axes=(None,))

    def score(self, x: Float[Array, "B S D"]) -> Float[Array, "B S"]:
        """`r`, float32."""
        return project(x, self.router[...])[..., 0]

    def predict(self, x: Float[Array, "B S D"]) -> Float[Array, "B S"]:
        """Logit of being chosen, of each token alone; float32, no gradient to `x`."""
        h = jax.nn.gelu(project(jax.lax.stop_gradient(x), self.predictor_in[...]))
        return (project(h, self.predictor_out[...]) + self.predictor_bias[...][None, None])[..., 0]

    def __call__(
        self,
        block: BlockDelta,
        x: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        segments: Int[Array, "B S"],
        call: Call,
        key: Shaped[Array, ""] | None = None,
        cache: Any = None,
        start: Int[Array, ""] | None = None,
        memory: Any = None,
        *,
        causal: bool,
    ) -> Passed:
        """One layer.

        Args:
            block: `(x, positions, segments, call, key, cache, start, memory) -> Delta`.
            x: `[B S D]`.
            positions: of each token in its document.
            segments: document of each token, 0 for padding.
            call: of these tokens.
            key: noise of the block.
            cache: of the block; its attention must keep documents apart (`KeyValues.segment`).
            start: how many positions of the cache are filled.
            memory: of the gates, arrays `[B S ...]`; tokens that pass by keep theirs.
            causal: False for the choice of training, C tokens of a row and no more compute than
                that; True for the predictor's, any number of tokens. The block then runs on all
                of them, for static shapes, and those that are not chosen are made padding: no
                token attends to them, no expert takes them.

        Returns:
            The tokens, what the block told, and the choice. With a cache `bce` and `agree` compare
            with the top C of these few tokens and mean nothing.

        Raises:
            ValueError: a cache without `causal`.
        """
        if cache is not None and not causal:
            raise ValueError("a row's top tokens are not known in generation: set causal=True")
        score, logit = self.score(x), self.predict(x)
        top = top_tokens(score, call.valid, slots(self.capacity, x.shape[1]))
        if causal:
            mask = (logit > 0) & call.valid
            seen = jnp.where(mask, segments, 0)
            done = block(x, positions, seen, _masked(call, mask), key, cache, start, memory)
        else:
            mask = top.mask
            done = _few(block, top, x, (positions, segments), call, key, memory)
        changed = x + (score[..., None] * done.change).astype(x.dtype)
        bce = optax.sigmoid_binary_cross_entropy(logit, top.mask.astype(jnp.float32))
        agree = ((logit > 0) == top.mask) & call.valid
        return Passed(
            output=jnp.where(mask[..., None], changed, x),
            reports=done.reports,
            terms={name: jnp.where(mask, value, 0.0) for name, value in done.terms.items()},
            cache=done.cache,
            memory=_where(mask, done.memory, memory),
            depth=Depth(mask, jnp.where(call.valid, bce, 0.0), agree),
        )
