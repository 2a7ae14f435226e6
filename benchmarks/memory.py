"""What the layer needs of memory beside its arguments and results, from the compiled executable."""

from collections.abc import Mapping
from typing import Any

from benchmarks import layer
from benchmarks.hlo import Program
from benchmarks.layer import Shape
from benchmarks.rows import Row, single

BOUND = 2.5


def measure(repeats: int, shapes: Mapping[Shape, Any] = layer.BOUNDS) -> list[Row]:
    """Temporaries relative to the dense layer's, and buffers that no dispatch may make."""
    del repeats  # nothing of it is noisy
    found = []
    for shape in shapes:
        x, cotangent = layer.draw(shape)
        made = {
            side: layer.compiled(layer.with_backward(run), params, x, cotangent)
            for side, (run, params) in layer.make_sides(shape).items()
        }
        sizes = {s: one.memory_analysis().temp_size_in_bytes for s, one in made.items()}
        sides = (float(sizes["sparse"]),), (float(sizes["dense"]),)
        found.append(Row(f"{shape} temporaries / dense", *sides, bound=BOUND, kind="size"))
        large = too_large(made["sparse"].as_text(), shape)
        name = f"{shape} buffers of TEC or TFE elements"
        found.append(single(name, len(large), 0, "count", note=", ".join(large[:3])))
    return found


def too_large(text: str, shape: Shape) -> list[str]:
    """Buffers as large as `T x E x C` or `T x F x E`, at capacity factor 1, weights left out.

    Weights and their gradients are known by their number of elements: at `K = 1` and many experts they
    are larger than `T x E x C`.
    """
    T, D, F, E, K = shape
    limit = min(T * E * -(-T * K // E), T * F * E)
    weights = {E * D * 2 * F, E * D * F}
    return [name for name, size in Program(text).buffers() if size >= limit and size not in weights]
