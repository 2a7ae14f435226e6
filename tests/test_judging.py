"""Scores of a split and of other data, from a config and numbers to the entries of a record."""

import jax
import pytest

from moe import judging, setup
from moe.data.tokenizers import byte_tokenizer
from moe.errors import ConfigError
from moe.evaluation.compare import Numbers
from moe.model.build import model_size, model_spec
from moe.model.spec import Named
from tests import tiny
from tests.evaluation.example_data import text_examples

DOMAINS = ("en-es", "en-zh")
ROWS = [(f"{'abcdefgh'[i % 8]}{i}", f"{'stuvwxyz'[i % 8]}", i % 2, i % 2) for i in range(12)]
DATA = (
    *("data.batch_size=8", "data.sequence_length=16", "model.num_layers=1"),
    "evaluation.train_gap=1",
)


def examples_of(config, tokenizer=None, **_):
    """In place of the data of a disk: longer rows and more splits where the config asks."""
    name, length = config.data.name, config.data.sequence_length
    rows = {"train": ROWS, "test": ROWS[:5], "test_2x": ROWS[5:]}
    classes = {"three": ("a", "b", "c"), "swapped": ("no", "yes")}.get(name, ("yes", "no"))
    task = config.task.name
    return text_examples(
        task,
        rows,
        domains=DOMAINS,
        length=length,
        batch_size=config.data.batch_size,
        classes=classes if task == "classify" else (),
    )


@pytest.fixture(autouse=True)
def in_memory(monkeypatch):
    monkeypatch.setattr(setup, "open_data", examples_of)


def run_of(task: str, generalisation: dict, *overrides: str) -> setup.Run:
    config = tiny.config(f"task.name={task}", *DATA, *overrides)
    with config.unlocked():
        config.evaluation.generalisation = generalisation
    return setup.set_up(config, byte_tokenizer(), training=False)


def judged(run: setup.Run, split: str) -> tuple[dict, judging.Judge]:
    numbers = Numbers(*tiny.numbers(run.skeleton))
    judge, checks = judging.Judge(numbers), judging.prepare_checks(run, split)
    with jax.set_mesh(run.mesh):
        record, evaluation = setup.evaluate_split(
            run,
            judge.step(run),
            *numbers,
            split=split,
            step=1,
            size=model_size(run.spec, run.config.data.sequence_length),
        )
        return judge.judge(run, split, record, evaluation, checks), judge


def test_translation_is_written_scored_and_checked():
    checks = {"longer": {"split": "test_2x", "sequence_length": 32}, "others": {"split": "test_2x"}}
    decoding = ("evaluation.decode=beam", "evaluation.beam=2", "evaluation.decode_length=3")
    entries, judge = judged(run_of("seq2seq", checks, *decoding), "test")
    triad = entries["triad"]
    assert triad["primary"] == "chrf"
    assert set(triad["accuracy"]) == {
        *("loss/cross_entropy", "token_accuracy", "bleu", "chrf", "exact_match", "token_f1"),
    }
    assert triad["accuracy"]["chrf"]["n"] == 5
    others = triad["generalisation"]
    assert set(others) == {"train", "longer", "others"}
    assert others["train"]["chrf"]["n"] == 8  # one batch
    assert others["longer"]["chrf"]["n"] == others["others"]["chrf"]["n"] == 7
    # Padding changes nothing, and rows of the same shape need no program of their own.
    for name, found in others["others"].items():
        assert others["longer"][name]["value"] == pytest.approx(found["value"], rel=1e-4), name
    assert len(judge._steps) == 2
    assert set(entries["scores"]) == set(DOMAINS)
    assert triad["cost"]["flops_per_example"] == 16 * triad["cost"]["flops_per_token"]


def test_classes_are_scored_without_texts():
    entries, _ = judged(run_of("classify", {}, "evaluation.train_gap=0"), "test")
    triad = entries["triad"]
    assert triad["primary"] == "accuracy"
    assert triad["accuracy"]["accuracy"]["n"] == 5
    assert set(triad["accuracy"]) == {"loss/cross_entropy", "accuracy", "macro_f1"}
    assert triad["generalisation"] == {}


@pytest.mark.parametrize(
    ("task", "checks", "message"),
    [
        ("seq2seq", {"x": {"sequence_lenght": 4}}, r"x\.sequence_lenght.*'sequence_length'"),
        ("seq2seq", {"x": {"split": "test_4x"}}, "'test_4x'"),
        ("seq2seq", {"x": 3}, "x=3 must be a dict"),
        ("classify", {"x": {"name": "three"}}, "x=.*other parameters"),
        ("classify", {"x": {"name": "swapped"}}, "x=.*classes"),
    ],
)
def test_checks_that_cannot_work_are_refused_before_anything_compiles(task, checks, message):
    run = run_of(task, checks)
    with pytest.raises(ConfigError, match=message):
        judging.prepare_checks(run, "test")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("primary", "belu", "evaluation.primary='belu'.*bleu"),
        ("beam", 0, "beam=0"),
        ("length_penalty", -0.5, r"length_penalty=-0\.5"),
    ],
)
def test_scores_and_decodings_that_there_are_not(key, value, message):
    config = tiny.config("task.name=seq2seq", "evaluation.decode=beam")
    spec = model_spec(config, 8)
    judging.check_judging(config, spec)
    config.evaluation[key] = value
    with pytest.raises(ConfigError, match=message):
        judging.check_judging(config, spec)


def test_what_goes_by_places_cannot_write():
    config = tiny.config("task.name=seq2seq", "evaluation.decode=greedy", "task.prefix=causal")
    spec = model_spec(config, 8)._replace(attention=Named("block"))
    with pytest.raises(
        ConfigError, match=r"prompts of different lengths .*evaluation\.decode='none'"
    ):
        judging.check_judging(config, spec)
