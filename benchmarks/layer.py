"""A sparse layer against the dense MLP of equal active FLOPs, and beside PyTorch's.

Sparse: the model's own layer, that is router product, softmax, top-k, gates, dispatch, `E` SwiGLU
experts of width `F`, combine. Dense: one SwiGLU MLP of width `K * F`. All float32, all sides in turn.
PyTorch's are transformers' Mixtral block with `grouped_mm` and a dense SwiGLU MLP, in another process.
"""

from collections.abc import Callable, Mapping
import contextlib
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from benchmarks import peer as peers
from benchmarks.rows import Row, times
from benchmarks.timing import Timed, interleave, timed
from moe.dispatch.table import make_dispatch
from moe.dispatch.types import Dispatch
from moe.model.experts import MLP, ExpertParams, feed_forward
from moe.model.layer import Call, RouterSpec, SparseMLP

ROWS = 8  # sequences of a batch


class Shape(NamedTuple):
    """Sizes by the letters of `moe/axes.py`."""

    T: int
    D: int
    F: int
    E: int
    K: int

    def __str__(self) -> str:
        """As `(4096, 256, 1024, 8, 2)`."""
        return str(tuple(self))


BOUNDS = {  # most that sparse may take of dense, forward and backward
    Shape(4096, 256, 1024, 8, 2): 1.15,
    Shape(4096, 512, 512, 64, 8): 1.3,
    Shape(4096, 256, 1024, 128, 1): 2.0,
}


def measure(repeats: int, bounds: Mapping[Shape, float] = BOUNDS) -> list[Row]:
    """All shapes."""
    found = []
    with peers.Peer() if peers.installed() else contextlib.nullcontext() as peer:
        for shape, bound in bounds.items():
            found += measure_shape(shape, bound, repeats, peer)
    return found


def measure_shape(shape: Shape, bound: float, repeats: int, peer: peers.Peer | None) -> list[Row]:
    """Rows of one shape; without a peer, those of PyTorch say so."""
    runs: dict[str, Timed] = {}
    x, cotangent = draw(shape)
    for side, (layer, params) in make_sides(shape).items():
        runs[f"{side} forward"] = timed(compiled(layer, params, x), params, x)
        arguments = params, x, cotangent
        runs[side] = timed(compiled(with_backward(layer), *arguments), *arguments)
    if peer is not None:
        peer.ask("layers", **shape._asdict())
        runs |= {f"torch {side}": peer.timed(side) for side in ("dense", "sparse")}
    took = interleave(runs, repeats)
    found = [
        times(f"{shape} sparse / dense", took["sparse"], took["dense"], bound),
        times(f"{shape} forward only", took["sparse forward"], took["dense forward"]),
    ]
    names = [f"{shape} sparse / Mixtral block", f"{shape} Mixtral block / its dense"]
    if peer is None:
        return found + [Row(name, note=peers.MISSING) for name in names]
    theirs = took["torch sparse"]
    return [
        *found,
        times(names[0], took["sparse"], theirs, 1.0, note=peers.versions()),
        times(names[1], theirs, took["torch dense"]),
        times(f"{shape} dense / PyTorch's dense", took["dense"], took["torch dense"]),
    ]


def sparse_layer(shape: Shape) -> SparseMLP:
    """The model's sparse layer: top-k softmax, gates as they are (OLMoE), no shared expert."""
    return SparseMLP(
        RouterSpec("topk", shape.K, (("normalize", "none"),)),
        num_experts=shape.E,
        width=shape.D,
        hidden=shape.F,
        shared_experts=0,
        vocab_size=1,
        activation="swiglu",
        out_scale=1.0,
        rngs=nnx.Rngs(0),
    )


def call_sparse(layer: SparseMLP, x: jax.Array, dispatch: Dispatch | None = None) -> jax.Array:
    """Output of the sparse layer; its report is not asked for, so it costs nothing."""
    dispatch = make_dispatch("grouped", None) if dispatch is None else dispatch
    call = Call(jnp.zeros(x.shape[:2], jnp.int32), jnp.ones(x.shape[:2], bool), dispatch)
    return layer(x, call, None)[0]


def call_dense(layer: MLP, x: jax.Array) -> jax.Array:
    """Output of the dense twin, over flat tokens.

    XLA:CPU is 1.5 times slower at the gradients of `[B S D] @ [D F]`, and the twin shall be as fast
    as it can be.
    """
    one = ExpertParams(layer.wi[...][None], layer.wo[...][None])
    tokens = x.reshape(-1, x.shape[2])
    return feed_forward(one, tokens, lambda rows, w: rows @ w[0], "swiglu").reshape(x.shape)


def with_backward(layer: Callable) -> Callable:
    """The layer's output and its gradients with respect to weights and tokens."""

    def both(params: Any, x: jax.Array, cotangent: jax.Array) -> Any:
        output, pull = jax.vjp(layer, params, x)
        return output, pull(cotangent)

    return both


def make_sides(shape: Shape) -> dict[str, tuple[Callable, Any]]:
    """`{side: (layer(params, x), params)}`."""
    dense = MLP(shape.D, shape.K * shape.F, "swiglu", out_scale=1.0, rngs=nnx.Rngs(1))
    return {"dense": pure(dense, call_dense), "sparse": pure(sparse_layer(shape), call_sparse)}


def pure(module: nnx.Module, call: Callable) -> tuple[Callable, Any]:
    """The module as a function of its parameters, and the parameters."""
    graph, params = nnx.split(module)
    return lambda params, x: call(nnx.merge(graph, params), x), params


def draw(shape: Shape) -> tuple[jax.Array, jax.Array]:
    """Normal tokens and a cotangent of the output, `[B S D]`."""
    size = (ROWS, shape.T // ROWS, shape.D)
    keys = jax.random.split(jax.random.key(1))
    return jax.random.normal(keys[0], size), jax.random.normal(keys[1], size)


def compiled(function: Callable, *arguments: Any) -> Any:
    """The function, compiled for these arguments."""
    return jax.jit(function).lower(*arguments).compile()
