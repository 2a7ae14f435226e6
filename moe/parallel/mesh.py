"""The device mesh, and the processes that share it."""

from collections.abc import Mapping, Sequence
import math

import jax
from jax.sharding import AxisType, Mesh
import numpy as np

from moe.axes import BATCH_AXES, MESH_AXES
from moe.errors import ConfigError


def make_mesh(
    *,
    data: int = -1,
    fsdp: int = 1,
    expert: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Mesh of all devices with the axes of `moe.axes`; one size may be -1 and takes what is left.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = resolve_sizes([data, fsdp, expert, tensor], len(devices))
    grid = np.asarray(devices).reshape(sizes)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


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


def fits(sizes: Mapping[str, int], count: int) -> bool:
    """Whether a `mesh` section can be laid over `count` devices."""
    try:
        resolve_sizes([sizes[name] for name in MESH_AXES], count)
    except ConfigError:
        return False
    return True


def batch_shards(mesh: Mesh) -> int:
    """Number of pieces that the global batch is cut into."""
    return math.prod(mesh.shape[name] for name in BATCH_AXES)
