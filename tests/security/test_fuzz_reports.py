"""A report of records that somebody changed: a page, or one paragraph."""

import json

import pytest

from moe.report import write_report
from tests.report.fake_run import write_run
from tests.security.fuzz import check, mutated_json

EXAMPLES = [5, pytest.param(300, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("name", ["eval/valid-40.json", "config.json", "metrics.jsonl"])
def test_the_page_of_changed_records(tmp_path, name, examples):
    write_run(tmp_path, steps=40, every=10, layers=2, experts=3)
    path = tmp_path / name
    lines = path.read_text().splitlines()[-3:] if name == "metrics.jsonl" else [path.read_text()]

    def holds(values):
        rows = values if isinstance(values, list) else [values]
        path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, json.loads(lines[0])]))
        write_report(tmp_path)

    def holds_one(value):
        path.write_text(json.dumps(value))
        write_report(tmp_path)

    original = [json.loads(line) for line in lines]
    if name == "metrics.jsonl":
        check(examples, holds, mutated_json(original))
    else:
        check(examples, holds_one, mutated_json(original[0]))
