"""One step of a tiny model by every way through the code, each compared with the plainest on one device.

    python3 scripts/invariance.py                          # a cover of the matrix
    python3 scripts/invariance.py --all --routers=topk --meshes=data2_expert4,data2_expert4@2
    python3 scripts/invariance.py --routers=quantile,thor+hot --dispatch=grouped --dtype=bfloat16

A cell is a router (of `moe/invariance_cells.py`, or a preset of `configs/routers.py`; `+hot` sends all
tokens to its first experts), a dispatch, an exchange and a mesh (`:rules` and `@2` processes of 4
devices). It shows the worst relative error of losses, gradients and router state; `!` is a failure, which
a single choice of a token that differs is too. Devices are virtual ones of the CPU.
"""

import functools
import json
from pathlib import Path
import socket
import subprocess
import sys
import tempfile
from typing import Any

from absl import flags
import jax
import numpy as np

from moe import cli, invariance, invariance_cells
from moe.config import import_beside
from moe.dispatch.table import EXCHANGES
from moe.invariance import Difference, Outcome
from moe.invariance_cells import DISPATCHES, HOT, MESHES, ROUTERS, Cell
from moe.parallel import distributed

ROOT = Path(__file__).resolve().parent.parent
DEVICES = 8
COVER = 40

FLAGS = flags.FlagValues()
flags.DEFINE_list("routers", [], "Names; all of the table, and hot ones.", flag_values=FLAGS)
flags.DEFINE_list("dispatch", list(DISPATCHES), "Names of the table.", flag_values=FLAGS)
flags.DEFINE_list("exchange", list(EXCHANGES), "Names.", flag_values=FLAGS)
flags.DEFINE_list("meshes", list(MESHES), "As data2_expert4:folded@2.", flag_values=FLAGS)
flags.DEFINE_enum(
    "dtype", "float32", list(invariance.TOLERANCE), "Of computation.", flag_values=FLAGS
)
flags.DEFINE_bool("all", False, "The product, not a cover of it.", flag_values=FLAGS)
flags.DEFINE_integer("cells", COVER, "Cells of the cover.", flag_values=FLAGS)
flags.DEFINE_string("json", None, "File for the numbers.", flag_values=FLAGS)
flags.DEFINE_string("outcomes", None, "Folder: used between its own processes.", flag_values=FLAGS)
distributed.define_flags(FLAGS)


def main(argv: list[str]) -> int:
    """Returns 0 if every cell is within tolerance, else 1."""
    cli.parse_flags(argv, FLAGS)
    if FLAGS.outcomes is not None:
        return take_part(Path(FLAGS.outcomes))
    invariance_cells.check_names("dispatch", FLAGS.dispatch, DISPATCHES)
    invariance_cells.check_names("exchange", FLAGS.exchange, EXCHANGES)
    routers = FLAGS.routers or [name + hot for name in ROUTERS for hot in ("", HOT)]
    known = settings(routers)
    cells = invariance_cells.all_cells(
        routers, FLAGS.dispatch, FLAGS.exchange, FLAGS.meshes, FLAGS.dtype, known=known
    )
    if not FLAGS.all:
        cells = invariance_cells.cover(cells, FLAGS.cells)
    distributed.start(cpu_devices=DEVICES)
    results = measure(cells, known)
    print(invariance_cells.table(results))
    failed = {c: d for c, d in results.items() if not d.is_within(c.dtype)}
    for cell, difference in failed.items():
        print(invariance_cells.failure_text(cell, difference))
    print(f"{len(results) - len(failed)} of {len(results)} cells are within {tolerance()}")
    if FLAGS.json is not None:
        rows = [c._asdict() | d._asdict() | {"ok": c not in failed} for c, d in results.items()]
        Path(FLAGS.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if failed else 0


def tolerance() -> str:
    """What is allowed, in words."""
    exact = ", with every choice the same" if FLAGS.dtype == "float32" else ""
    return f"{invariance.TOLERANCE[FLAGS.dtype]:.0e} of the oracle in {FLAGS.dtype}{exact}"


def settings(routers: list[str]) -> dict[str, dict[str, Any]]:
    """Arguments of `make_config` for each router, from the table or from the presets."""
    presets = import_beside(str(ROOT / "configs/quickstart.py"), "routers.py")
    names = dict.fromkeys(name.removesuffix(HOT) for name in routers)
    invariance_cells.check_names("routers", names, [*ROUTERS, *presets.PRESETS])
    return {
        name: ROUTERS[name] if name in ROUTERS else invariance.of_preset(presets.apply, name)
        for name in names
    }


def step(cell: Cell, known: dict[str, dict[str, Any]]) -> Outcome:
    """The outcome of one cell on this process's devices, or on those of all processes."""
    config = invariance.make_config(**known[cell.plain_router], **cell.sections)
    return invariance.take_step(config, hot=cell.hot)


def measure(cells: list[Cell], known: dict[str, dict[str, Any]]) -> dict[Cell, Difference]:
    """Every cell against its oracle; those of several processes last."""
    oracle = functools.cache(functools.partial(step, known=known))
    results: dict[Cell, Difference] = {}

    def record(cell: Cell, found: Outcome) -> None:
        results[cell] = invariance.compare(found, oracle(cell.oracle))
        text = invariance_cells.cell_text(cell, results[cell])
        print(f"[{len(results)}/{len(cells)}] {' '.join(cell)}: {text}", file=sys.stderr)

    for cell in cells:
        if cell.processes == 1:
            record(cell, step(cell, known))
    for count in sorted({cell.processes for cell in cells} - {1}):
        shared = [cell for cell in cells if cell.processes == count]
        with tempfile.TemporaryDirectory() as folder:
            together(count, shared, Path(folder))
            for number, cell in enumerate(shared):
                with np.load(Path(folder) / f"{number}.npz", allow_pickle=False) as file:
                    leaves = [file[f"arr_{i}"] for i in range(len(file.files))]
                shape = jax.tree.structure(oracle(cell.oracle))
                record(cell, jax.tree.unflatten(shape, leaves))
    return results


def together(count: int, cells: list[Cell], folder: Path) -> None:
    """Takes the steps of these cells in `count` processes of this program, on loopback."""
    (folder / "cells.json").write_text(json.dumps(cells))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, f"--outcomes={folder}", f"--num_processes={count}"]
    command += [f"--coordinator_address=127.0.0.1:{port}", f"--cpu_devices={DEVICES // count}"]
    children = [
        subprocess.Popen([*command, f"--process_id={i}"], stdout=subprocess.DEVNULL)  # gloo's lines
        for i in range(count)
    ]
    codes = [child.wait() for child in children]
    if any(codes):
        raise RuntimeError(f"the processes ended with codes {codes}; their errors are above")


def take_part(folder: Path) -> int:
    """One of several processes: takes every step with the others; process 0 writes the outcomes."""
    distributed.start_from_flags(FLAGS)
    cells = [Cell(*fields) for fields in json.loads((folder / "cells.json").read_text())]
    known = settings([cell.router for cell in cells])
    for number, cell in enumerate(cells):
        outcome = step(cell, known)
        if jax.process_index() == 0:
            np.savez(folder / f"{number}.npz", *jax.tree.leaves(outcome))
    return 0


if __name__ == "__main__":
    cli.run(main)
