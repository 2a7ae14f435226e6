"""What comes after the last layer of a classifier: one vector for each row."""

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe.errors import ConfigError
from moe.model import segment_pooling
from moe.model.layer import Call
from moe.model.segment_pooling import SegmentPool
from moe.model.spec import ModelSpec

POOLS = ("mean", "segment")
POOL_NOISE = 2  # folded into the key of a pass, whose stacks of layers take 0 and 1


def make_pool(spec: ModelSpec, rngs: nnx.Rngs) -> SegmentPool | None:
    """The module that pools the rows of a classifier; None where a mean does."""
    if not spec.classes or spec.pool.name == "mean":
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


def pool_options(task: dict[str, Any]) -> dict[str, Any]:
    """The options of `SegmentPool` in the section `task` of the config, where `pool` is the kind."""
    options = {n: v for n, v in task.items() if n not in ("name", "pool", "summary")}
    return options | {"pool": task["summary"]}


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
