"""The same numbers on every mesh: loss, gradients, drops and router state after a step.

`scripts/invariance.py` prints the whole matrix.
"""

import functools
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import routers
from moe import invariance, setup
from moe.cli import complete_config
from moe.config import ConfigDict
from moe.dispatch.table import EXCHANGES
from moe.errors import ConfigError
from moe.invariance import VOCAB, Outcome, base_config, compare, dropped
from moe.invariance_cells import (
    DISPATCHES,
    HOT,
    MESHES,
    ROUTERS,
    Cell,
    all_cells,
    check_names,
    cover,
    failure_text,
    parse_mesh,
    table,
)
from moe.training.state import initialize
from tests.parallel.test_processes import ROOT

__all__ = ["VOCAB", "base_config"]  # for the tests of other parts

# Router and dispatch of the cases that tests of other parts run too.
CASES = {
    "topk_grouped": ("topk", "grouped"),
    "topk_capacity": ("topk", "capacity"),
    "switch_capacity": ("switch", "capacity"),
    "deepseek_v3_grouped": ("deepseek_v3", "grouped"),
    "random_grouped": ("random", "grouped"),
    "hash_capacity": ("hash", "capacity"),
}


def config_of(case: str) -> ConfigDict:
    """Of a case, or of a preset of a router."""
    if case in routers.PRESETS:
        return invariance.make_config(**invariance.of_preset(routers.apply, case))
    router, dispatch = CASES[case]
    return invariance.make_config(**ROUTERS[router], dispatch=DISPATCHES[dispatch])


def step_of(config: ConfigDict, sizes: dict[str, int]) -> Outcome:
    """The step on a mesh of these sizes."""
    pairs = {"data": 1, **sizes}
    mesh = [(f"mesh.{name}", str(size)) for name, size in pairs.items()]
    return invariance.take_step(complete_config(config, mesh))


@functools.cache
def alone(case: str) -> Outcome:
    return step_of(config_of(case), {})


def same_step(one: Outcome, another: Outcome) -> None:
    difference = compare(another, one)
    assert difference.is_within("float32"), difference
    if one.told.totals is not None:
        np.testing.assert_array_equal(another.told.totals.requested, one.told.totals.requested)
        np.testing.assert_array_equal(another.told.totals.kept, one.told.totals.kept)


@functools.cache
def outcome(cell: Cell) -> Outcome:
    config = invariance.make_config(**ROUTERS[cell.plain_router], **cell.sections)
    return invariance.take_step(config, hot=cell.hot)


NAMES = [name + hot for name in ROUTERS for hot in ("", HOT)]
HERE = [mesh for mesh in MESHES if parse_mesh(mesh)[1] == 1]
EVERY = all_cells(NAMES, DISPATCHES, EXCHANGES, HERE, known=ROUTERS)
CELLS = cover(EVERY, 60)
QUICK = 9  # the others are marked slow


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(c, id="-".join(c[:4]), marks=[] if i < QUICK else pytest.mark.slow)
        for i, c in enumerate(CELLS)
    ],
)
def test_one_step_is_the_same_in_every_way(cell):
    found, wanted = outcome(cell), outcome(cell.oracle)
    difference = compare(found, wanted)
    assert difference.is_within(cell.dtype), failure_text(cell, difference)
    assert (dropped(wanted) > 0) == ("reference" not in cell.oracle.dispatch)


def test_quick_cells_have_every_value():
    """Of routers' kinds, dispatches, exchanges and devices' axes."""
    some = CELLS[:QUICK]
    assert {cell.exchange for cell in some} == set(EXCHANGES)
    assert {cell.dispatch for cell in some} == set(DISPATCHES)
    assert {cell.plain_router for cell in some} >= {"topk", "switch", "deepseek_v3", "hash"}
    assert {cell.hot for cell in some} == {True, False}
    assert len({cell.mesh for cell in some}) == QUICK


