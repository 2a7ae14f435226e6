"""The matrix of ways to take one step: router x dispatch x exchange x mesh, and a cover of it."""

from collections.abc import Iterable, Mapping, Sequence
import itertools
import math
import re
from typing import Any, NamedTuple

from moe.axes import MESH_AXES
from moe.dispatch.table import EXCHANGES
from moe.errors import ConfigError, did_you_mean
from moe.invariance import Difference
from moe.parallel.rules import find_rules
from moe.routing.table import ROUTERS as ROUTER_TABLE

# Arguments of `make_config`: learned and not, softmax and sigmoid, noise, state, and each kind of plan.
_SECTIONS: tuple[dict[str, Any], ...] = (
    {"name": "topk", "k": 2},
    {"name": "switch", "k": 1, "jitter": 0.01},
    {"name": "deepseek_v3", "k": 2, "groups": 4, "groups_kept": 2, "bias_rate": 0.01},
    {"name": "random", "k": 2},
    {"name": "hash", "k": 2},
    {"name": "expert_choice", "k": 2},
    {"name": "soft_moe", "k": 1},
)
ROUTERS: dict[str, dict[str, Any]] = {one["name"]: {"router": one} for one in _SECTIONS}
HOT = "+hot"  # after a router's name: all tokens ask for its first experts, the others get none

# Options of `dispatch`. Some have token groups of 4 positions, which lie on one device of every mesh.
DISPATCHES: dict[str, dict[str, Any]] = {
    "grouped": {"name": "grouped"},
    "grouped_chunks": {"name": "grouped", "chunks": 2},
    "capacity": {"name": "capacity", "capacity_factor": 0.75},
    "capacity_groups": {"name": "capacity", "capacity_factor": 0.75, "group": 4},
    "capacity_large": {"name": "capacity", "capacity_factor": 64.0},  # more slots than tokens
    "capacity_gate": {
        "name": "capacity",
        "capacity_factor": 0.75,
        "group": 4,
        "priority": "gate",
        "renormalize": True,
    },
    "einsum": {"name": "einsum", "capacity_factor": 0.75, "group": 4},
    "reference": {"name": "reference"},
}
_TWINS = {"einsum": "capacity_groups"}  # drops the same choices

# Sizes of the mesh, `:rules` if not the default, and `@2` for two processes.
MESHES = (
    "1",
    "data2",
    "data4",
    "data8",
    "data2_expert2",
    "data2_expert4",
    "fsdp2_expert4",
    "expert4_tensor2",
    "data2_expert2_tensor2",
    "sequence2",
    "data2_expert2_sequence2",
    "data4_expert2_slices2",
    "fsdp2_expert4:folded",
    "data2_fsdp2_expert2:folded_data",
    "fsdp2_expert2_sequence2:hybrid",
    "fsdp4_expert2:zero1",
    "data8@2",
    "data2_expert4@2",
    "expert4_tensor2@2",
)


class Cell(NamedTuple):
    """One way: names of `ROUTERS`, `DISPATCHES`, `EXCHANGES`, and a mesh as `MESHES` writes them."""

    router: str
    dispatch: str
    exchange: str
    mesh: str
    dtype: str = "float32"

    @property
    def processes(self) -> int:
        """How many take the step together."""
        return parse_mesh(self.mesh)[1]

    @property
    def hot(self) -> bool:
        """Whether one expert gets everything."""
        return self.router.endswith(HOT)

    @property
    def plain_router(self) -> str:
        """The router's name alone."""
        return self.router.removesuffix(HOT)

    @property
    def sections(self) -> dict[str, Any]:
        """Arguments of `make_config`, beside those of the router."""
        dispatch = DISPATCHES[self.dispatch] | {"exchange": self.exchange}
        return {"dispatch": dispatch, "mesh": parse_mesh(self.mesh)[0], "dtype": self.dtype}

    @property
    def oracle(self) -> "Cell":
        """The plainest way of the same meaning, on one device."""
        drops = DISPATCHES[self.dispatch].get("capacity_factor", math.inf) < 1.0
        plainest = _TWINS.get(self.dispatch, self.dispatch) if drops else "reference"
        return self._replace(dispatch=plainest, exchange="auto", mesh="1")


def parse_mesh(text: str) -> tuple[dict[str, Any], int]:
    """`data2_expert4:folded@2` -> the `mesh` section, and the number of processes.

    Raises:
        ConfigError: no such axis or preset.
    """
    body, _, processes = text.partition("@")
    sizes, _, rules = body.partition(":")
    section: dict[str, Any] = {"data": 1}
    for part in [] if sizes == "1" else sizes.split("_"):
        found = re.fullmatch(r"([a-z]+)(\d+)", part)
        if found is None or found[1] not in (*MESH_AXES, "slices"):
            raise ConfigError(
                f"mesh {text!r}: {part!r} is no axis with its size. Write data2_expert4, with "
                f":folded for other rules and @2 for two processes; axes are {', '.join(MESH_AXES)}."
            )
        section[found[1]] = int(found[2])
    if rules:
        find_rules(rules)
        section["rules"] = rules
    return section, int(processes or 1)


