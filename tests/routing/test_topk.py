import numpy as np
import pytest

from moe.errors import ConfigError
from moe.routing import topk
from tests.routing.cases import GOLDEN_LOGITS, GOLDEN_VALID, Case, random_logits


def route(normalize, k=2):
    return Case("topk", k, {"normalize": normalize}).route(GOLDEN_LOGITS, GOLDEN_VALID)


def test_probabilities_and_choices_worked_out_in_float64():
    routing = route("none")
    np.testing.assert_allclose(routing.probs[0, 0], [0.6439, 0.2369, 0.0871, 0.0321], atol=5e-5)
    np.testing.assert_allclose(
        routing.probs.mean((0, 1)), [0.4056, 0.2433, 0.2102, 0.1409], atol=5e-5
    )
    np.testing.assert_array_equal(routing.plan.expert[0, :, 0], [0, 0, 0, 1, 2, 0, 3, 0])
    np.testing.assert_array_equal(routing.plan.expert[0, :, 1], [1, 2, 3, 2, 0, 1, 0, 1])


@pytest.mark.parametrize(
    ("normalize", "gates"),
    [
        ("none", [0.6439, 0.2369]),
        ("renormalize", [0.7311, 0.2689]),
        ("topk_softmax", [0.7311, 0.2689]),
    ],
)
def test_gates_worked_out_in_float64(normalize, gates):
    np.testing.assert_allclose(route(normalize).plan.gate[0, 0], gates, atol=5e-5)


@pytest.mark.parametrize("k", [1, 3])
def test_renormalising_equals_softmax_of_the_chosen_logits(k):
    logits = random_logits((2, 16, 8))
    a, b = (
        Case("topk", k, {"normalize": n}).route(logits).plan
        for n in ("renormalize", "topk_softmax")
    )
    np.testing.assert_array_equal(a.expert, b.expert)
    np.testing.assert_allclose(a.gate, b.gate, atol=1e-6)


def test_all_experts_make_the_dense_mixture_in_every_form():
    for normalize in topk.NORMALIZE:
        routing = route(normalize, k=4)
        dense = np.take_along_axis(np.asarray(routing.probs), np.asarray(routing.plan.expert), -1)
        np.testing.assert_allclose(routing.plan.gate, dense, atol=1e-6)
        np.testing.assert_allclose(routing.plan.gate.sum(-1), 1.0, rtol=1e-6)


def test_gates_fall_as_logits_do():
    for normalize in topk.NORMALIZE:
        assert (np.diff(route(normalize, k=3).plan.gate, axis=-1) <= 0).all()


@pytest.mark.parametrize("normalize", ["renormalize", "topk_softmax"])
def test_one_renormalised_gate_is_refused(normalize):
    with pytest.raises(ConfigError, match=r"router\.k=1.*no gradient.*normalize='none'"):
        topk.check(8, k=1, normalize=normalize)
    topk.check(8, k=1, normalize="none")


def test_unknown_normalisation_is_refused():
    with pytest.raises(ConfigError, match="'softmax' is not one of none, renormalize"):
        topk.check(8, k=2, normalize="softmax")
