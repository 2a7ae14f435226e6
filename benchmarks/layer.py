"""A sparse layer against the dense MLP of equal active FLOPs, side by side in one process.

    python3 benchmarks/layer.py --shapes=A,B,C --repeats=15 --json=layer.json

Sparse: the model's own layer, that is router product, softmax, top-k, gates, dispatch, `E` SwiGLU
experts of width `F`, combine. Dense: one SwiGLU MLP of width `K * F`. Both float32, both compiled;
runs alternate, and the ratio is of the medians, because absolute times move with whatever else the
machine does.
"""

from collections.abc import Callable
import json
import statistics
import time
from typing import Any, NamedTuple

from absl import app, flags
from flax import nnx
import jax
import jax.numpy as jnp

from moe.dispatch.table import make_dispatch
from moe.model.experts import MLP, ExpertParams, feed_forward
from moe.model.layer import Call, RouterSpec, SparseMLP
from moe.parallel.host_memory import reuse_buffers

SHAPES = flags.DEFINE_list("shapes", ["A", "B", "C"], "which of the shapes to measure")
REPEATS = flags.DEFINE_integer("repeats", 11, "timed runs of each side", lower_bound=5)
HOT = flags.DEFINE_bool("hot", False, "half of the tokens name expert 0")
DISPATCH = flags.DEFINE_enum("dispatch", "grouped", ["grouped", "capacity"], "path of the layer")
CAPACITY = flags.DEFINE_float(
    "capacity_factor", 1.25, "of `capacity`, whose output then drops some"
)
JSON = flags.DEFINE_string("json", None, "also write the rows to this file")


class Shape(NamedTuple):
    """Sizes by the letters of `moe/axes.py`."""

    T: int
    D: int
    F: int
    E: int
    K: int


TABLE = {
    "A": Shape(4096, 256, 1024, 8, 2),
    "B": Shape(4096, 512, 512, 64, 8),
    "C": Shape(4096, 256, 1024, 128, 1),
}


def sparse_layer(shape: Shape) -> SparseMLP:
    """The model's sparse layer: top-k softmax, gates as they are (OLMoE), no shared expert."""
    layer = SparseMLP(
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
    if HOT.value:  # a logit of large variance is the greatest for the half of the tokens
        layer.gate.kernel[...] = layer.gate.kernel[...].at[:, 0].multiply(1e3)
    return layer


def call_sparse(layer: SparseMLP, x: jax.Array) -> jax.Array:
    """Output of the sparse layer; its report is not asked for, so it costs nothing."""
    dispatch = make_dispatch(DISPATCH.value, None, capacity_factor=CAPACITY.value)
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


def measure(shape: Shape, repeats: int) -> dict[str, float]:
    """Medians in milliseconds of both sides, forward and forward+backward, and their ratios."""
    x = jax.random.normal(jax.random.key(1), (8, shape.T // 8, shape.D))
    cotangent = jax.random.normal(jax.random.key(2), x.shape)
    runs, row = {}, {}
    for side, (layer, params) in make_sides(shape).items():
        runs[side, "forward"] = jax.jit(layer), (params, x)
        runs[side, "both"] = jax.jit(with_backward(layer)), (params, x, cotangent)
    for (side, part), (function, arguments) in runs.items():
        start = time.perf_counter()
        runs[side, part] = function.lower(*arguments).compile(), arguments
        row[f"{side}_{part}_compile_s"] = time.perf_counter() - start
    times: dict = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, (function, arguments) in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            times[name].append(1e3 * (time.perf_counter() - start))
    for side, part in runs:
        row[f"{side}_{part}_ms"] = statistics.median(times[side, part][1:])
    for part in ("forward", "both"):
        row[f"{part}_ratio"] = row[f"sparse_{part}_ms"] / row[f"dense_{part}_ms"]
    return row


def main(_: list[str]) -> None:
    """Prints the table and, if asked, writes it."""
    reuse_buffers()
    header = "shape (T, D, F, E, K)            forward ms  ratio    forward+backward ms  ratio  compile s"
    print(header)
    rows = {}
    for name in SHAPES.value:
        row = rows[name] = measure(TABLE[name], REPEATS.value)
        print(
            f"{name} {tuple(TABLE[name])!s:<30}"
            f"{row['sparse_forward_ms']:>6.1f} /{row['dense_forward_ms']:>6.1f} {row['forward_ratio']:>5.2f}"
            f"{row['sparse_both_ms']:>14.1f} /{row['dense_both_ms']:>6.1f} {row['both_ratio']:>6.2f}"
            f"{row['sparse_both_compile_s']:>9.1f}",
            flush=True,
        )
    if JSON.value:
        with open(JSON.value, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    app.run(main)
