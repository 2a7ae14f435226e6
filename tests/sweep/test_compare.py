"""Comparisons: their files, what is run again and what is not, the table's arithmetic, the page."""

import csv
import json
import math
from pathlib import Path
import re
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import scipy.stats

from moe.errors import ConfigError
from moe.sweep import comparison_table as table
from moe.sweep import measure
from moe.sweep.arm_runner import RESULT, ArmResult, run_arms
from moe.sweep.arms import difference, load_comparison
from moe.sweep.comparison_report import write_comparison_report
from moe.sweep.table import Interval
from tests.sweep.common import BASE, FILE, ROOT

FAKE = [sys.executable, str(Path(__file__).with_name("fake_arm.py"))]
ARMS = {
    "dense": ("dense", {}),
    "two": {"argument": "", "overrides": {"router.k": 2}, "group": "top-k"},
    "four": ("router=sinkhorn", {"allow_noncausal": True}),
}


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def write_file(tmp_path, **values) -> str:
    path = tmp_path / "some_arms.py"
    given = {"base": BASE, "arms": ARMS, "reference": "dense", "seeds": [0, 1, 2]}
    path.write_text(FILE.format(values=given | values))
    return str(path)


def run(tmp_path, comparison, **options):
    lines = []
    outcome = run_arms(
        comparison,
        tmp_path / "out",
        command=FAKE,
        announce=lines.append,
        poll=0.02,
        **{"workers": 2, **options},
    )
    return outcome, lines


def started(tmp_path):
    lines = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    return sorted((event["arm"], event["seeds"]) for event in map(json.loads, lines))


# ---- the file


def test_file_gives_arms_of_their_own_config(tmp_path):
    found = load_comparison(write_file(tmp_path), [("steps", "7")])
    dense, two, four = found.arms
    assert (found.name, found.task, found.reference) == ("some_arms", "language", "dense")
    assert dense.router == dense.causality == ""
    assert (two.router, two.causality, two.group) == ("topk", "C0", "top-k")
    assert (four.router, four.causality, four.config) == (
        "sinkhorn", "C3", f"{BASE}:router=sinkhorn"
    )  # fmt: skip
    assert [arm.settings["steps"] for arm in found.arms] == [7, 7, 7]
    assert two.settings["router"]["k"] == 2
    assert "seed" not in two.settings


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"arms": {}}, ["arms is empty"]),
        ({"arms": {"a/b": ("", {})}}, ["a/b", "folder"]),
        ({"arms": {"a": "dense"}}, ["arms['a']", "(argument, overrides)"]),
        ({"arms": {"a": {"argumnt": ""}}}, ["arms['a']", "argument"]),
        ({"arms": {"a": ("router=topk", {"router.kk": 2})}}, ["arms['a']", "router.kk"]),
        ({"arms": {"a": ("router=base", {"router.k": 99})}}, ["arms['a']", "router.k"]),
        ({"reference": "denze"}, ["denze", "'dense'"]),
        ({"seeds": [0, 0]}, ["seeds"]),
        ({"overrides": {"seed": 3}}, ["seed is set by seeds"]),
        ({"armz": {}}, ["armz", "'arms'"]),
        (
            {"arms": {"dense": ("", {}), "b": ("", {"task.name": "classify"})}},
            ["classify, language", "one task"],
        ),
    ],
)
def test_bad_file_is_refused_by_name(tmp_path, values, words):
    with pytest.raises(ConfigError) as error:
        load_comparison(write_file(tmp_path, **values))
    assert all(word in str(error.value) for word in words), error.value


def test_the_comparison_of_this_repository(monkeypatch):
    monkeypatch.chdir(ROOT)
    language = load_comparison("configs/sweeps/routers.py")
    arms = {arm.name: arm for arm in language.arms}
    assert {"dense", "dense_total", "topk", "random", "two_level", "segment"} <= arms.keys()
    assert not {"smear", "soft_moe", "segment_self"} & arms.keys(), "they have no causal form"
    for arm in language.arms:
        assert arm.settings["allow_noncausal"] == (arm.causality == "C3")
        assert arm.settings["data"]["weights"] == {"code": 1.0}
        m, k = arm.settings["model"], arm.settings["router"]["k"]
        parts = 2 if "double" in m["pattern"] else 1
        if arm.router:
            assert parts * k * m["expert_width"] == 128, arm.name
    assert arms["dense"].settings["model"]["mlp_width"] == 128
    assert arms["dense_total"].settings["model"]["mlp_width"] == 16 * 32
    assert all(arm.group != "other" for arm in language.arms if arm.name != "double")
    keys = [json.dumps(arm.settings, sort_keys=True) for arm in language.arms]
    assert len(set(keys)) == len(keys), "two arms are the same"
    rows = load_comparison("configs/sweeps/routers.py:classify")
    assert rows.task == "classify"
    assert {"smear", "soft_moe", "expert_choice", "random", "dense"} <= {a.name for a in rows.arms}


