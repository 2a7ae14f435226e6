"""Planned runs of a tiny model, and fake devices that know their place."""

import math
from types import SimpleNamespace

import jax
from jax.sharding import Mesh
import numpy as np

from moe import setup
from moe.dryrun import build
from moe.dryrun.targets import Target
from tests import tiny

TINY = ("data.sequence_length=16", "data.batch_size=16")


def target() -> Target:
    return Target("cpu-8", "cpu", jax.devices("cpu")[:8], 1, None)


def planned(*overrides: str, **mesh: int) -> setup.Run:
    """The tiny model on eight devices, those that `mesh` leaves along `data`; nothing compiles."""
    sizes = {"data": 8 // math.prod(mesh.values()), **mesh}
    over = [f"mesh.{name}={size}" for name, size in sizes.items()]
    return build.plan(tiny.config(*TINY, *over, *overrides), target())


def chip(*coords: int, slice_index: int = 0) -> SimpleNamespace:
    return SimpleNamespace(coords=coords, slice_index=slice_index)


class FakeMesh(Mesh):
    """A mesh of any objects."""

    def __new__(cls, devices: np.ndarray, axis_names: tuple[str, ...]) -> "FakeMesh":
        mesh = object.__new__(cls)
        vars(mesh).update(devices=devices, axis_names=axis_names, size=devices.size)  # frozen
        return mesh


def mesh_of(devices: list, **sizes: int) -> Mesh:
    array = np.empty(len(devices), object)
    array[:] = devices
    return FakeMesh(array.reshape(tuple(sizes.values())), tuple(sizes))
