import pytest

from moe.errors import ConfigError
from moe.sweep.load import load_sweep
from moe.sweep.space import Sweep, fixed_points, grid_values, to_text
from tests.sweep.common import write_sweep

VALUES = {"values": [2, 4]}

BAD = [
    ({"space": {"router.kk": VALUES}}, r"space\['router.kk'\].*unknown config key.*'router\.k'"),
    ({"space": {"router.k": {"values": ["two"]}}}, "type"),
    ({"space": {"router.k": {"values": []}}}, "at least one value"),
    ({"space": {"router.k": {"values": [2, 2]}}}, "twice"),
    ({"space": {"router.k": {"value": [2]}}}, "nearest is 'values'"),
    ({"space": {"router.k": {"values": [2], "low": 1}}}, "keep one"),
    ({"space": {"router.k": [2, 4]}}, "must be a dict"),
    ({"space": {}}, "space is empty"),
    ({"space": {"losses.z": {"low": 0.2, "high": 0.1, "log": True}}}, "above high"),
    ({"space": {"losses.z": {"low": 0.0, "high": 0.1, "log": True}}}, "low > 0"),
    ({"space": {"losses.z": {"low": 0.0, "high": 0.1, "step": 0}}}, "greater than 0"),
    ({"space": {"losses.z": {"low": 0.1}}}, "high=None"),
    ({"space": {"losses.z": {"low": 0.1, "high": 0.2}}}, "without a step"),
    ({"space": {"losses.z": {"low": 0.1, "high": 1.0, "step": 0.1, "log": True}}}, "exclude"),
    ({"space": {"seed": VALUES}}, "seeds="),
    ({"overrides": {"router.k": 2}}, "keep one"),
    ({"overrides": {"stepz": 2}}, "nearest is 'steps'"),
    ({"sampler": "gird"}, "none of grid, random, tpe; the nearest is 'grid'"),
    ({"sampler": "tpe"}, "trials=None"),
    ({"trials": 3}, "grid has 2 points"),
    ({"pruner": "half"}, "none of none, median, hyperband"),
    ({"direction": "down"}, "none of minimize, maximize"),
    ({"seeds": []}, "seeds="),
    ({"seeds": [1, 1]}, "different"),
    ({"sampling": "grid"}, "nearest is 'sampler'"),
    ({"base": "configs/absent.py"}, "absent.py"),
    ({"base": None}, "must be the path"),
]


@pytest.mark.parametrize(("values", "message"), BAD, ids=[m for _, m in BAD])
def test_a_bad_sweep_file_is_refused(tmp_path, values, message):
    with pytest.raises(ConfigError, match=message):
        load_sweep(write_sweep(tmp_path / "sweep.py", **values))


def test_no_such_file(tmp_path):
    with pytest.raises(ConfigError, match="there is no file"):
        load_sweep(str(tmp_path / "absent.py"))


def test_a_grid_has_every_combination_once(tmp_path):
    space = {
        "router.k": VALUES,
        "losses.z": {"low": 0.0, "high": 0.31, "step": 0.1},
        "model.num_experts": {"low": 8, "high": 17, "step": 4},
        "model.pattern": {"values": [("sparse",), ("dense", "sparse")]},
    }
    sweep = load_sweep(write_sweep(tmp_path / "sweep.py", space=space))
    assert grid_values("z", sweep.space["losses.z"]) == [0.0, 0.1, 0.2, 0.3]
    assert grid_values("E", sweep.space["model.num_experts"]) == [8, 12, 16]
    points = fixed_points(sweep)
    assert len(points) == sweep.points == 2 * 4 * 3 * 2
    assert len({tuple(point.items()) for point in points}) == len(points)
    assert points[-1] == {
        "router.k": 4,
        "losses.z": 0.3,
        "model.num_experts": 16,
        "model.pattern": "dense,sparse",
    }


def test_random_points_are_drawn_once_for_all(tmp_path):
    space = {"router.k": VALUES, "losses.z": {"low": 1e-4, "high": 1e-1, "log": True}}
    few, many = (
        load_sweep(write_sweep(tmp_path / f"{n}.py", space=space, sampler="random", trials=n))
        for n in (3, 6)
    )
    assert fixed_points(many)[:3] == fixed_points(few)
    assert len({p["losses.z"] for p in fixed_points(many)}) == 6
    assert all(1e-4 <= p["losses.z"] <= 1e-1 for p in fixed_points(many))


def test_options_of_a_router_may_be_searched_with_its_name(tmp_path):
    space = {"router.name": {"values": ["topk", "deepseek_v3"]}}
    option = {"router.bias_rate": {"values": [0.001, 0.01]}}
    sweep = load_sweep(write_sweep(tmp_path / "both.py", space=space | option))
    assert sweep.points == 4
    with pytest.raises(ConfigError, match="bias_rate"):
        load_sweep(write_sweep(tmp_path / "one.py", space=option))


def test_command_line_overrides_are_part_of_the_sweep(tmp_path):
    sweep = load_sweep(write_sweep(tmp_path / "sweep.py"), [("steps", "7")])
    assert sweep.overrides["steps"] == "7"
    assert sweep.steps == 7


def test_values_as_text():
    assert [to_text(v) for v in (None, True, 1e-5, ("a", "b"), "x")] == [
        "none",
        "true",
        "1e-05",
        "a,b",
        "x",
    ]


def test_a_sweep_survives_json(tmp_path):
    space = {"router.k": VALUES, "losses.z": {"low": 1e-4, "high": 1e-1, "log": True}}
    sweep = load_sweep(write_sweep(tmp_path / "sweep.py", space=space, sampler="random", trials=2))
    assert Sweep.from_json(sweep.to_json()) == sweep
