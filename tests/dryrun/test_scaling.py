"""The public shapes of configs/scaling.py lie on the meshes that they name; the page says what holds."""

import math
from pathlib import Path

from flax import nnx
import jax
import pytest

from configs.scaling import RUNS, get_config
from moe import setup
from moe.axes import MESH_AXES
from moe.cli import complete_config
from moe.dryrun import build
from moe.dryrun.figures import FIGURES
from moe.errors import ConfigError
from moe.model.build import model_spec
from moe.parallel.rules import find_rules, parameter_spec
from moe.training.state import make_skeleton
from tests.dryrun.common import mesh_of

PAGE = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
DEVICES = {
    "olmoe_1b_7b": 64,
    "mixtral_8x7b": 64,
    "qwen3_30b_a3b": 256,
    "deepseek_v3_gqa": 2048,
    "mixtral_8x7b_h100": 8,
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_lies_on_its_mesh(name):
    config = complete_config(get_config(name), [])
    sizes = {axis: config.mesh[axis] for axis in MESH_AXES}
    mesh = mesh_of(jax.devices()[:1] * math.prod(sizes.values()), **sizes)
    assert mesh.size == DEVICES[name]
    setup.check_layout(config, mesh)
    skeleton = make_skeleton(model_spec(config, build.vocabulary(config)))
    rules = find_rules(config.mesh.rules)
    for path, variable in nnx.to_flat_state(skeleton.params):
        shape, letters = variable.get_value().shape, variable.get_metadata().get("axes", ())
        for size, axes in zip(shape, parameter_spec(letters, len(shape), rules), strict=True):
            names = (axes,) if isinstance(axes, str) else axes or ()
            assert size % math.prod(sizes[axis] for axis in names) == 0, path


def test_an_unknown_run_names_the_nearest():
    with pytest.raises(ConfigError, match="the nearest is 'mixtral_8x7b'"):
        get_config("mixtral_8x7")


def test_the_page_has_every_run_and_a_place_for_the_table():
    assert all(f"{name}@" in PAGE for name in RUNS)
    assert PAGE.index("<!-- table -->") < PAGE.index("<!-- /table -->")


def test_the_page_has_the_figures():
    rows = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if "TFLOP/s" in line]
    told = {row[0].removesuffix(" SXM").lower(): row[1:] for row in rows}
    assert list(told) == list(FIGURES)
    for kind, figures in FIGURES.items():
        numbers = [float(cell.split()[0].replace(",", "")) for cell in told[kind]]
        expected = [
            figures.flops / 1e12,
            figures.memory / 2**30,
            *(
                n / 1e9
                for n in (figures.memory_bandwidth, figures.axis_bandwidth, figures.slice_bandwidth)
            ),
        ]
        assert all(math.isclose(a, b, rel_tol=0.01) for a, b in zip(numbers, expected, strict=True))
