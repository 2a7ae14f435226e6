"""FLOPs that were executed: of the choices that reached an expert."""

from flax import nnx
import pytest

from moe.evaluation.cost import cost_record, expert_flops
from moe.model.build import model_size, model_spec
from moe.training.state import Skeleton, make_skeleton
from tests import tiny

LENGTH = 16


def shapes(*overrides: str):
    spec = model_spec(tiny.config(*overrides), tiny.VOCAB, training=False)
    return spec, make_skeleton(spec), model_size(spec, LENGTH)


def routed(spec, choices: float, drop_rate: float = 0.0) -> dict:
    layers = spec.sparse_layers
    return {
        "routing/per_layer/choices": [choices] * layers,
        "routing/per_layer/drop_rate": [drop_rate] * layers,
    }


def test_expert_has_three_matrices_or_two():
    for activation, matrices in (("swiglu", 3), ("gelu", 2)):
        spec, skeleton, _ = shapes(f"model.activation={activation}")
        assert expert_flops(spec, skeleton) == 2 * matrices * spec.width * spec.expert_width


def test_k_choices_cost_what_the_config_says():
    spec, skeleton, size = shapes("router.k=2")
    record = cost_record(spec, skeleton, size, routed(spec, 2.0), LENGTH)
    assert record["flops_executed"] == pytest.approx(size.flops_per_token)
    assert record["parameters_total"] == size.parameters_total


def test_drops_and_further_choices_count_as_they_are():
    spec, skeleton, size = shapes("router.k=2")
    one = spec.sparse_layers * expert_flops(spec, skeleton)
    dropped = cost_record(spec, skeleton, size, routed(spec, 2.0, 0.25), LENGTH)
    assert dropped["flops_executed"] == pytest.approx(size.flops_per_token - 0.5 * one)
    more = cost_record(spec, skeleton, size, routed(spec, 3.5), LENGTH)
    assert more["flops_executed"] == pytest.approx(size.flops_per_token + 1.5 * one)


def test_soft_plans_pay_for_slots_and_for_one_merged_expert():
    for name, visits in (("soft_moe", 8 * 4 / LENGTH), ("smear", 1.0)):
        extra = ["router.slots=4"] if name == "soft_moe" else []
        spec, skeleton, size = shapes(f"router.name={name}", "router.k=2", *extra)
        rest = size.flops_per_token - 2 * spec.sparse_layers * expert_flops(spec, skeleton)
        found = cost_record(spec, skeleton, size, {}, LENGTH)["flops_executed"]
        one = spec.sparse_layers * expert_flops(spec, skeleton)
        assert found == pytest.approx(rest + visits * one)


def test_dense_model_has_no_choice():
    spec, skeleton, size = shapes("model.pattern=dense")
    assert cost_record(spec, skeleton, size, {}, LENGTH)["flops_executed"] == size.flops_per_token
    assert not any("experts" in path for path, _ in nnx.to_flat_state(Skeleton(*skeleton).params))
