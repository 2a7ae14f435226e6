"""Similarity of a model's experts on devices equals the NumPy functions on its arrays."""

import jax
import numpy as np
import pytest

from moe.evaluation import expert_similarity as es
from moe.evaluation.parameter_similarity import similarity_metrics
from moe.model.build import model_spec
from moe.parallel.mesh import make_mesh
from moe.parallel.rules import RULES, parameter_shardings
from moe.training.state import make_skeleton
from tests import tiny


def drawn(*overrides: str) -> dict:
    return tiny.numbers(make_skeleton(model_spec(tiny.config(*overrides), tiny.VOCAB)))[0]


def test_equals_the_functions_of_each_layer():
    """Pattern of two sparse layers, twice: layers come in the order of depth."""
    params = drawn("model.num_layers=6", "model.pattern=sparse,dense,sparse")
    found = similarity_metrics(params)
    router, weights = [], []
    for turn in range(2):
        for name in ("layer0", "layer2"):
            layer = jax.tree.map(lambda a, turn=turn: np.asarray(a[turn]), params["blocks"][name])
            router.append(es.mean_of_pairs(es.router_similarity(layer["mlp"]["gate"]["kernel"])))
            experts = layer["mlp"]["experts"]
            similar = es.weight_similarity(experts["wi"], experts["wo"])
            weights.append(es.mean_of_pairs(similar))
    np.testing.assert_allclose(found["routing/per_layer/router_similarity"], router, atol=1e-5)
    np.testing.assert_allclose(found["routing/per_layer/weight_similarity"], weights, atol=1e-5)
    assert found["routing/router_similarity"] == pytest.approx(np.mean(router), abs=1e-5)
    assert np.ptp(router) > 1e-3


def test_copies_of_one_expert_are_alike():
    params = drawn()
    experts = params["blocks"]["layer0"]["mlp"]["experts"]
    for name, value in experts.items():
        experts[name] = value.at[:].set(value[:, :1])
    found = similarity_metrics(params)
    assert found["routing/weight_similarity"] == pytest.approx(1.0, abs=1e-5)
    assert abs(found["routing/router_similarity"]) < 0.3


def test_no_number_without_a_gate_or_experts():
    assert not {n for n in similarity_metrics(drawn("router.name=hash")) if "router" in n}
    assert similarity_metrics(drawn("model.pattern=dense")) == {}


def test_sharded_experts_give_the_same_numbers():
    mesh = make_mesh(data=2, fsdp=1, expert=2, tensor=2)
    skeleton = make_skeleton(model_spec(tiny.config(), tiny.VOCAB))
    params = drawn()
    with jax.set_mesh(mesh):
        sharded = jax.device_put(
            params, parameter_shardings(skeleton.params, mesh, RULES["separate"])
        )
        found = similarity_metrics(sharded)
    for name, value in similarity_metrics(params).items():
        np.testing.assert_allclose(found[name], value, atol=1e-5, err_msg=name)
