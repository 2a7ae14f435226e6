"""Where every axis lives: presets that map the letters of `moe.axes` to mesh axes, in one table.

Parameters carry their letters as metadata (`axes=("E", "D", None, "F")`). One of several axes with `E`
first is a stack of experts; a gate (`D`, `E`) is none: every token asks it about all experts. Optimiser
moments follow their parameter, activations are constrained once a block. Axes that scan or
accumulation put in front are never sharded.
"""

from collections.abc import Mapping, Sequence
import math
from typing import Any, NamedTuple

from flax import nnx
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from moe.axes import BATCH_AXES, DATA, EXPERT, FSDP, SEQUENCE, TENSOR
from moe.errors import ConfigError, find_row

Axes = tuple[str, ...]


class Rules(NamedTuple):
    """Mesh axes of each letter of a parameter; a letter that is not listed is not sharded."""

    purpose: str
    experts: Mapping[str, Axes]  # of stacked experts
    others: Mapping[str, Axes]
    moments: str | None = None  # preset of the optimiser's moments; None: as their parameter

    @property
    def expert_axes(self) -> Axes:
        """Mesh axes that the experts lie on, which the exchange of tokens runs over."""
        return self.experts["E"]

    def expert_shards(self, mesh: Mesh) -> int:
        """How many parts the experts are spread over."""
        return math.prod(mesh.shape[axis] for axis in self.expert_axes)


# Hidden widths, heads and vocabulary lie on `tensor` in every preset.
_HIDDEN: dict[str, Axes] = {"F": (TENSOR,)}
_TENSOR: dict[str, Axes] = {"F": (TENSOR,), "H": (TENSOR,), "V": (TENSOR,)}

RULES: dict[str, Rules] = {
    "separate": Rules(
        "A few devices, or experts on one axis and everything else gathered over another.",
        experts={"E": (EXPERT,), "D": (FSDP,), **_HIDDEN},
        others={"D": (FSDP,), **_TENSOR},
    ),
    "folded": Rules(
        "Many experts: fsdp x expert is one axis, over which experts are spread and never gathered.",
        experts={"E": (FSDP, EXPERT), **_HIDDEN},
        others={"D": (FSDP, EXPERT), **_TENSOR},
    ),
    "folded_data": Rules(
        "Most experts and a fast network everywhere: the exchange runs over all batch axes.",
        experts={"E": (DATA, FSDP, EXPERT), **_HIDDEN},
        others={"D": (FSDP, EXPERT), **_TENSOR},
    ),
    "hybrid": Rules(
        "Least memory with few large experts: all parameters over every axis but data (ZeRO-3).",
        experts={"E": (EXPERT,), "D": (FSDP, SEQUENCE), **_HIDDEN},
        others={"D": (FSDP, EXPERT, SEQUENCE), **_TENSOR},
    ),
    "zero1": Rules(
        "Parameters fit, moments do not: only the optimiser's state is cut over fsdp (ZeRO-1).",
        experts={"E": (EXPERT,), **_HIDDEN},
        others=_TENSOR,
        moments="separate",
    ),
}

BATCH_SPEC = PartitionSpec(BATCH_AXES)  # [B ...]
TOKEN_SPEC = PartitionSpec(BATCH_AXES, SEQUENCE)  # [B S ...]


def find_rules(name: str) -> Rules:
    """Returns a row of the table.

    Raises:
        ConfigError: no such preset; names the nearest.
    """
    return find_row(RULES, "mesh.rules", name, "no preset of sharding rules")


def is_stacked(letters: Sequence[str | None]) -> bool:
    """Whether a parameter whose axes these letters name holds one array for each expert."""
    return len(letters) > 1 and letters[0] == "E"


def mesh_axes(part: str | Axes | None) -> Axes:
    """The mesh axes in one entry of a PartitionSpec."""
    return (part,) if isinstance(part, str) else tuple(part or ())


