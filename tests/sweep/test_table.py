import csv
import io
import math

import numpy as np
import pytest
import scipy.stats

from moe.sweep.load import load_sweep
from moe.sweep.table import Interval, Row, student_interval, to_csv, to_text
from tests.sweep.common import write_sweep


def test_student_interval_of_two_and_of_one():
    # t(0.975, 1) = 12.706, s = 0.1 sqrt(2), n = 2
    mean, half = student_interval([2.0, 2.2])
    assert mean == pytest.approx(2.1)
    assert half == pytest.approx(12.7062 * 0.1, rel=1e-4)
    assert student_interval([2.0]).mean == 2.0
    assert math.isnan(student_interval([2.0]).half_width)
    assert student_interval([2.0, 2.0, 2.0]).half_width == 0.0


def test_student_interval_agrees_with_scipy_and_covers():
    rng = np.random.default_rng(0)
    draws = rng.normal(loc=1.0, size=(2000, 4))
    low, high = scipy.stats.t.interval(
        0.95, 3, loc=draws[0].mean(), scale=scipy.stats.sem(draws[0])
    )
    mean, half = student_interval(list(draws[0]))
    np.testing.assert_allclose([mean - half, mean + half], [low, high])
    found = [student_interval(list(row)) for row in draws]
    covered = np.mean([abs(i.mean - 1.0) <= i.half_width for i in found])
    assert covered == pytest.approx(0.95, abs=0.015)


def test_csv_and_text(tmp_path):
    sweep = load_sweep(write_sweep(tmp_path / "sweep.py", seeds=[0, 1]))
    rows = [
        Row(1, "complete", {"router.k": 4}, {0: 2.0, 1: 2.2}, Interval(2.1, 1.27), {}, ""),
        Row(0, "failed", {"router.k": 2}, {}, None, {}, 'exit code 2, "k"\nis too large'),
    ]
    read = list(csv.DictReader(io.StringIO(to_csv(rows, sweep))))
    assert (read[0]["router.k"], read[0]["n"], read[0]["mean"]) == ("4", "2", "2.1")
    assert float(read[0]["low_95"]) == pytest.approx(0.83)
    assert (read[1]["state"], read[1]["mean"], read[1]["seed_0"]) == ("failed", "", "")
    assert read[1]["note"] == rows[1].note
    text = to_text(rows, sweep).splitlines()
    assert "2.1000" in text[1]
    assert "+- 1.2700" in text[1]
    assert text[2].endswith("is too large")  # the last line of a message says most
