"""How long a step takes at least, by published figures: compute, memory and network, each alone."""

import math
from typing import NamedTuple

from jax.sharding import Mesh

from moe.dryrun.collectives import Collective
from moe.dryrun.figures import Figures


class Roofline(NamedTuple):
    """Seconds a step that each resource is busy at its peak; a step takes the largest at least."""

    compute: float
    memory: float
    network: float
    slow_network: float  # between slices

    @property
    def seconds(self) -> float:
        """If everything overlaps perfectly."""
        return max(self)

    @property
    def bound(self) -> str:
        """The resource that takes longest."""
        return max(self._fields, key=lambda name: getattr(self, name))


def roofline(
    figures: Figures, mesh: Mesh, flops: float, traffic: float, found: list[Collective]
) -> Roofline:
    """Of one device.

    Args:
        figures: of the device.
        mesh: where each device stands; TPUs know their place in the torus.
        flops: of matrix products, a step.
        traffic: bytes to and from main memory, a step.
        found: every collective of the step.
    """
    fast = slow = 0.0
    for each in found:
        if crosses_slices(mesh, each.axes):
            slow += each.count * each.wire_bytes / figures.slice_bandwidth
        else:
            fast += each.count * collective_seconds(figures, mesh, each)
    return Roofline(flops / figures.flops, traffic / figures.memory_bandwidth, fast, slow)


def collective_seconds(figures: Figures, mesh: Mesh, each: Collective) -> float:
    """Of one collective on a torus or behind one switch.

    Rings along all axes of the torus that the group spans work at once. In an all-to-all over a ring of
    `n` a row travels `n / 4` links on average, both ways round used (Austin et al. 2025, How to Scale
    Your Model, part 3: a quarter of an all-gather's time for the same array).
    """
    extents = torus_extents(mesh, each.axes)
    if not extents:
        return each.wire_bytes / figures.axis_bandwidth
    if each.kind in ("all-to-all", "ragged-all-to-all"):
        hops = max(max(size / 4, 1.0) for size in extents)
        return each.operand_bytes * hops / figures.axis_bandwidth
    if each.kind == "collective-permute":
        return each.wire_bytes / figures.axis_bandwidth
    return each.wire_bytes / (figures.axis_bandwidth * len(extents))


def torus_extents(mesh: Mesh, axes: tuple[str, ...]) -> list[int]:
    """Size along each axis of the torus of a group of devices that these mesh axes span."""
    group = _group(mesh, axes)
    if not hasattr(group[0], "coords"):
        return []
    places = zip(*(device.coords for device in group), strict=True)
    return [size for size in (len(set(place)) for place in places) if size > 1]


def crosses_slices(mesh: Mesh, axes: tuple[str, ...]) -> bool:
    """Whether these mesh axes join devices of different slices."""
    indices = {getattr(device, "slice_index", None) for device in _group(mesh, axes)}
    return len(indices) > 1


def _group(mesh: Mesh, axes: tuple[str, ...]) -> list:
    index = tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)
    return list(mesh.devices[index].reshape(-1)) if axes else [mesh.devices.flat[0]]


def utilisation(figures: Figures, useful: float, seconds: float) -> float:
    """Share of the peak that useful FLOPs of a device reach in this time."""
    return useful / (figures.flops * seconds) if seconds and math.isfinite(seconds) else 0.0