def parameter_spec(letters: Sequence[str | None], ndim: int, rules: Rules) -> PartitionSpec:
    """PartitionSpec of a parameter whose last axes are named by `letters`; axes before them are replicated."""
    table = rules.experts if is_stacked(letters) else rules.others
    named = [None if letter is None else table.get(letter) for letter in letters]
    return PartitionSpec(*([None] * (ndim - len(named))), *named)


def parameter_shardings(state: nnx.State, mesh: Mesh, rules: Rules) -> Any:
    """A pure dict like `nnx.to_pure_dict(state)` with a NamedSharding for each array.

    Raises:
        ConfigError: an axis is not divisible by the sizes of its mesh axes.
    """

    def sharding(path: tuple, variable: nnx.Variable) -> NamedSharding:
        shape = variable.get_value().shape
        spec = parameter_spec(variable.get_metadata().get("axes", ()), len(shape), rules)
        for size, names in zip(shape, spec, strict=True):
            _check_divides(path, shape, size, mesh_axes(names), mesh)
        return NamedSharding(mesh, spec)

    flat = nnx.to_flat_state(state)
    return nnx.to_pure_dict(nnx.from_flat_state([(p, _Leaf(sharding(p, v))) for p, v in flat]))


def _check_divides(path: tuple, shape: Sequence[int], size: int, names: Axes, mesh: Mesh) -> None:
    shards = math.prod(mesh.shape[name] for name in names)
    if size % shards == 0:
        return
    sizes = " x ".join(f"mesh.{name}={mesh.shape[name]}" for name in names)
    product = f"{sizes} = {shards}" if len(names) > 1 else sizes
    raise ConfigError(
        f"{product} does not divide an axis of size {size} of {'/'.join(map(str, path))} "
        f"{tuple(shape)}: choose sizes whose product divides {size}, change the model's size, or choose "
        f"other mesh.rules among {', '.join(RULES)}."
    )


class _Leaf(nnx.Variable):
    """Carries a sharding through NNX's dict conversion."""


def token_spec(mesh: Any, length: int) -> PartitionSpec:
    """How `[B S ...]` is sharded: positions too, where `length` of them can be cut evenly.

    They cannot in generation, one position at a time, nor where a layer picks a number of its own.

    Args:
        mesh: concrete or abstract, with the axes of `moe.axes`.
        length: `S`.
    """
    return BATCH_SPEC if length % mesh.shape[SEQUENCE] else TOKEN_SPEC


def constrain_batch(x: Array) -> Array:
    """Shards an activation `[B S ...]`, or one value a row `[B]`; the identity without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(
        x, BATCH_SPEC if x.ndim == 1 else token_spec(mesh, x.shape[1])
    )


def constrain_rows(x: Array) -> Array:
    """`[B ...]` cut over the batch axes alone; the identity without a mesh.

    For what lies beside the positions of the model and has an axis of its own, as frames do.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, BATCH_SPEC)


def sequence_shards(length: int) -> int:
    """Parts that `length` positions of an activation are cut into; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    return 1 if length % mesh.shape[SEQUENCE] else mesh.shape[SEQUENCE]


def cut_positions(x: Array) -> Array:
    """`[B S ...]` with the positions cut over `sequence`, other axes as they are."""
    return _constrain_positions(x, SEQUENCE)


def gather_positions(x: Array) -> Array:
    """`[B S ...]` with all positions on every device of `sequence`, other axes as they are.

    Each device has computed its own, and gets the gradient of its own (a constraint holds for the
    gradient too).
    """
    return _constrain_positions(cut_positions(x), None)


def _constrain_positions(x: Array, axis: str | None) -> Array:
    if sequence_shards(x.shape[1]) == 1:
        return x
    free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 2)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES, axis, *free))


def token_rows(x: Float[Array, "B S X"]) -> Float[Array, "... X"]:
    """`[T X]` for a product of matrices; `[B S X]` as it is where `S` is sharded.

    XLA:CPU takes about twice as long for the gradients of a product with `B` and `S` apart. Two
    sharded axes cannot be joined without gathering one of them.
    """
    return x if sequence_shards(x.shape[1]) > 1 else x.reshape(-1, x.shape[-1])
