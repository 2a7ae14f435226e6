"""Sweep files of shapes that nobody meant, as `get_config` could return them."""

from unittest import mock

from hypothesis import strategies as st
import pytest

from moe.errors import ConfigError
from moe.sweep import arms, load
from tests.security.fuzz import check, scalars, sizes, values

leaves = values | st.dictionaries(
    st.sampled_from([*load.LEAF_KEYS, "lo"]), scalars | values, max_size=4
)
spaces = st.dictionaries(
    st.sampled_from(["router.k", "router.name", "seed", "optimizer.learning_rate", "x", ""]),
    leaves,
    max_size=3,
)


def file(defaults):
    """What a file may hold: some of its keys, with anything in them."""
    keys = {key: values for key in defaults if key not in ("base", "space")}
    return st.fixed_dictionaries(
        {"base": st.just("configs/quickstart.py") | values, "space": spaces},
        optional=keys,
    )


@sizes(100)
def test_spaces(examples):
    check(examples, lambda leaf: load._distribution("router.k", leaf), leaves)


@pytest.mark.parametrize("high", [10**9, 10**18])
@pytest.mark.parametrize("step", [{}, {"step": 1}, {"step": 1e-9}])
def test_a_grid_that_would_fill_memory(high, step):
    leaf = {"low": 0, "high": high, **step}
    space = {"router.k": load._distribution("router.k", leaf)}
    with pytest.raises(ConfigError, match="has more than"):
        load._count_points({"sampler": "grid", "trials": None}, space)


@sizes(60)
def test_sweeps(examples):
    def holds(given):
        with mock.patch("runpy.run_path", return_value={"get_config": lambda: given}):
            given = load.read_file(
                "configs/sweeps/quickstart.py", load.DEFAULTS, ("overrides", "space")
            )
        space = {key: load._distribution(key, leaf) for key, leaf in given["space"].items()}
        load._count_points(given, space)
        load.check_seeds(given["seeds"])
        load._one_of("sampler", given["sampler"], load.SAMPLERS)

    check(examples, holds, file(load.DEFAULTS) | values)


@sizes(60)
def test_comparisons(examples):
    def holds(given):
        with mock.patch("runpy.run_path", return_value={"get_config": lambda: given}):
            load.read_file("configs/sweeps/routers.py", arms.DEFAULTS, ("overrides", "arms"))

    check(examples, holds, file(arms.DEFAULTS) | values)
