"""How the layer's time grows with the number of experts, and with the number of tokens."""

from collections.abc import Sequence

from benchmarks import layer
from benchmarks.layer import Shape
from benchmarks.rows import Row, times
from benchmarks.timing import Timed, interleave, timed

FEW = Shape(4096, 256, 1024, 8, 2)
EXPERTS, EXPERTS_BOUND = (8, 32, 128), 1.6
TOKENS, TOKENS_BOUND = (1024, 4096, 16384), 1.15  # either way


def measure(
    repeats: int,
    shape: Shape = FEW,
    experts: Sequence[int] = EXPERTS,
    tokens: Sequence[int] = TOKENS,
) -> list[Row]:
    """Relative to the fewest experts; time a token relative to the fewest tokens."""
    more = {count: shape._replace(E=count) for count in experts}
    took = interleave({str(count): sparse(one) for count, one in more.items()}, repeats)
    found = []
    for count in experts[1:]:
        bound = EXPERTS_BOUND if count == experts[-1] else None
        name = f"E from {experts[0]} to {count}"
        found.append(times(name, took[str(count)], took[str(experts[0])], bound))
    longer = {count: shape._replace(T=count) for count in tokens}
    took = interleave({str(count): sparse(one) for count, one in longer.items()}, repeats)
    for count in tokens[1:]:
        above = [second / count for second in took[str(count)]]
        below = [second / tokens[0] for second in took[str(tokens[0])]]
        last = count == tokens[-1]
        bound, least = (TOKENS_BOUND, 2 - TOKENS_BOUND) if last else (None, None)
        name = f"T from {tokens[0]} to {count}, time a token"
        found.append(times(name, above, below, bound, least=least))
    return found


def sparse(shape: Shape) -> Timed:
    """Forward and backward of the sparse layer."""
    run, params = layer.pure(layer.sparse_layer(shape), layer.call_sparse)
    arguments = params, *layer.draw(shape)
    return timed(layer.compiled(layer.with_backward(run), *arguments), *arguments)
