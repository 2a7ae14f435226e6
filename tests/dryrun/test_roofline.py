"""Seconds by published figures, on devices that stand in a torus."""

import itertools
from typing import Any

import jax
import pytest

from moe.dryrun.collectives import Collective
from moe.dryrun.figures import FIGURES, Figures
from moe.dryrun.roofline import (
    Roofline,
    collective_seconds,
    crosses_slices,
    roofline,
    torus_extents,
    utilisation,
)
from tests.dryrun.common import chip, mesh_of

ROUND = Figures(
    flops=1e12,
    memory=1e9,
    memory_bandwidth=1e11,
    axis_bandwidth=1e10,
    slice_bandwidth=1e9,
    source="",
)
TORUS = mesh_of(
    [chip(x, y, 0) for x, y in itertools.product(range(4), range(8))], data=1, fsdp=4, expert=8
)


def collective(kind: str, *axes: str, read: int = 0, wire: int = 0, count: int = 1) -> Collective:
    more: dict[str, Any] = dict.fromkeys(Collective._fields)
    more |= {"kind": kind, "axes": axes, "operand_bytes": read, "wire_bytes": wire, "count": count}
    return Collective(**more)


@pytest.mark.parametrize(
    ("axes", "extents"),
    [(("fsdp",), [4]), (("expert",), [8]), (("fsdp", "expert"), [4, 8]), (("data",), []), ((), [])],
)
def test_extents_along_the_torus(axes, extents):
    assert torus_extents(TORUS, axes) == extents


def test_a_mesh_axis_may_lie_on_two_axes_of_the_torus():
    chips = [chip(x, y, z) for x, y, z in itertools.product(range(2), range(4), range(2))]
    assert torus_extents(mesh_of(chips, expert=8, fsdp=2), ("expert",)) == [2, 4]


def test_devices_behind_a_switch_have_no_place():
    mesh = mesh_of(jax.devices()[:4], expert=4)
    assert torus_extents(mesh, ("expert",)) == []
    assert (
        collective_seconds(ROUND, mesh, collective("all-to-all", "expert", read=4000, wire=3000))
        == 3e-7
    )


def test_a_ring_on_each_axis_at_once():
    one = collective("all-gather", "expert", wire=10**9)
    both = collective("all-gather", "fsdp", "expert", wire=10**9)
    assert collective_seconds(ROUND, TORUS, one) == pytest.approx(0.1)
    assert collective_seconds(ROUND, TORUS, both) == pytest.approx(0.05)
    alone = collective("collective-permute", "fsdp", "expert", wire=10**9)
    assert collective_seconds(ROUND, TORUS, alone) == pytest.approx(0.1)


@pytest.mark.parametrize("kind", ["all-to-all", "ragged-all-to-all"])
def test_rows_of_an_all_to_all_travel_a_quarter_of_the_ring(kind):
    size = 10**9
    assert collective_seconds(ROUND, TORUS, collective(kind, "expert", read=size)) == pytest.approx(
        0.2
    )
    assert collective_seconds(ROUND, TORUS, collective(kind, "fsdp", read=size)) == pytest.approx(
        0.1
    )
    longest = collective(kind, "fsdp", "expert", read=size)
    assert collective_seconds(ROUND, TORUS, longest) == pytest.approx(0.2)
    # A quarter of an all-gather of the same array, for a long ring.
    ring = mesh_of([chip(x, 0, 0) for x in range(64)], expert=64)
    gather = collective("all-gather", "expert", wire=63 * size)
    ratio = collective_seconds(
        ROUND, ring, collective(kind, "expert", read=size)
    ) / collective_seconds(ROUND, ring, gather)
    assert ratio == pytest.approx(0.25, rel=0.02)


def test_what_leaves_a_slice_goes_over_the_slow_network():
    two = mesh_of(
        [chip(x, 0, 0, slice_index=s) for s, x in itertools.product(range(2), range(4))],
        data=2,
        fsdp=4,
    )
    assert crosses_slices(two, ("data",))
    assert crosses_slices(two, ("data", "fsdp"))
    assert not crosses_slices(two, ("fsdp",))
    found = [
        collective("all-reduce", "data", wire=10**9, count=2),
        collective("all-gather", "fsdp", wire=10**9, count=3),
    ]
    line = roofline(ROUND, two, flops=2e12, traffic=1e11, found=found)
    assert line == pytest.approx(Roofline(compute=2.0, memory=1.0, network=0.3, slow_network=2.0))
    assert line.seconds == 2.0
    assert line._replace(memory=5.0).bound == "memory"


def test_utilisation():
    assert utilisation(ROUND, 5e11, 1.0) == 0.5
    assert utilisation(ROUND, 5e11, 0.0) == 0.0


def test_figures_are_of_plausible_size():
    for kind, figures in FIGURES.items():
        assert 100 < figures.flops / figures.memory_bandwidth < 1000, kind
        assert figures.slice_bandwidth < figures.axis_bandwidth < figures.memory_bandwidth, kind
        assert figures.source.startswith("https://"), kind
