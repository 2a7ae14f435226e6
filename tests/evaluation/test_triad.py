"""The triad: numbers, differences, and the table."""

import numpy as np
import pytest

from moe.evaluation import tables
from moe.evaluation.bootstrap import Interval
from moe.evaluation.examples import Examples
from moe.evaluation.triad import cost_of, triad, triad_table

ACCURACY = {
    "loss/cross_entropy": Interval(0.5, 0.4, 0.6, 100),
    "accuracy": Interval(0.8, 0.75, 0.85, 100),
}
COST = {"parameters_total": 2_000_000, "examples_per_second": 12.5}
CHECKS = {
    "train": {"accuracy": Interval(0.95, 0.9, 1.0, 40)},
    "typos": {"accuracy": Interval(0.7, 0.6, 0.8, 100)},
    "odd": {"chrf": Interval(1.0, 1.0, 1.0, 9)},
}


def test_differences_are_to_the_split():
    found = triad(ACCURACY, COST, CHECKS, primary="accuracy")
    assert found["primary"] == "accuracy"
    assert found["accuracy"]["accuracy"] == {"value": 0.8, "low": 0.75, "high": 0.85, "n": 100}
    assert found["generalisation"]["train"]["accuracy"]["difference"] == pytest.approx(0.15)
    assert found["generalisation"]["typos"]["accuracy"]["difference"] == pytest.approx(-0.1)
    assert found["generalisation"]["odd"] == {}
    assert found["cost"] == COST


def test_without_the_score_that_counts_the_first_one_does():
    assert triad(ACCURACY, COST, {}, primary="bleu")["primary"] == "loss/cross_entropy"


def test_table_leads_with_the_score_that_counts():
    text = triad_table(triad(ACCURACY, COST, CHECKS, primary="accuracy"))
    rows = [line.split() for line in text.splitlines()]
    assert rows[1] == ["accuracy", "0.8000", "0.7500", "0.8500", "100", "higher", "is", "better"]
    assert rows[2][0] == "loss/cross_entropy"
    assert rows[2][-3:] == ["lower", "is", "better"]
    assert ["parameters_total", "2,000,000"] in rows
    assert ["train", "0.9500", "0.9000", "1.0000", "40", "+0.1500"] in rows
    assert ["odd", "-", "-", "-", "-", "-"] in rows
    assert "GENERALISATION" not in triad_table(triad(ACCURACY, COST, {}, primary="accuracy"))


def test_cost_counts_every_position_of_a_row():
    record = {
        "model": {"parameters_total": 10, "parameters_active": 5, "flops_per_token": 100.0},
        "metrics": {
            "tokens": 60.0,
            "speed/tokens_per_second": 30.0,
            "memory/host_peak_bytes": 7.0,
        },
    }
    ones = np.ones(8)
    rows = Examples(np.arange(8), np.zeros(8, int), ones, ones, ones, ones)
    assert cost_of(record, rows, 16) == {
        "parameters_total": 10,
        "parameters_active": 5,
        "flops_per_token": 100.0,
        "flops_per_example": 1600.0,
        "examples_per_second": 4.0,
        "tokens_per_second": 64.0,
        "memory/host_peak_bytes": 7.0,
    }


def test_scores_by_domain():
    one = {"bleu": ACCURACY["accuracy"].to_json(), "chrf": ACCURACY["accuracy"].to_json()}
    text = tables.scores_table({"en-de": one, "en-zh": {"chrf": one["chrf"]}})
    rows = [line.split() for line in text.splitlines()]
    assert rows == [
        ["bleu", "chrf", "n"],
        ["en-de", "0.8000", "0.8000", "100"],
        ["en-zh", "-", "0.8000", "100"],
    ]
    assert tables.scores_table({}) == ""
