"""A sparse layer against the dense MLP of equal active FLOPs, side by side in one process.

    python3 benchmarks/layer.py --shapes=A,B,C --repeats=15 --json=layer.json

Sparse: router product, softmax, top-k, gates, dispatch, `E` SwiGLU experts of width `F`, combine.
Dense: one SwiGLU MLP of width `K * F`. Both float32, both compiled; runs alternate, and the ratio is
of the medians, because absolute times move with whatever else the machine does.
"""

from collections.abc import Callable
import json
import statistics
import time
from typing import Any, NamedTuple

from absl import app, flags
import jax
import jax.numpy as jnp

from moe.dispatch.grouped import grouped
from moe.dispatch.types import Matmul
from moe.parallel.host_memory import reuse_buffers
from moe.routing.types import Choices

SHAPES = flags.DEFINE_list("shapes", ["A", "B", "C"], "which of the shapes to measure")
REPEATS = flags.DEFINE_integer("repeats", 11, "timed runs of each side", lower_bound=5)
SKEW = flags.DEFINE_float("skew", 0.0, "added to the logit of expert 0: uneven load")
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


class Experts(NamedTuple):
    """SwiGLU experts."""

    wi: jax.Array  # [E D 2 F]
    wo: jax.Array  # [E F D]


class Sparse(NamedTuple):
    """Weights of the sparse layer."""

    router: jax.Array  # [D E]
    experts: Experts


class Dense(NamedTuple):
    """Weights of the dense twin."""

    wi: jax.Array  # [D 2 K*F]
    wo: jax.Array  # [K*F D]


def expert(params: Experts, rows: jax.Array, matmul: Matmul) -> jax.Array:
    """SwiGLU."""
    E, D, G, F = params.wi.shape
    gate, up = jnp.split(matmul(rows, params.wi.reshape(E, D, G * F)), 2, axis=-1)
    return matmul(jax.nn.silu(gate) * up, params.wo)


def sparse_layer(params: Sparse, x: jax.Array, K: int, skew: float) -> jax.Array:
    """Top-k softmax routing without renormalising, dropless."""
    B, S, D = x.shape
    logits = (x.reshape(B * S, D) @ params.router).reshape(B, S, -1).at[..., 0].add(skew)
    gate, index = jax.lax.top_k(jax.nn.softmax(logits), K)
    choices = Choices(index, gate, jnp.ones(gate.shape, bool))
    return grouped(x, choices, params.experts, expert).output


def dense_layer(params: Dense, x: jax.Array) -> jax.Array:
    """One SwiGLU MLP as wide as a token's experts together.

    Over flat tokens `[T D]`: XLA:CPU is 1.5 times slower at the gradients of `[B S D] @ [D F]`, and
    the twin shall be as fast as it can be.
    """
    D, G, F = params.wi.shape
    tokens = x.reshape(-1, D)
    gate, up = jnp.split(tokens @ params.wi.reshape(D, G * F), 2, axis=-1)
    return ((jax.nn.silu(gate) * up) @ params.wo).reshape(x.shape)


def with_backward(layer: Callable) -> Callable:
    """The layer's output and its gradients with respect to weights and tokens."""

    def both(params: Any, x: jax.Array, cotangent: jax.Array) -> Any:
        output, pull = jax.vjp(layer, params, x)
        return output, pull(cotangent)

    return both


def make_sides(shape: Shape, skew: float) -> dict[str, tuple[Callable, Any]]:
    """`{side: (layer(params, x), params)}`."""
    _, D, F, E, K = shape
    keys = jax.random.split(jax.random.key(0), 5)
    sparse = Sparse(
        jax.random.normal(keys[0], (D, E)) / D**0.5,
        Experts(
            jax.random.normal(keys[1], (E, D, 2, F)) / D**0.5,
            jax.random.normal(keys[2], (E, F, D)) / F**0.5,
        ),
    )
    dense = Dense(
        jax.random.normal(keys[3], (D, 2, K * F)) / D**0.5,
        jax.random.normal(keys[4], (K * F, D)) / (K * F) ** 0.5,
    )
    return {
        "dense": (dense_layer, dense),
        "sparse": (lambda params, x: sparse_layer(params, x, K, skew), sparse),
    }


def measure(shape: Shape, repeats: int, skew: float) -> dict[str, float]:
    """Medians in milliseconds of both sides, forward and forward+backward, and their ratios."""
    x = jax.random.normal(jax.random.key(1), (8, shape.T // 8, shape.D))
    cotangent = jax.random.normal(jax.random.key(2), x.shape)
    runs, row = {}, {}
    for side, (layer, params) in make_sides(shape, skew).items():
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
        row = rows[name] = measure(TABLE[name], REPEATS.value, SKEW.value)
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
