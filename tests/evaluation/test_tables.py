"""The matrix of combinations, tables as text, and evaluations as JSON."""

import json

import numpy as np
import pytest

from moe.data.tokenizers import byte_tokenizer
from moe.errors import ConfigError
from moe.evaluation import matrix, tables
from moe.evaluation.evaluate import Evaluation, Sample
from moe.evaluation.record import evaluation_record, write_json
from moe.model.build import ModelSize

QUALITY = {
    "loss/cross_entropy": 1.25,
    "perplexity": 3.5,
    "bits_per_byte": 1.8,
    "accuracy": 0.5,
    "tokens": 12345.0,
}


def test_matrix_is_every_combination_the_last_key_fastest():
    parsed = matrix.parse(" router.k=1, 2 ;dispatch.capacity_factor=1.0,none; ")
    assert parsed == [
        [("router.k", "1"), ("dispatch.capacity_factor", "1.0")],
        [("router.k", "1"), ("dispatch.capacity_factor", "none")],
        [("router.k", "2"), ("dispatch.capacity_factor", "1.0")],
        [("router.k", "2"), ("dispatch.capacity_factor", "none")],
    ]


@pytest.mark.parametrize("text", ["", ";", "router.k", "router.k=", "=1", "a=1;a=2", "a=1;b"])
def test_matrix_refuses(text):
    with pytest.raises(ConfigError, match="--matrix"):
        matrix.parse(text)


def test_align():
    assert tables.align([["", "x"], ["name", "10"], ["n", "5"]]) == "       x\nname  10\nn      5"


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.12345, "0.1235"), (12345.6, "12,346"), (7, "7"), (-20000.0, "-20,000")],
)
def test_number(value, text):
    assert tables.number(value) == text


def make_record(routing: dict, **changes: bool) -> dict:
    domains = {name: dict(QUALITY) for name in ("code", "prose")}
    evaluation = Evaluation(
        QUALITY | routing,
        domains,
        {"code": [[0.25, 0.75]], "prose": [[1.0, 0.0]]},
        Sample(np.array([104, 105, 256]), np.array([[[0], [1], [-1]]]), 1),
        {"routing/coactivation": [[[1.0, 0.5], [0.25, 1.0]]]},
    )
    return evaluation_record(
        evaluation,
        step=30,
        split="test",
        domains=("code", "prose"),
        tokenizer=byte_tokenizer(),
        model={**ModelSize(2_000_000, 500_000, 1e6)._asdict(), "flops_executed": 9e5},
        causality={"router": "C0", "causal_form": True} | changes,
        speed={"speed/tokens_per_second": 1234.5, "memory/host_peak_bytes": 1e9},
    )


def test_record_has_the_interface():
    record = make_record({"routing/drop_rate": 0.0})
    assert set(record) == {
        "step",
        "split",
        "metrics",
        "domains",
        "domain_load",
        "tables",
        "model",
        "causality",
        "sample",
        "favourites",
        "modality_load",
    }
    assert record["metrics"]["speed/tokens_per_second"] == 1234.5
    assert record["model"] == {
        "parameters_total": 2_000_000,
        "parameters_active": 500_000,
        "flops_per_token": 1e6,
        "flops_executed": 9e5,
    }
    assert record["sample"]["domain"] == "prose"
    assert record["sample"]["tokens"][:2] == ["h", "i"]
    assert record["sample"]["experts"] == [[[0], [1], [-1]]]
    assert record["tables"]["routing/coactivation"][0][1] == [0.25, 1.0]


def test_table_of_an_evaluation():
    routing = {"routing/drop_rate": 0.125, "routing/load": [[0.5, 0.5]]}
    text = tables.evaluation_table(make_record(routing))
    assert text.startswith("step 30, split test\n\n")
    rows = [line.split() for line in text.splitlines()]
    assert ["all", "1.2500", "3.5000", "1.8000", "0.5000", "12,345"] in rows
    assert ["prose", "1.2500", "3.5000", "1.8000", "0.5000", "12,345"] in rows
    assert ["routing/drop_rate", "0.1250"] in rows
    assert ["parameters_total", "2,000,000"] in rows
    assert ["speed/tokens_per_second", "1234.5000"] in rows
    assert "routing/load" not in text
    assert "routing" not in tables.evaluation_table(make_record({}))
    assert "no causal form" in tables.evaluation_table(make_record({}, causal_form=False))


def test_table_of_a_matrix():
    rows = []
    for k, rate in (("1", 0.0), ("2", 0.25)):
        record = make_record({"routing/drop_rate": rate})
        rows.append({"overrides": {"router.k": k}, **record})
    lines = [line.split() for line in tables.matrix_table(rows).splitlines()]
    assert lines[0][:2] == ["router.k", "loss/cross_entropy"]
    at = lines[0].index("routing/drop_rate")
    assert [line[at] for line in lines[1:]] == ["0.0000", "0.2500"]
    assert [line[0] for line in lines[1:]] == ["1", "2"]


def test_json_is_whole_and_strict(tmp_path):
    path = tmp_path / "eval" / "valid-1.json"
    write_json(path, {"a": 1.5})
    assert json.loads(path.read_text()) == {"a": 1.5}
    write_json(path, {"a": float("nan"), "b": [float("inf"), 2]})
    assert json.loads(path.read_text()) == {"a": None, "b": [None, 2]}
    assert [p.name for p in path.parent.iterdir()] == ["valid-1.json"]
