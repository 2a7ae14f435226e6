"""What every kind of attention returns."""

from typing import Any, NamedTuple

from jaxtyping import Array, Float

from moe.routing.types import LayerReport


class AttentionOutput(NamedTuple):
    """The output before the residual, and what the layer has to say about itself."""

    output: Float[Array, "B S D"]
    cache: Any  # a NamedTuple of arrays with leading axis B; None without a cache
    report: LayerReport | None = None  # of the experts inside the attention, where there are any
    terms: dict[str, Float[Array, "B S"]] = {}  # noqa: RUF012  unweighted losses, one for each token