# ---- running


def test_every_seed_of_every_arm_runs_once(tmp_path):
    comparison = load_comparison(write_file(tmp_path))
    outcome, lines = run(tmp_path, comparison)
    assert outcome.exit_code == 0
    assert started(tmp_path) == [(name, "0,1,2") for name in sorted(ARMS)]
    assert [sorted(r.results) for r in outcome.arms] == [[0, 1, 2]] * 3
    assert [r.results[1]["metrics"]["loss"] for r in outcome.arms] == [4.1, 2.1, 4.1]
    assert lines[-1].startswith("[3/3] ")
    again, lines = run(tmp_path, comparison)
    assert lines == ["continuing: 3 of 3 arms are done"]
    assert started(tmp_path) == [(name, "0,1,2") for name in sorted(ARMS)], "nothing ran again"
    assert again == outcome


def test_only_missing_seeds_run(tmp_path):
    comparison = load_comparison(write_file(tmp_path))
    run(tmp_path, comparison)
    (tmp_path / "out" / "two" / "seed-1" / RESULT).unlink()
    outcome, _ = run(tmp_path, comparison)
    assert started(tmp_path).count(("two", "1")) == 1
    assert len(started(tmp_path)) == 4
    assert outcome.exit_code == 0


def test_a_failed_arm_leaves_the_others_alone_and_is_tried_again(tmp_path):
    arms = ARMS | {"bad": ("", {"data.text_feature": "fail_late"})}
    comparison = load_comparison(write_file(tmp_path, arms=arms))
    outcome, lines = run(tmp_path, comparison)
    assert outcome.exit_code == 1
    bad = outcome.arms[-1]
    assert sorted(bad.results) == [0]
    assert "exit code 2" in bad.error
    assert "this arm cannot work" in bad.error
    assert any("bad failed: " in line and "this arm" in line for line in lines)
    row = table.rows(comparison, outcome.arms)
    assert {r.arm.name: r.state for r in row}["bad"] == "failed"
    assert sum(r.state == "complete" for r in row) == 3
    run(tmp_path, comparison)
    assert started(tmp_path).count(("bad", "1,2")) == 1, "seed 0 is done"


def test_a_result_of_another_config_is_refused(tmp_path):
    run(tmp_path, load_comparison(write_file(tmp_path)))
    other = load_comparison(write_file(tmp_path), [("optimizer.learning_rate", "0.5")])
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate differs"):
        run(tmp_path, other)


