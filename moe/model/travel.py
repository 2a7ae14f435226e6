"""One layer of a random path: states of earlier layers come in, and the layer may be left out."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from moe.model.block import Layered, Stream
from moe.model.layer import Call
from moe.model.paths import JumpIn, draw, remember, run_if, survival_rates
from moe.model.spec import ModelSpec

PATHS = 6  # folded into the key of a layer, which has other uses for 0 to 5

# (stream, segments, call) -> what the layer gives back
Run = Callable[[Stream, Int[Array, "B S"], Call], Layered]


def travel(
    spec: ModelSpec,
    jump: JumpIn | None,
    number: Int[Array, ""],
    stream: Stream,
    segments: Int[Array, "B S"],
    call: Call,
    key: Shaped[Array, ""] | None,
    run: Run,
) -> Layered:
    """Runs one layer, or leaves it out.

    Args:
        spec: whose `paths` say how.
        jump: of this layer; None without jumps.
        number: of this layer, from 0.
        stream: what comes in.
        segments: document of each token.
        call: of this pass.
        key: of this layer.
        run: the layer.

    Returns:
        What the layer gives back. Rows that it was left out for have the stream that came in, and
        report no token; their experts are -1.
    """
    paths = spec.paths
    jump_key, skip_key = None, None
    if key is not None:
        jump_key, skip_key = jax.random.split(jax.random.fold_in(key, PATHS))
    if jump is not None:
        x = jump(
            stream.x,
            stream.earlier,
            number,
            jump_key,
            rate=paths.jump,
            temperature=paths.jump_temperature,
            scope=paths.scope,
            training=call.training,
        )
        stream = stream._replace(x=x, earlier=remember(stream.earlier, x, number))
    if paths.survival == 1.0 or not call.training or skip_key is None:
        done = run(stream, segments, call)
        return done._replace(stream=done.stream._replace(earlier=stream.earlier))
    rates = survival_rates(spec.num_layers, paths.survival, paths.schedule)
    survival = jnp.asarray(rates)[number]
    keep = draw(skip_key, survival, (stream.x.shape[0],), paths.scope)
    done = _run_rows(keep, paths.scope, stream, segments, call, run)
    weight = 1.0 / survival if paths.rescale else jnp.float32(1.0)
    change = (done.stream.x - stream.x) * weight.astype(stream.x.dtype)
    x = _where(keep, stream.x + change, stream.x)
    memory = jax.tree.map(lambda a, b: _where(keep, a, b), done.stream.memory, stream.memory)
    return done._replace(stream=Stream(x, memory, stream.earlier))


def _run_rows(
    keep: Bool[Array, " B"], scope: str, stream: Stream, segments: Array, call: Call, run: Run
) -> Layered:
    """Runs the layer for these rows. Scope "batch" saves the compute of a layer that is left out."""
    if scope == "batch":
        return run_if(keep[0], lambda: run(stream, segments, call))
    # The others count as padding, so that they take no seat at an expert and add to no loss.
    segments = jnp.where(keep[:, None], segments, 0)
    call = call._replace(valid=call.valid & keep[:, None], documents=segments)
    return run(stream, segments, call)


def _where(keep: Bool[Array, " B"], new: Array, old: Array) -> Array:
    return jnp.where(jnp.expand_dims(keep, range(1, new.ndim)), new, old)
