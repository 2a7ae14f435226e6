"""What a run or an arm left in a folder that was a stranger's in the meantime."""

import json
from types import SimpleNamespace

from hypothesis import strategies as st
import pytest

import eval as evaluation
from moe import session
from moe.data import tokenizers
from moe.errors import CheckpointError, ConfigError, DataError
from moe.sweep import arm_runner, arms, comparison_table, measure
from moe.training import history, rewind
from scripts import checkpoint as program
from tests.security.fuzz import DEEP, check, json_files, sizes, values

SETTINGS = {"optimizer": {"learning_rate": 0.1}}
METRICS = {"loss": 1.5, "accuracy": 0.5, "saturation": None, "parameters_total": 100}
ARM = arms.Arm("a", "", {}, "other", "", "", SETTINGS)
COMPARISON = arms.Comparison("x", "", (ARM,), "a", (0, 1), "language", None, None)
REWIND = {"event": "rewind", "step": 4, "next_row": 40, "resume_row": 80}
QUALITY = {"bits_per_byte": 2.0, "loss/cross_entropy": 1.4, "accuracy": 0.5}
ROUTING = {"routing/max_violation": 0.5, "routing/entropy": None}
LAYERS = {"routing/per_layer/choices": [1.0, 2.0], "routing/per_layer/drop_rate": [0.0, 0]}
EVALUATION = {"metrics": QUALITY | ROUTING | LAYERS, "domains": {"code": QUALITY}}
BAD = [*DEEP, b"", b"\xff\xfe", b"null", b"[]", b"5", b"{}"]


# ---- results of arms


def result_in(tmp_path, name="seed-0"):
    path = tmp_path / "a" / name / arm_runner.RESULT
    path.parent.mkdir(parents=True)
    return path


def shown(tmp_path):
    """Everything that is made of the results of an arm."""
    results = arm_runner.read_results(ARM, tmp_path)
    other = {1: arm_runner.stored(SETTINGS, 1, {"loss": 2.0, "accuracy": 0.25})}
    found = comparison_table.rows(COMPARISON, [arm_runner.ArmResult(ARM, other | results)])
    comparison_table.to_csv(COMPARISON, found)
    comparison_table.to_text(COMPARISON, found)
    [f"{result['metrics']['loss']:.4f}" for result in results.values()]
    return results


@sizes(80)
def test_results(tmp_path, examples):
    path = result_in(tmp_path)

    def holds(data):
        path.write_bytes(data)
        assert shown(tmp_path).keys() <= {0}

    check(examples, holds, json_files(arm_runner.stored(SETTINGS, 0, METRICS)))


@pytest.mark.parametrize(
    "record",
    [
        {"seed": "0"},
        {"seed": False},
        {"metrics": METRICS | {"loss": "1.5"}},
        {"metrics": METRICS | {"loss": None}},
        {"metrics": METRICS | {"accuracy": [1.0]}},
        {"metrics": METRICS | {"accuracy": True}},
        {"metrics": METRICS | {"parameters_total": 10**400}},
        {"metrics": METRICS | {"loss": -1e200}},
        {"metrics": METRICS | {"loss": float("inf")}},
    ],
)
def test_a_result_of_no_numbers_is_moved_aside(tmp_path, record):
    path = result_in(tmp_path, f"seed-{record.get('seed', 0)}")
    path.write_text(json.dumps(arm_runner.stored(SETTINGS, 0, METRICS) | record))
    assert shown(tmp_path) == {}
    assert path.with_name(arm_runner.DAMAGED).exists()


@pytest.mark.parametrize("data", BAD)
def test_a_result_that_is_none(tmp_path, data):
    path = result_in(tmp_path)
    path.write_bytes(data)
    assert shown(tmp_path) == {}
    assert path.with_name(arm_runner.DAMAGED).read_bytes() == data


def test_a_result_that_is_a_folder(tmp_path):
    result_in(tmp_path).mkdir()
    with pytest.raises(ConfigError, match=r"result\.json cannot be read"):
        arm_runner.read_results(ARM, tmp_path)


# ---- the evaluation that an arm is measured by


