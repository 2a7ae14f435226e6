"""Which devices a collective runs over, and which mesh axes these groups are."""

from functools import lru_cache
import math
import re

import numpy as np

Groups = tuple[tuple[int, ...], ...]

_MESH_AXIS = re.compile(r"'?([\w.\-]+)'?=(\d+)")
_SUB_AXIS = re.compile(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?")


@lru_cache(maxsize=4096)
def parse_groups(text: str, devices: int) -> Groups:
    """Replica groups in any of the three notations of XLA.

    `{{0,1},{2,3}}` lists them; `[2,4]<=[4,2]T(1,0)` reshapes and transposes a range; and
    `mesh['a'=2,'b'=4] {'b'}` names axes of a mesh, `'b':(2)2` meaning a part of one.

    Args:
      text: the attribute's value.
      devices: how many devices run the module; `{}` means one group of all.
    """
    if text.startswith("mesh"):
        return _mesh_groups(text)
    if text.startswith("["):
        shape, source = text.split("<=")
        return _rows(_iota(source).reshape(_integers(shape)))
    rows = re.findall(r"\{([\d,\s]+)\}", text)
    return tuple(_integers(row) for row in rows) or (tuple(range(devices)),)


def axes_of(groups: Groups, mesh_shape: dict[str, int]) -> tuple[str, ...] | None:
    """The mesh axes whose groups these are; None where they are no product of whole axes.

    A compiled step numbers its devices by their place in the flattened mesh.

    Args:
      groups: of partition numbers.
      mesh_shape: size of each axis, outermost first.
    """
    axes = spanned_axes(groups, mesh_shape)
    expected = _axis_groups(tuple(mesh_shape.items()), axes)
    return axes if frozenset(frozenset(group) for group in groups) == expected else None


def spanned_axes(groups: Groups, mesh_shape: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes along which members of one group differ, in the mesh's order."""
    sizes = tuple(mesh_shape.values())
    varies = np.zeros(len(sizes), bool)
    for group in groups:
        places = np.stack(np.unravel_index(np.asarray(group), sizes))
        varies |= (places != places[:, :1]).any(axis=1)
    return tuple(name for name, differs in zip(mesh_shape, varies, strict=True) if differs)


@lru_cache(maxsize=4096)
def _axis_groups(
    mesh: tuple[tuple[str, int], ...], axes: tuple[str, ...]
) -> frozenset[frozenset[int]]:
    names = [name for name, _ in mesh]
    sizes = [size for _, size in mesh]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    last = [names.index(axis) for axis in axes]
    moved = np.moveaxis(ids, last, range(-len(last), 0)) if last else ids[..., None]
    members = math.prod(sizes[place] for place in last)
    return frozenset(frozenset(group) for group in moved.reshape(-1, members).tolist())


def _mesh_groups(text: str) -> Groups:
    found = re.fullmatch(r"mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", text)
    if found is None:
        raise ValueError(f"not replica groups of XLA: {text[:100]!r}")
    mesh, order, chosen = found.groups()
    sizes = {name: int(size) for name, size in _MESH_AXIS.findall(mesh)}
    ids = _iota(order) if order else np.arange(math.prod(sizes.values()))
    return _rows(_grouped(ids, sizes, _SUB_AXIS.findall(chosen)))


def _grouped(
    ids: np.ndarray, sizes: dict[str, int], chosen: list[tuple[str, str, str]]
) -> np.ndarray:
    """One row a group; every axis is split in three: before, chosen and after the part it gives."""
    shape: list[int] = []
    for name, size in sizes.items():
        parts = [(int(pre), int(part)) for axis, pre, part in chosen if axis == name and part]
        before, part = parts[0] if parts else (1, size)
        shape += [before, part, size // before // part]
    middle = [3 * list(sizes).index(axis) + 1 for axis, _, _ in chosen]
    members = math.prod(shape[place] for place in middle)
    moved = np.moveaxis(ids.reshape(shape), middle, range(-len(middle), 0))
    return moved.reshape(-1, members)


def _iota(text: str) -> np.ndarray:
    """`[4,2]T(1,0)`, also behind a shape and `<=`, or a plain list of numbers."""
    found = re.fullmatch(r"(?:\[[\d,]*\]<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?", text.strip())
    if found is None:
        return np.asarray(_integers(text))
    sizes = _integers(found.group(1))
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return (ids.transpose(_integers(found.group(2))) if found.group(2) else ids).reshape(-1)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


def _rows(groups: np.ndarray) -> Groups:
    return tuple(tuple(group) for group in groups.tolist())
