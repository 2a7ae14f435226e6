"""Where every axis lives: the one table from the letters of `moe.axes` to mesh axes.

Parameters carry their letters as metadata (`axes=("E", "D", None, "F")`), optimiser moments follow
their parameter, activations are constrained once a block. Axes that scan or accumulation put in front
are never sharded.
"""

from collections.abc import Sequence
from typing import Any

from flax import nnx
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from moe.axes import BATCH_AXES, EXPERT, FSDP, TENSOR
from moe.errors import ConfigError

# Letter of a parameter's axis -> mesh axis. A letter that is not listed is replicated.
PARAMETER_RULES = {
    "E": EXPERT,  # experts: each device of the expert axis keeps E / expert of them
    "F": TENSOR,  # hidden width of MLPs and experts
    "H": TENSOR,  # heads, of queries and of keys and values
    "V": TENSOR,  # vocabulary
    "D": FSDP,  # model width: gathered when used
}

BATCH_SPEC = PartitionSpec(BATCH_AXES)


def parameter_spec(letters: Sequence[str | None], ndim: int) -> PartitionSpec:
    """PartitionSpec of a parameter whose last axes are named by `letters`; axes before them are replicated."""
    named = [None if letter is None else PARAMETER_RULES.get(letter) for letter in letters]
    return PartitionSpec(*([None] * (ndim - len(named))), *named)


def parameter_shardings(state: nnx.State, mesh: Mesh) -> Any:
    """A pure dict like `nnx.to_pure_dict(state)` with a NamedSharding for each array.

    Raises:
        ConfigError: an axis is not divisible by the size of its mesh axis.
    """

    def sharding(path: tuple, variable: nnx.Variable) -> NamedSharding:
        shape = variable.get_value().shape
        spec = parameter_spec(variable.get_metadata().get("axes", ()), len(shape))
        for size, name in zip(shape, spec, strict=True):
            if name is not None and size % mesh.shape[name]:
                raise ConfigError(
                    f"mesh.{name}={mesh.shape[name]} does not divide an axis of size {size} of "
                    f"{'/'.join(map(str, path))} {tuple(shape)}: choose mesh.{name} among the divisors "
                    f"of {size}, or change the model's size."
                )
        return NamedSharding(mesh, spec)

    flat = nnx.to_flat_state(state)
    return nnx.to_pure_dict(nnx.from_flat_state([(p, _Leaf(sharding(p, v))) for p, v in flat]))


class _Leaf(nnx.Variable):
    """Carries a sharding through NNX's dict conversion."""


def constrain_batch(x: Array) -> Array:
    """Shards the leading axis of an activation over the batch axes; the identity without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, BATCH_SPEC)