def test_hot_routers_leave_experts_empty():
    found = outcome(Cell("topk+hot", "reference", "auto", "1"))
    assert set(np.unique(found.choices)) == {-1, 0, 1}  # -1 is padding


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["topk-capacity", "deepseek_v3-grouped"])
def test_bfloat16_is_near(cell):
    one = Cell(*cell.split("-"), "auto", "data2_expert2_tensor2", "bfloat16")
    difference = compare(outcome(one), outcome(one.oracle))
    assert difference.is_within("bfloat16"), failure_text(one, difference)


# The one whose plan is most unlike choices; the others are marked slow.
PRESETS = {"soft_moe"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in PRESETS else pytest.mark.slow) for n in routers.PRESETS],
)
def test_every_router_is_the_same_on_a_mesh(name):
    same_step(alone(name), step_of(config_of(name), {"data": 2, "expert": 2, "tensor": 2}))


def test_fresh_numbers_are_the_same_on_a_mesh():
    config = invariance.make_config(**ROUTERS["topk"], mesh=parse_mesh("fsdp2_expert4")[0])
    mesh = setup.mesh_of(config)
    run = setup.assemble(config, mesh, vocab_size=VOCAB)
    make = jax.jit(
        lambda key: initialize(run.spec, run.transformation, key), out_shardings=run.shardings
    )
    with jax.set_mesh(mesh):
        found = jax.device_get(make(setup.root_key(0, 0)))
    wanted = invariance._numbers(run.spec, config.optimizer.b1, False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, wanted)


def test_the_matrix_is_printed_with_two_processes(tmp_path):
    """The script itself, on 2 processes of 4 devices."""
    command = [sys.executable, "scripts/invariance.py", "--routers=topk", "--all"]
    command += ["--dispatch=capacity", "--exchange=all_to_all", "--meshes=data2_expert4@2"]
    done = subprocess.run(
        [*command, f"--json={tmp_path / 'cells.json'}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "1 of 1 cells are within 1e-05 of the oracle" in done.stdout
    (row,) = json.loads((tmp_path / "cells.json").read_text())
    assert row["ok"]
    assert row["choices"] == 0
    assert 0 < row["gradient"] < 1e-5


def test_a_difference_is_seen():
    one = alone("topk_capacity")
    assert compare(one, one) == (0.0, 0.0, 0.0, 0)
    assert one.choices is not None
    choices = one.choices.copy()
    choices[0, 0, 0, 0] += 1
    gradient = jax.tree.map(np.copy, one.gradient)
    jax.tree.leaves(gradient)[0].flat[0] += 1.0
    losses = one.told.losses | {"balance": one.told.losses["balance"] * 1.0001}
    for wrong in (
        one._replace(choices=choices),
        one._replace(gradient=gradient),
        one._replace(told=one.told._replace(losses=losses)),
        one._replace(gradient=jax.tree.map(lambda a: a * np.nan, one.gradient)),
    ):
        difference = compare(wrong, one)
        assert not difference.is_within("float32")
        cell = Cell("topk", "capacity", "auto", "1")
        assert "!" in table({cell: difference})
    hidden = compare(one._replace(choices=choices), one)
    assert hidden.is_within("bfloat16")  # rounding may turn a choice that was nearly a tie
    assert hidden.choices == 1


def test_cells_by_name():
    section = {"data": 2, "expert": 4, "rules": "folded"}
    assert parse_mesh("data2_expert4:folded@2") == (section, 2)
    assert parse_mesh("1") == ({"data": 1}, 1)
    with pytest.raises(ConfigError, match="'pipe2' is no axis"):
        parse_mesh("data2_pipe2")
    with pytest.raises(ConfigError, match=r"'groupd'.*did you mean 'grouped'"):
        check_names("dispatch", ["groupd"], DISPATCHES)
    assert Cell("topk", "einsum", "auto", "data8").oracle.dispatch == "capacity_groups"
    assert Cell("topk", "capacity_large", "ragged", "data8").oracle == (
        *("topk", "reference", "auto", "1", "float32"),
    )


def test_cover_leaves_out_nothing():
    for i, values in enumerate(zip(*(c[:4] for c in EVERY), strict=True)):
        assert {cell[i] for cell in CELLS} == set(values)
    assert len(set(CELLS)) == len(CELLS) == 60
