"""The watch for collapsed routing."""

import numpy as np
import pytest

from moe.config import default_config
from moe.routing.metrics import load_metrics
from moe.training.collapse import Watch


def metrics_of(*layers: list[float]) -> dict:
    counts = np.asarray(layers)
    values = load_metrics(counts)
    lists = {f"routing/per_layer/{name}": value.tolist() for name, value in values.items()}
    return {**lists, "routing/load": (counts / counts.sum(axis=-1, keepdims=True)).tolist()}


def watch(**changes) -> Watch:
    config = default_config()
    config.guards.update({"evaluations": 3, "dead_experts": 0.5, "violation": 5.0} | changes)
    return Watch(config.guards)


EVEN = metrics_of([1.0] * 8, [2.0] * 8)
IDLE = metrics_of([1.0] * 8, [1.0] * 3 + [0.0] * 5)
CROWDED = metrics_of([1000.0] + [150.0 / 7] * 7, [1.0] * 8)
HALF = metrics_of([1.0] * 4 + [0.0] * 4)


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        (IDLE, "5 of 8 experts of sparse layer 1 get next to no token (guards.dead_experts=0.5)"),
        (CROWDED, "sparse layer 0 gets 7.0 times its fair share (guards.violation=5.0)"),
    ],
)
def test_speaks_at_every_third_in_a_row_and_names_the_layer(metrics, said):
    looking = watch()
    told = [looking.look(metrics) for _ in range(6)]
    assert [text is not None for text in told] == [False, False, True] * 2
    assert said in told[2]
    assert "losses.balance" in told[2]
    assert "router.bias_rate" in told[2]
    assert "3 evaluations in a row" in told[2]
    assert "6 evaluations in a row" in told[5]


def test_a_good_evaluation_starts_the_count_again():
    looking = watch()
    order = [IDLE, CROWDED, EVEN, IDLE, IDLE, IDLE]
    told = [looking.look(metrics) for metrics in order]
    assert [text is not None for text in told] == [False] * 5 + [True]


def test_a_bound_itself_is_not_beyond_it():
    looking = watch(evaluations=1)
    assert looking.look(HALF) is None
    assert watch(evaluations=1, dead_experts=0.49).look(HALF) is not None
    thrice = metrics_of([4.0, 4.0] + [0.0] * 6)  # the mean is one
    assert watch(evaluations=1, dead_experts=1.0, violation=3.0).look(thrice) is None
    assert watch(evaluations=1, dead_experts=1.0, violation=2.99).look(thrice) is not None


def test_the_worst_layer_is_the_one_with_the_largest_share_of_idle_experts():
    """Of layers with unlike numbers of experts: 3 of 4 are more than 5 of 8."""
    few, many = metrics_of([1.0] + [0.0] * 3), metrics_of([1.0] * 3 + [0.0] * 5)
    both = {name: values + many[name] for name, values in few.items()}
    said = watch(evaluations=1, violation=9.0).look(both)
    assert said is not None
    assert "3 of 4 experts of sparse layer 0" in said


def test_both_faults_are_named():
    assert " and " in (watch(evaluations=1, violation=0.5).look(IDLE) or "").split(", beyond")[0]


def test_a_dense_model_has_nothing_to_watch():
    looking = watch(evaluations=1, violation=0.0)
    assert looking.look({"loss/cross_entropy": 1.0, "accuracy": 0.5}) is None
