"""FLOPs that were executed: of the choices that reached an expert."""

from flax import nnx
import numpy as np
import pytest

from moe.evaluation.cost import cost_record, expert_flops
from moe.model.build import model_size, model_spec
from moe.training.state import Skeleton, make_skeleton
from tests import tiny

LENGTH = 16


def shapes(*overrides: str):
    spec = model_spec(tiny.config(*overrides), tiny.VOCAB, training=False)
    return spec, make_skeleton(spec), model_size(spec, LENGTH)


def routed(spec, choices: float) -> np.ndarray:
    """Visits `[L E]`, spread evenly."""
    return np.full((spec.sparse_layers, spec.all_experts), choices / spec.all_experts)


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
    dropped = cost_record(spec, skeleton, size, routed(spec, 1.5), LENGTH)
    assert dropped["flops_executed"] == pytest.approx(size.flops_per_token - 0.5 * one)
    more = cost_record(spec, skeleton, size, routed(spec, 3.5), LENGTH)
    assert more["flops_executed"] == pytest.approx(size.flops_per_token + 1.5 * one)


def test_soft_plans_pay_for_slots_and_for_one_merged_expert():
    for name, visits in (("soft_moe", 8 * 4 / LENGTH), ("smear", 1.0)):
        extra = ["router.slots=4"] if name == "soft_moe" else []
        spec, skeleton, size = shapes(f"router.name={name}", "router.k=2", *extra)
        rest = size.flops_per_token - 2 * spec.sparse_layers * expert_flops(spec, skeleton)
        found = cost_record(spec, skeleton, size, np.zeros((2, 8)), LENGTH)["flops_executed"]
        one = spec.sparse_layers * expert_flops(spec, skeleton)
        assert found == pytest.approx(rest + visits * one)


def test_experts_without_a_network_cost_nothing():
    spec, skeleton, size = shapes("model.zero_experts=2", "model.copy_experts=2", "router.k=3")
    one = expert_flops(spec, skeleton)
    even = cost_record(spec, skeleton, size, routed(spec, 3.0), LENGTH)
    assert even["flops_executed"] == pytest.approx(size.flops_per_token)
    visits = np.zeros((spec.sparse_layers, 12))
    visits[:, 8:] = 0.5  # two of three choices fall on those that compute nothing
    visits[:, 0] = 1.0
    found = cost_record(spec, skeleton, size, visits, LENGTH)["flops_executed"]
    assert found == pytest.approx(size.flops_per_token - spec.sparse_layers * one)  # 1 of 2


def test_layers_that_tokens_pass_by():
    depth = ("model.pattern=depth_sparse", "allow_noncausal=True", "model.depth_capacity=0.5")
    spec, skeleton, size = shapes(*depth)
    one = spec.sparse_layers * expert_flops(spec, skeleton)
    promised = cost_record(spec, skeleton, size, routed(spec, 1.0), LENGTH)
    assert promised["flops_executed"] == pytest.approx(size.flops_per_token)
    more = cost_record(spec, skeleton, size, routed(spec, 1.2), LENGTH)
    assert more["flops_executed"] == pytest.approx(size.flops_per_token + 0.2 * one)


def test_dense_model_has_no_choice():
    spec, skeleton, size = shapes("model.pattern=dense")
    assert cost_record(spec, skeleton, size, None, LENGTH)["flops_executed"] == size.flops_per_token
    assert not any("experts" in path for path, _ in nnx.to_flat_state(Skeleton(*skeleton).params))