def measured(path):
    for domains in ((None, None), ("code", None), ("code", "code")):
        record = measure.read_record(path, path.parent, domains)
        measure.quality(record, *domains)
        measure.routing(record, [{"routing/drop_rate": None}, {"routing/drop_rate": 0.5}])
    measure._check_layers(path, path.parent, record["metrics"], 2)
    measure._per_layer(record["metrics"], "choices") * measure._per_layer(
        record["metrics"], "drop_rate"
    )


@sizes(80)
def test_evaluations(tmp_path, examples):
    path = tmp_path / "valid-4.json"

    def holds(data):
        path.write_bytes(data)
        measured(path)

    check(examples, holds, json_files(EVALUATION))


@pytest.mark.parametrize(
    "data",
    [
        *BAD,
        json.dumps(EVALUATION | {"domains": {}}).encode(),
        json.dumps(EVALUATION | {"metrics": QUALITY | {"accuracy": None} | LAYERS}).encode(),
        json.dumps(EVALUATION | {"metrics": QUALITY | {"bits_per_byte": "2"} | LAYERS}).encode(),
        json.dumps(EVALUATION | {"metrics": QUALITY}).encode(),
        json.dumps(EVALUATION | {"metrics": QUALITY | LAYERS | {"routing/entropy": "1"}}).encode(),
        json.dumps(
            EVALUATION | {"metrics": QUALITY | LAYERS | {"routing/per_layer/choices": [1]}}
        ).encode(),
    ],
)
def test_an_evaluation_that_lacks_a_number(tmp_path, data):
    path = tmp_path / "valid-4.json"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"valid-4\.json.* cannot be read .*eval\.py --workdir="):
        measured(path)


# ---- the workdir


@sizes(80)
def test_rewinds(tmp_path, examples):
    path = tmp_path / history.HISTORY_FILE

    def holds(data):
        path.write_bytes(data + b"\n")
        assert rewind.resume_row(history.read(tmp_path), 4, 40) >= 0

    check(examples, holds, json_files(REWIND))


@pytest.mark.parametrize("key", ["step", "next_row", "resume_row"])
@pytest.mark.parametrize("value", [None, "40", 1.5, -1, True, 2**70, [], ...])
def test_a_rewind_without_its_numbers(tmp_path, key, value):
    event = {k: v for k, v in {**REWIND, key: value}.items() if v is not ...}
    (tmp_path / history.HISTORY_FILE).write_text(json.dumps(event) + "\n")
    with pytest.raises(CheckpointError, match=r"history\.jsonl, line 1 .* or remove that line"):
        history.read(tmp_path)


@pytest.mark.parametrize("data", BAD)
def test_a_saved_tokenizer(tmp_path, data):
    (tmp_path / session.TOKENIZER_FILE).write_bytes(data)
    with pytest.raises(DataError, match=r"tokenizer\.json cannot be read.* Restore it"):
        session.saved_tokenizer(tmp_path)


def test_a_saved_tokenizer_that_is_a_folder(tmp_path):
    (tmp_path / session.TOKENIZER_FILE).mkdir()
    with pytest.raises(DataError, match=r"tokenizer\.json cannot be read"):
        session.saved_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "meta", [{}, {"tokenizer": None}, {"tokenizer": 5}, {"tokenizer": "[" * 9}]
)
def test_a_checkpoint_without_a_tokenizer(meta):
    with pytest.raises(CheckpointError, match="Checkpoint 7 has no tokenizer"):
        evaluation.tokenizer_of(SimpleNamespace(load_meta=lambda step: meta), 7)
    saved = {"tokenizer": tokenizers.byte_tokenizer().to_json()}
    assert evaluation.tokenizer_of(SimpleNamespace(load_meta=lambda step: saved), 7).kind == "bytes"


@sizes(40)
def test_the_config_that_says_which_checkpoint_is_best(tmp_path, examples):
    def holds(task):
        (tmp_path / "config.json").write_text(json.dumps({"config": {"task": task}}))
        assert program._best(tmp_path)

    names = st.fixed_dictionaries({"name": values | st.just("language")})
    check(examples, holds, values | names)


@pytest.mark.parametrize("config", [{"task": 5}, {"task": {"name": 5}}, {"task": {"name": "x"}}])
def test_no_checkpoint_is_best_by_a_foreign_config(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps({"config": config}))
    with pytest.raises(ConfigError, match="task"):
        program._best(tmp_path)
