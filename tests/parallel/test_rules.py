"""The presets of sharding rules: where parameters lie, and that no preset changes a number."""

from pathlib import Path

from jax.sharding import PartitionSpec as P
import pytest

from moe.axes import BATCH_AXES, MESH_AXES
from moe.cli import complete_config
from moe.errors import ConfigError
from moe.model.build import model_spec
from moe.model.experts import expert_specs
from moe.parallel.mesh import make_mesh
from moe.parallel.rules import RULES, find_rules, parameter_shardings, parameter_spec
from moe.training import optimizer
from moe.training.state import make_skeleton, state_shardings
from tests.parallel import test_invariance as invariance

EXPERT, DENSE, EMBEDDING = ("E", "D", None, "F"), ("D", None, "F"), ("V", "D")
SPECS = {  # name -> an expert's input projection, a dense one, the embedding
    "separate": (
        P("expert", "fsdp", None, "tensor"),
        P("fsdp", None, "tensor"),
        P("tensor", "fsdp"),
    ),
    "folded": (
        P(("fsdp", "expert"), None, None, "tensor"),
        P(("fsdp", "expert"), None, "tensor"),
        P("tensor", ("fsdp", "expert")),
    ),
    "folded_data": (
        P(("data", "fsdp", "expert"), None, None, "tensor"),
        P(("fsdp", "expert"), None, "tensor"),
        P("tensor", ("fsdp", "expert")),
    ),
    "hybrid": (
        P("expert", ("fsdp", "sequence"), None, "tensor"),
        P(("fsdp", "expert", "sequence"), None, "tensor"),
        P("tensor", ("fsdp", "expert", "sequence")),
    ),
    "zero1": (P("expert", None, None, "tensor"), P(None, None, "tensor"), P("tensor", None)),
}


@pytest.mark.parametrize("name", list(RULES))
def test_where_parameters_lie(name):
    rules = RULES[name]
    for letters, spec in zip((EXPERT, DENSE, EMBEDDING), SPECS[name], strict=True):
        assert parameter_spec(letters, len(letters), rules) == spec
    # A layer axis in front is not sharded.
    assert parameter_spec(DENSE, 4, rules) == P(None, *SPECS[name][1])
    # A gate is no stack of experts: all of its columns are everywhere.
    assert parameter_spec(("D", "E"), 2, rules) == P(SPECS[name][1][0], None)
    assert parameter_spec(("E",), 1, rules) == P(None)
    # A shard of the exchange sees whole experts, whatever axis they are gathered over before.
    wi, wo = expert_specs(rules)
    E = SPECS[name][0][0]
    assert (wi, wo) == (P(E, None, None, "tensor"), P(E, "tensor", None))


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_every_preset_is_well_formed(rules):
    assert rules.expert_axes == rules.experts["E"]
    assert set(rules.expert_axes) <= set(BATCH_AXES)  # the exchange moves rows of the batch
    assert rules.moments is None or rules.moments in RULES
    for letters in (rules.experts, rules.others):
        for axes in letters.values():
            assert list(axes) == [a for a in MESH_AXES if a in axes]  # outermost first
    for first, second in (("E", "D"), ("E", "F"), ("D", "F")):
        used = [*rules.experts.get(first, ()), *rules.experts.get(second, ())]
        assert len(used) == len(set(used))


def test_the_page_shows_the_table():
    page = (Path(__file__).parents[2] / "docs" / "parallelism.md").read_text()
    rows = [
        [cell.strip(" `") for cell in line.split("|")[1:-1]]
        for line in page.splitlines()
        if line.count("|") == 8 and line.startswith("| `") and "mesh.rules" not in line
    ]

    def text(axes):
        return ", ".join(axes or ("whole",))

    for (name, *cells), (wanted, rules) in zip(rows, RULES.items(), strict=True):
        experts, others = rules.experts, rules.others
        moments = "as parameters" if rules.moments is None else f"as `{rules.moments}`".strip("`")
        lies = [experts["E"], experts.get("D"), others.get("D")]
        assert name == wanted
        assert cells[:5] == [*map(text, lies), moments, text(rules.expert_axes)]


def skeleton():
    return make_skeleton(model_spec(invariance.base_config(), invariance.VOCAB))


def test_moments_follow_their_parameter_or_the_rules_for_moments():
    mesh = make_mesh(data=1, fsdp=2, expert=4)
    adam = optimizer.adam(b1=0.9, b2=0.95, eps=1e-8)
    folded = state_shardings(skeleton(), adam, mesh, RULES["folded"])
    assert folded.optimizer.mu == folded.params
    zero = state_shardings(skeleton(), adam, mesh, RULES["zero1"])
    assert zero.optimizer.mu == parameter_shardings(skeleton().params, mesh, RULES["separate"])
    assert zero.optimizer.mu != zero.params


def test_an_axis_that_does_not_divide_is_named_with_the_fix():
    mesh = make_mesh(data=1, fsdp=8)
    words = r"mesh.fsdp=8 x mesh.expert=1 = 8 does not divide an axis of size 4 of .*experts/wi \(.*4.*\): "
    with pytest.raises(ConfigError, match=words + ".*choose other mesh.rules among separate"):
        parameter_shardings(small_experts().params, mesh, RULES["folded"])
    parameter_shardings(small_experts().params, mesh, RULES["separate"])


def small_experts():
    config = invariance.base_config()
    config.model.num_experts = 4
    return make_skeleton(model_spec(config, invariance.VOCAB))


def test_unknown_rules():
    with pytest.raises(ConfigError, match=r"mesh.rules='fold' .*did you mean 'folded'"):
        find_rules("fold")


CASES = {  # rules and mesh -> case; capacity and dropless by turns
    "folded-fsdp2_expert4": ("topk_grouped", {"fsdp": 2, "expert": 4}),
    "folded-fsdp2_expert2_tensor2": ("topk_capacity", {"fsdp": 2, "expert": 2, "tensor": 2}),
    "folded_data-data2_fsdp2_expert2": ("topk_capacity", {"data": 2, "fsdp": 2, "expert": 2}),
    "hybrid-fsdp2_expert2_sequence2": ("topk_grouped", {"fsdp": 2, "expert": 2, "sequence": 2}),
    "zero1-data2_fsdp2_expert2": ("deepseek_v3_grouped", {"data": 2, "fsdp": 2, "expert": 2}),
}
COVER = {
    "folded-fsdp2_expert4",
    "folded_data-data2_fsdp2_expert2",
    "hybrid-fsdp2_expert2_sequence2",
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in COVER else pytest.mark.slow) for n in CASES]
)
def test_one_step_is_the_same_by_every_preset(name):
    case, sizes = CASES[name]
    config = complete_config(invariance.config_of(case), [("mesh.rules", name.split("-")[0])])
    invariance.same_step(invariance.alone(case), invariance.step_of(config, sizes))