def is_possible(cell: Cell, routers: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the cell says anything that another one does not.

    An exchange needs experts on several devices, and a token group of a whole row needs the row on
    one. Soft plans and slots have one path each, whatever the dispatch is called.
    """
    section, _ = parse_mesh(cell.mesh)
    shards = math.prod(
        section.get(axis, 1) for axis in find_rules(section.get("rules", "separate")).expert_axes
    )
    plain = cell.exchange == "auto"
    row = ROUTER_TABLE[routers[cell.plain_router]["router"]["name"]]
    if row.plan != "choices":
        return plain and cell.dispatch == "grouped" and not cell.hot
    if cell.hot and not (row.learned or row.stateful):
        return False
    options = DISPATCHES[cell.dispatch]
    path = options["name"]
    if path == "capacity" and "group" not in options and section.get("sequence", 1) > 1:
        return False
    return plain or (shards > 1 and path in EXCHANGES[cell.exchange])


def all_cells(
    routers: Iterable[str],
    dispatches: Iterable[str],
    exchanges: Iterable[str],
    meshes: Iterable[str],
    dtype: str = "float32",
    *,
    known: Mapping[str, Mapping[str, Any]] = ROUTERS,
) -> list[Cell]:
    """The product, without what is impossible."""
    product = itertools.product(routers, dispatches, exchanges, meshes)
    cells = [Cell(*names, dtype) for names in product]
    return [cell for cell in cells if is_possible(cell, known)]


def cover(cells: Sequence[Cell], count: int) -> list[Cell]:
    """At most `count` of the cells, chosen to hold as many pairs of values as they can.

    Greedy: each time the cell with most pairs that no cell before it holds; the first of equals.
    """
    left, seen, chosen = dict.fromkeys(cells), set(), []
    while left and len(chosen) < count:
        best = max(left, key=lambda cell: len(_pairs(cell) - seen))
        if not _pairs(best) - seen:
            break
        seen |= _pairs(best)
        chosen.append(best)
        del left[best]
    return chosen


def _pairs(cell: Cell) -> set[tuple]:
    """Values two by two, a value alone counting too: rare ones come first."""
    fields = list(cell._asdict().items())[:4]
    return {*itertools.combinations(fields, 2), *((field,) for field in fields)}


def check_names(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raises ConfigError for a name that is not known; tells the nearest."""
    known = list(known)
    for name in names:
        if name not in known:
            raise ConfigError(
                f"--{kind}={name!r} is unknown{did_you_mean(name, known)}; there are {', '.join(known)}."
            )


def table(results: Mapping[Cell, Difference]) -> str:
    """The matrix in text: worst relative error of each cell, `!` where it is too large.

    A row for each router, dispatch and exchange; a column for each mesh; a dot where nothing ran.
    """
    meshes = list(dict.fromkeys(cell.mesh for cell in results))
    meshes.sort(key=lambda mesh: MESHES.index(mesh) if mesh in MESHES else len(MESHES))
    by_row: dict[tuple[str, str, str], dict[str, str]] = {}
    for cell, difference in sorted(results.items()):
        row = by_row.setdefault((cell.router, cell.dispatch, cell.exchange), {})
        row[cell.mesh] = cell_text(cell, difference)
    legend = [f"  {letter} {mesh}" for letter, mesh in zip(_letters(), meshes, strict=False)]
    left = [
        " ".join(f"{name:<{width}}" for name, width in zip(row, WIDTHS, strict=True))
        for row in by_row
    ]
    header = " " * len(left[0]) + "".join(
        f"{x:>9}" for x, _ in zip(_letters(), meshes, strict=False)
    )
    lines = [
        name + "".join(f"{row.get(mesh, '.'):>9}" for mesh in meshes)
        for name, row in zip(left, by_row.values(), strict=True)
    ]
    return "\n".join(["meshes:", *legend, "", header, *lines])


WIDTHS = (15, 14, 10)


def _letters() -> Iterable[str]:
    return "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def cell_text(cell: Cell, difference: Difference) -> str:
    """`2.1e-07`, with `!` if that is too much or a choice differs."""
    return f"{difference.worst:.1e}{'' if difference.is_within(cell.dtype) else '!'}"


def failure_text(cell: Cell, difference: Difference) -> str:
    """One line of what differs, and how to see it alone."""
    return (
        f"{cell.router} {cell.dispatch} {cell.exchange} {cell.mesh} {cell.dtype}: loss "
        f"{difference.loss:.1e}, gradient {difference.gradient:.1e}, router state {difference.state:.1e}, "
        f"{difference.choices} choices differ"
    )
