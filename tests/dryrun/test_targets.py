"""Names of what to compile for."""

import math
from types import SimpleNamespace

import jax
from jax.experimental import topologies
import pytest

from moe.dryrun import targets
from moe.dryrun.figures import FIGURES
from moe.dryrun.targets import TPU_SHAPES, find_target
from moe.errors import ConfigError


@pytest.fixture
def asked(monkeypatch):
    """A TPU compiler that makes any slice, and what it was asked for."""
    calls = []

    def describe(*, platform, topology_name, num_slices=1):
        calls.append((platform, topology_name, num_slices))
        chips = math.prod(int(n) for n in topology_name.split(":")[1].split("x"))
        return SimpleNamespace(devices=jax.devices()[:1] * (num_slices * chips))

    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    return calls


@pytest.mark.parametrize(
    ("name", "kind", "topology", "devices", "slices"),
    [
        ("v5p-128", "v5p", "v5p:4x4x4", 64, 1),  # cores, two a chip
        ("v5p:4x4x4", "v5p", "v5p:4x4x4", 64, 1),
        ("V5E-64 ", "v5e", "v5e:8x8", 64, 1),
        ("v6e-256", "v6e", "v6e:16x16", 256, 1),
        ("2*v5e:4x4", "v5e", "v5e:4x4", 32, 2),
        ("v5e:2x2", "v5e", "v5e:2x2", 4, 1),
    ],
)
def test_tpu_names(asked, name, kind, topology, devices, slices):
    found = find_target(name)
    assert asked == [("tpu", topology, slices)]
    assert (found.kind, len(found.devices), found.slices) == (kind, devices, slices)
    assert found.figures is FIGURES[kind]


def test_shapes_have_as_many_chips_as_their_name_says():
    for kind, shapes in TPU_SHAPES.items():
        for number, shape in shapes.items():
            chips = math.prod(int(n) for n in shape.split("x"))
            assert number == chips * (2 if kind == "v5p" else 1)


def test_cpu():
    found = find_target("cpu-4")
    assert found.devices == jax.devices("cpu")[:4]
    assert found.figures is None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5e", "is not KIND:AxB or KIND-COUNT"),
        ("v5e:4", "is not KIND:AxB or KIND-COUNT"),
        ("v5q-64", "no device is called 'v5q'; the nearest is 'v5"),
        ("h10-8", "the nearest is 'h100'"),
        ("v5e-48", r"no slice of v5e has 48 chips\. There are v5e-4 \(2x2\), .*v5e-256 \(16x16\)"),
        ("v5p-64x", "is not KIND"),
        ("v5p-100", "no slice of v5p has 100 cores, two a chip.*as v5p:2x2x2"),
        ("h100:2x4", "only TPUs have a shape and slices"),
        ("2*h100-8", "only TPUs have a shape and slices"),
        ("cpu-0", "names no device at all"),
        ("0*v5e-16", "names no device at all"),
        ("cpu-4096", "this process has 8 CPU devices"),
    ],
)
def test_refused(asked, name, said):
    with pytest.raises(ConfigError, match=said):
        find_target(name)
    assert asked == []


@pytest.mark.parametrize(
    "error", [RuntimeError("no libtpu\nand a trace"), NotImplementedError(""), ValueError("shape")]
)
def test_missing_compiler_says_what_to_install(monkeypatch, error):
    def describe(**_):
        raise error

    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    with pytest.raises(
        ConfigError, match=r"v5e:4x4 cannot be compiled for here: .*\[tpu\]"
    ) as told:
        find_target("v5e-16")
    assert "trace" not in str(told.value)
    assert "\n" not in str(told.value)


def test_first_line_of_a_long_error():
    assert targets._first_line(ValueError("x" * 1000)) == "x" * 300
    assert targets._first_line(KeyError()) == "KeyError"
