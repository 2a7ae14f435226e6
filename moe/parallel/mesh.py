"""The device mesh: which device stands where on the five axes.

| axis | what crosses it, in every layer unless said otherwise | network |
|---|---|---|
| `data` | gradients, once a step | the slow one, between slices |
| `fsdp` | parameters before their use, their gradients after | fast |
| `expert` | tokens to their experts and back, all to all | fast |
| `sequence` | keys and values of attention | fast |
| `tensor` | activations after each pair of products: the most | fastest, neighbours |

The order of `MESH_AXES` is the order of this table, so that the last axes get the nearest devices.
"""

from collections.abc import Mapping, Sequence
import math
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh
import numpy as np

from moe.axes import BATCH_AXES, MESH_AXES
from moe.errors import ConfigError


def make_mesh(
    *,
    data: int = -1,
    fsdp: int = 1,
    expert: int = 1,
    sequence: int = 1,
    tensor: int = 1,
    slices: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Mesh of all devices with the axes of `moe.axes`; one size may be -1 and takes what is left.

    On a TPU each axis follows the wires of the torus; elsewhere devices keep their order.

    Args:
        data: size of the axis `data`, over all slices.
        fsdp: size of `fsdp`.
        expert: size of `expert`.
        sequence: size of `sequence`.
        tensor: size of `tensor`.
        slices: parts of the machine that a slow network joins (TPU slices, hosts of GPUs). `data`
            is the axis that crosses it, the others stay inside a slice. Where devices do not know
            their slice, as many consecutive devices as fit are one.
        devices: to use; None uses all.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices, or do not fit the slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = resolve_sizes([data, fsdp, expert, sequence, tensor], len(devices))
    groups = split_slices(devices, slices)
    if sizes[0] % slices:
        raise ConfigError(
            f"mesh.data={sizes[0]} is not divisible by mesh.slices={slices}: data is the axis that crosses "
            "the slow network between slices, so each slice holds an equal part of it. Make mesh.data a "
            f"multiple of {slices}, and the other axes small enough to fit into one slice of "
            f"{len(devices) // slices} devices."
        )
    sizes[0] //= slices
    # Whole axes of the torus where they fit, parts of one where they do not.
    grids = [
        mesh_utils.create_device_mesh(sizes, group, allow_split_physical_axes=True)
        for group in groups
    ]
    return Mesh(np.concatenate(grids), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def split_slices(devices: list[Any], slices: int) -> list[list[Any]]:
    """The devices of each slice, by the index that devices carry, else in consecutive blocks."""
    if slices < 1 or len(devices) % slices:
        raise ConfigError(
            f"mesh.slices={slices} must be at least 1 and divide the number of devices, {len(devices)}."
        )
    index = [getattr(device, "slice_index", 0) for device in devices]
    known = sorted(set(index))
    if len(known) == 1 and devices[0].platform != "tpu":
        size = len(devices) // slices
        return [devices[i * size : (i + 1) * size] for i in range(slices)]
    if len(known) != slices:
        raise ConfigError(
            f"mesh.slices={slices}, but the number of slices that the devices lie in is {len(known)}: set "
            f"mesh.slices={len(known)}."
        )
    return [[d for d, i in zip(devices, index, strict=True) if i == one] for one in known]


def resolve_sizes(sizes: Sequence[int], count: int) -> list[int]:
    """Axis sizes with the -1 filled in, so that their product is `count`."""
    named = ", ".join(f"mesh.{n}={s}" for n, s in zip(MESH_AXES, sizes, strict=True))
    if any(s < 1 and s != -1 for s in sizes) or list(sizes).count(-1) > 1:
        raise ConfigError(f"{named}: sizes are positive, and at most one is -1 (what is left).")
    fixed = math.prod(s for s in sizes if s != -1)
    filled = [count // fixed if s == -1 else s for s in sizes]
    if count % fixed or math.prod(filled) != count:
        raise ConfigError(
            f"{named}: the sizes multiply to {fixed}, but there are {count} devices. Set one axis to -1 "
            f"to take what is left, or start with --cpu_devices={fixed} to use virtual CPU devices."
        )
    return filled


def fits(section: Mapping[str, Any], count: int) -> bool:
    """Whether a `mesh` section of the config can be laid over `count` devices."""
    try:
        sizes = resolve_sizes([section[name] for name in MESH_AXES], count)
    except ConfigError:
        return False
    return sizes[0] % section["slices"] == 0


def batch_shards(mesh: Mesh) -> int:
    """Number of pieces that the rows of the global batch are cut into."""
    return math.prod(mesh.shape[name] for name in BATCH_AXES)
