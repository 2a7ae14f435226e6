"""What comes after the last layer of a model of rows: one vector for each, or two to compare."""

import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe.errors import ConfigError
from moe.model import segment_pooling
from moe.model.experts import fan_in_init
from moe.model.layer import Call
from moe.model.segment_pooling import SegmentPool
from moe.model.spec import ModelSpec

POOLS = ("mean", "segment")
OUTPUTS = {  # task -> what a model gives: logits of positions, of a row's classes, or two vectors a row
    "language": "tokens",
    "classify": "classes",
    "seq2seq": "tokens",
    "ctc": "tokens",
    "match": "pair",
}
START_LOG_SCALE, MAX_LOG_SCALE = math.log(1 / 0.07), math.log(100.0)  # of CLIP
POOL_NOISE = 2  # folded into the key of a pass, whose stacks of layers take 0 and 1


def make_pool(spec: ModelSpec, rngs: nnx.Rngs) -> SegmentPool | None:
    """The module that pools the rows of a classifier; None where a mean does."""
    if spec.output != "classes" or spec.pool.name == "mean":
        return None
    return SegmentPool(
        spec.width,
        spec.heads,
        spec.kv_heads,
        spec.head_dim,
        **dict(spec.pool.options),
        qk_norm=spec.qk_norm,
        rope_base=spec.rope_base,
        norm_eps=spec.norm_eps,
        out_scale=1.0,
        rngs=rngs,
    )


def pool_rows(
    pool: SegmentPool | None, x: Float[Array, "B S D"], call: Call
) -> Float[Array, "B D"]:
    """One vector a row, of its valid tokens; float32 from `pool`, else in the dtype of `x`."""
    if pool is not None:
        key = None
        if call.training and call.key is not None:
            key = jax.random.fold_in(call.key, POOL_NOISE)
        return pool(x, call.valid, call.documents, key).output
    valid = call.valid[..., None]
    return jnp.where(valid, x, 0.0).sum(axis=1) / jnp.maximum(valid.sum(axis=1), 1)


class PairHead(nnx.Module):
    """Two vectors of length 1 a row and a temperature, as CLIP (Radford et al. 2021, arXiv:2103.00020).

    The mean of each segment's positions, through one linear map for both: they come out of the same
    layers.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        """`D` numbers a vector, as many as the model's width."""
        self.projection = nnx.Param(
            fan_in_init(width)(rngs.params(), (width, width)), axes=("D", None)
        )
        self.log_scale = nnx.Param(jnp.asarray(START_LOG_SCALE, jnp.float32), axes=())

    def __call__(
        self, x: Float[Array, "B S D"], segments: Int[Array, "B S"]
    ) -> Float[Array, "B 2 D"]:
        """Vectors of segments 1 and 2 in float32; 0 for a segment that is not there."""
        member = (segments[:, None, :] == jnp.arange(1, 3)[None, :, None]).astype(jnp.float32)
        share = member / jnp.maximum(member.sum(axis=-1, keepdims=True), 1.0)
        # Padding may hold anything, and 0 times infinity is no number.
        x = jnp.where((segments > 0)[..., None], x.astype(jnp.float32), 0.0)
        pooled = jnp.einsum("bms,bsd->bmd", share, x)
        y = pooled @ self.projection[...]
        return y * jax.lax.rsqrt(jnp.maximum(jnp.sum(y * y, axis=-1, keepdims=True), 1e-12))

    def scale(self) -> Float[Array, ""]:
        """One over the temperature: what similarities are multiplied by; at most 100."""
        return jnp.exp(_clipped(self.log_scale[...]))


@jax.custom_vjp
def _clipped(log_scale: Float[Array, ""]) -> Float[Array, ""]:
    """At most `MAX_LOG_SCALE`; beyond it, only a gradient that leads back is let through.

    A plain minimum would have no gradient there, and what once is beyond would stay.
    """
    return jnp.minimum(log_scale, MAX_LOG_SCALE)


def _clipped_forward(log_scale: Array) -> tuple[Array, Array]:
    return _clipped(log_scale), log_scale


def _clipped_backward(log_scale: Array, gradient: Array) -> tuple[Array]:
    return (jnp.where(log_scale < MAX_LOG_SCALE, gradient, jnp.maximum(gradient, 0.0)),)


_clipped.defvjp(_clipped_forward, _clipped_backward)


def pool_options(task: dict[str, Any]) -> dict[str, Any]:
    """The options of `SegmentPool` in the section `task` of the config, where `pool` is the kind."""
    return {n: task[n] for n in ("size", "segment", "ratio", "mixture")} | {"pool": task["summary"]}


def check(task: dict[str, Any]) -> None:
    """Checks the section `task`.

    Raises:
        ConfigError: an unknown pool, one for a task that pools nothing, or options that cannot work.
    """
    if task["pool"] not in POOLS:
        raise ConfigError(
            f"task.pool={task['pool']!r} is not one of {', '.join(POOLS)}; choose one."
        )
    if task["pool"] == "segment":
        if task["name"] != "classify":
            raise ConfigError(
                f"task.pool='segment' with task.name={task['name']!r}: only a classifier makes one vector "
                "of a row. Set task.pool='mean', or task.name='classify'."
            )
        segment_pooling.check(**pool_options(task))
