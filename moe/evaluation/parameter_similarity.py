"""How alike the experts of a model are by its parameters alone (M16), on the devices they lie on."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float
import numpy as np


def similarity_metrics(params: Any) -> dict[str, Any]:
    """Mean cosine between two experts, of router columns and of flattened weights.

    Args:
        params: pure dict of the Transformer's parameters.

    Returns:
        `routing/router_similarity` and `routing/weight_similarity`, means over sparse layers, and
        the same under `routing/per_layer/`. Gates without a linear `kernel [D E]` and experts of
        several shapes have no such number, and then there is none.
    """
    found = jax.device_get(_measure(list(sparse_layers(params))))
    layers = {name: np.asarray(value, np.float64).reshape(-1) for name, value in found.items()}
    means = {f"routing/{name}": float(value.mean()) for name, value in layers.items()}
    return means | {f"routing/per_layer/{name}": value.tolist() for name, value in layers.items()}


def sparse_layers(params: Any, part: str = "experts") -> Iterator[dict[str, Any]]:
    """The sparse layers of one turn of the pattern in the order of reports, arrays stacked over turns.

    Args:
        params: pure dict of parameters or of router state.
        part: what a sparse layer has there: `experts` among parameters, `state` among router state.
    """
    blocks = params.get("blocks", {})
    for name in sorted(blocks, key=lambda block: int(block.removeprefix("layer"))):
        for module in sorted(blocks[name]):  # "mlp" before "second"
            if part in blocks[name][module]:
                yield blocks[name][module]


@jax.jit
def _measure(layers: list[dict[str, Any]]) -> dict[str, Float[Array, "R N"]]:
    """`[turn, layer of the turn]`, replicated, so that every process can read it."""
    kernels = [layer.get("gate", {}).get("kernel") for layer in layers]
    weights = [(layer["experts"].get("wi"), layer["experts"].get("wo")) for layer in layers]
    found = {}
    if kernels and all(kernel is not None and kernel.ndim == 3 for kernel in kernels):
        rows = [kernel.swapaxes(1, 2) for kernel in kernels]  # [R E D]
        found["router_similarity"] = jnp.stack([_mean_cosine([r]) for r in rows], axis=1)
    if weights and all(w is not None and w.ndim > 3 for w, _ in weights):
        found["weight_similarity"] = jnp.stack(
            [_mean_cosine([w.reshape(*w.shape[:2], -1) for w in pair]) for pair in weights], axis=1
        )
    if jax.sharding.get_abstract_mesh().empty:
        return found
    return jax.lax.with_sharding_constraint(found, PartitionSpec())


def _mean_cosine(parts: list[Float[Array, "R E _"]]) -> Float[Array, " R"]:
    """Of vectors that come in parts; over pairs of different experts, 0 with a single one."""
    highest = jax.lax.Precision.HIGHEST
    gram = sum(jnp.einsum("rex,rfx->ref", p, p, precision=highest) for p in parts)
    assert isinstance(gram, jax.Array)
    size = jnp.sqrt(jnp.maximum(jnp.diagonal(gram, axis1=1, axis2=2), 1e-30))  # [R E]
    cosine = gram / (size[:, :, None] * size[:, None, :])
    E = gram.shape[-1]
    pairs = cosine.sum(axis=(1, 2)) - jnp.diagonal(cosine, axis1=1, axis2=2).sum(axis=1)
    return pairs / max(E * (E - 1), 1)