def test_a_stopped_comparison_goes_on(tmp_path):
    arms = {"slow": ("", {"data.text_feature": "slow"}), "two": ARMS["two"]}
    comparison = load_comparison(write_file(tmp_path, arms=arms, reference="two"))
    done = tmp_path / "out" / "slow" / "seed-0" / RESULT
    program = (
        "import sys; from pathlib import Path\n"
        "from moe.sweep.arms import load_comparison\n"
        "from moe.sweep.arm_runner import run_arms\n"
        f"found = run_arms(load_comparison({write_file(tmp_path, arms=arms, reference='two')!r}), "
        f"Path({str(tmp_path / 'out')!r}), command={FAKE!r}, poll=0.02)\n"
        "sys.exit(found.exit_code)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    waiting = threading.Event()
    for _ in range(600):
        if done.exists() or process.poll() is not None:
            break
        waiting.wait(0.05)
    process.terminate()
    assert process.wait(30) == 75
    assert done.exists()
    assert started(tmp_path) == [("slow", "0,1,2")]
    quick = {"slow": ("", {"data.text_feature": "slow"}), "two": ARMS["two"]}
    seeds = load_comparison(write_file(tmp_path, arms=quick, reference="two", seeds=[0]))
    outcome, _ = run(tmp_path, seeds)
    assert outcome.exit_code == 0
    assert started(tmp_path) == [("slow", "0,1,2"), ("two", "0")]
    assert comparison.seeds == (0, 1, 2)


def test_difference_of_settings():
    ours = {"a": {"b": 1, "new": 2}, "c": [1]}
    assert difference(ours, {"a": {"b": 1}, "c": [1]}) is None, "a key that is new is no difference"
    assert difference(ours, {"a": {"b": 2}, "c": [1]}) == "a.b"
    assert difference(ours, {"a": {"b": 1}, "c": [2]}) == "c"


# ---- the table


def synthetic(tmp_path, losses):
    """Arms with given losses by seed; other numbers follow from them."""
    comparison = load_comparison(write_file(tmp_path, in_domain="code", out_of_domain="prose"))
    found = []
    for arm in comparison.arms:
        results = {}
        for seed, loss in losses[arm.name].items():
            metrics = {"loss": loss, "out_of_domain_loss": 2 * loss, "accuracy": 0.5}
            metrics["tokens_per_second"] = {"dense": 1000.0, "two": 250.0, "four": 500.0}[arm.name]
            metrics["dead_experts"] = float(seed) if arm.router else None
            metrics["causal_gap"] = 0.25 if arm.causality == "C3" else None
            metrics["executed_flops"], metrics["parameters_total"] = 1e5, 12345
            results[seed] = {"seed": seed, "settings": arm.settings, "metrics": metrics}
        found.append(ArmResult(arm, results, "" if results else "exit code 2. <b>boom</b>"))
    return comparison, found


LOSSES = {
    "dense": {0: 2.0, 1: 2.1, 2: 2.2},
    "two": {0: 1.8, 1: 1.9, 2: 2.01},
    "four": {0: 2.5, 1: 2.7, 2: 2.6},
}


def test_rows_are_means_and_intervals_over_seeds(tmp_path):
    comparison, arms = synthetic(tmp_path, LOSSES)
    two, dense, four = rows = table.rows(comparison, arms)
    assert [row.arm.name for row in rows] == ["two", "dense", "four"]
    for row in rows:
        values = list(LOSSES[row.arm.name].values())
        low, high = scipy.stats.t.interval(0.95, 2, np.mean(values), scipy.stats.sem(values))
        assert row.loss.mean == pytest.approx(np.mean(values))
        assert row.loss.half_width == pytest.approx((high - low) / 2)
        assert row.out_of_domain.mean == pytest.approx(2 * np.mean(values))
    pairs = [-0.2, -0.2, -0.19]
    low, high = scipy.stats.t.interval(0.95, 2, np.mean(pairs), scipy.stats.sem(pairs))
    assert two.difference.mean == pytest.approx(np.mean(pairs))
    assert two.difference.half_width == pytest.approx((high - low) / 2)
    assert two.difference.half_width < two.loss.half_width / 5, "what seeds share cancels"
    assert dense.difference == Interval(0.0, 0.0)
    assert [row.means["relative_speed"] for row in rows] == [0.25, 1.0, 0.5]
    assert [row.means["dead_experts"] for row in rows] == [1.0, None, 1.0]
    assert [row.means["causal_gap"] for row in rows] == [None, None, 0.25]
    assert four.state == "complete"


def test_missing_seeds_and_failed_arms(tmp_path):
    comparison, arms = synthetic(tmp_path, LOSSES | {"dense": {0: 2.0}, "four": {}})
    two, dense, four = table.rows(comparison, arms)
    assert (dense.state, math.isnan(dense.loss.half_width)) == ("incomplete", True)
    assert math.isnan(two.difference.half_width), "one pair"
    assert (four.state, four.loss, four.difference) == ("failed", None, None)
    text = table.to_text(comparison, [two, dense, four])
    assert "four failed: exit code 2." in text
    assert "nan" not in text
    assert "nan" not in table.to_csv(comparison, [two, dense, four])


def test_csv_has_full_numbers_and_gaps(tmp_path):
    comparison, arms = synthetic(tmp_path, LOSSES)
    text = table.to_csv(comparison, table.rows(comparison, arms))
    two, dense, four = csv.DictReader(text.splitlines())
    assert (two["arm"], two["group"], two["router"], two["causality"]) == (
        "two", "top-k", "topk", "C0"
    )  # fmt: skip
    assert float(two["seed_2"]) == 2.01
    assert float(two["loss"]) == np.mean([1.8, 1.9, 2.01])
    assert (dense["dead_experts"], dense["router"], four["causal_gap"]) == ("", "", "0.25")
    assert two["saturation"] == "", "no run measured it"


def test_text_leaves_out_columns_that_nobody_has(tmp_path):
    comparison, arms = synthetic(tmp_path, LOSSES)
    text = table.to_text(comparison, table.rows(comparison, arms))
    lines = text.splitlines()
    assert lines[0] == "loss: bits per byte of code, valid split"
    assert "saturation" not in lines[1]
    assert re.match(r"two +1\.903 \+- 0\.261 +-0\.197 \+- 0\.014 +3\.807 ", lines[2])
    assert lines[4].startswith("four (C3)")


def test_page_shows_arms_and_escapes(tmp_path):
    comparison, arms = synthetic(tmp_path, LOSSES | {"four": {}})
    rows = table.rows(comparison, arms)
    path = write_comparison_report(tmp_path, comparison, rows, command="python3 x", workers=2)
    page = path.read_text()
    body = page[page.index("<body>") :]
    assert "1.903 ± 0.261" in body
    assert "2 arms trained at once" in body
    assert "&lt;b&gt;boom" in body
    assert "<b>boom" not in body
    assert body.count('class="plotly-graph-div"') >= 4
    assert not re.search(r'(src|href)="http', body)


def test_page_without_any_result(tmp_path):
    comparison, arms = synthetic(tmp_path, {name: {} for name in LOSSES})
    rows = table.rows(comparison, arms)
    page = write_comparison_report(tmp_path, comparison, rows, command="x", workers=1).read_text()
    assert "nothing to show yet" in page
    assert "trained at once" not in page


# ---- what a run tells


def test_quality_is_that_of_the_domains():
    code = {"bits_per_byte": 2.0, "loss/cross_entropy": 1.4, "accuracy": 0.5}
    prose = {"bits_per_byte": 3.0, "loss/cross_entropy": 2.1, "accuracy": 0.25}
    rows = {"loss/cross_entropy": 0.3, "accuracy": 0.9}
    record = {"metrics": rows, "domains": {"code": code, "prose": prose}}
    assert measure.quality(record, "code", "prose") == {
        "loss": 2.0, "accuracy": 0.5, "out_of_domain_loss": 3.0
    }  # fmt: skip
    assert measure.quality(record, None, None) == {
        "loss": 0.3, "accuracy": 0.9, "out_of_domain_loss": None
    }  # fmt: skip


def test_drops_are_those_of_late_training():
    train = [{"routing/drop_rate": rate} for rate in (0.9, 0.8, 0.7, 0.6, 0.2, 0.1)]
    record = {"metrics": {"routing/max_violation": 1.5, "routing/dead_experts": 2.0}}
    found = measure.routing(record, train)
    assert found["drop_rate"] == pytest.approx(0.15)
    assert (found["load_violation"], found["dead_experts"], found["entropy"]) == (1.5, 2.0, None)
    assert measure.routing({"metrics": {}}, [{}])["drop_rate"] is None


@pytest.mark.slow  # trains: 30 s
def test_a_real_arm_from_command_to_table(tmp_path):
    file = write_file(
        tmp_path,
        base=str(ROOT / "configs" / "comparison.py"),
        arms={"topk": ("router=topk", {})},
        reference="topk",
        seeds=[0, 1],
        in_domain="code",
        out_of_domain="prose",
        overrides={"steps": 4, "checkpoint.every": 2, "log_every": 1, "evaluation.batches": 2},
    )
    out = tmp_path / "out"
    script = [sys.executable, str(ROOT / "scripts" / "compare_routers.py"), f"--config={file}"]
    subprocess.run([*script, f"--workdir={out}"], check=True, cwd=ROOT, timeout=250)
    (row,) = csv.DictReader((out / "results.csv").read_text().splitlines())
    assert (row["arm"], row["state"], row["n"], row["choices"]) == ("topk", "complete", "2", "4.0")
    assert row["executed_flops"] == row["flops_per_token"], "a router of fixed k, nothing dropped"
    assert 0.0 < float(row["saturation"]) <= 1.0
    assert 0.0 < float(row["loss"]) != float(row["out_of_domain"])
    assert row["seed_0"] != row["seed_1"]
    assert (out / "report.html").exists()
    assert not (out / "topk" / "cache").exists()
