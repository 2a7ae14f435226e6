"""report.html of a run: what it learned, how fast, and which expert took what."""

from collections.abc import Mapping, Sequence
import json
import os
from pathlib import Path
from typing import Any

from moe.errors import DataError
from moe.report import figures, kinds, page, specialisation, summary, triad
from moe.report.records import Record, Run, read_run, series

ROUTING_PLOTS = (
    (
        "max_violation",
        "Max violation",
        "fullest expert / mean - 1",
        "How far the fullest expert is above the mean load: 0 is perfect balance.",
    ),
    (
        "entropy",
        "Router entropy",
        "nats a token",
        "Entropy of one token's router probabilities: log E is undecided, 0 is certain.",
    ),
    (
        "drop_rate",
        "Drops",
        "fraction of choices",
        "Choices that found their expert full and were left out; 0 wherever dispatch is dropless.",
    ),
    (
        "dead_experts",
        "Dead experts",
        "experts",
        "Experts that hardly any token chose in a step: parameters that learn nothing.",
    ),
)


def write_report(workdir: str | os.PathLike[str]) -> Path:
    """Writes `report.html` in a workdir from what the run has logged so far.

    Args:
        workdir: of a run; `metrics.jsonl` is needed, `config.json` and `eval/*.json` are used where
            they are there.

    Returns:
        The page's path.

    Raises:
        DataError: no metrics.jsonl, nothing in it that can be read, or records that are not as a run
            leaves them.
    """
    workdir = Path(workdir)
    run = read_run(workdir)
    try:
        text = _page(run)
    except (AttributeError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise DataError(
            f"The records in {workdir} are not as train.py and eval.py write them "
            f"({type(error).__name__}: {error}): no page can be made. Mend or remove the file of eval/ that "
            "was changed, or evaluate again."
        ) from error
    return page.write_page(workdir / "report.html", text)


def _page(run: Run) -> str:
    evaluation = _main_evaluation(run)
    return page.render(
        "run.html",
        title=run.name,
        notices=run.notices,
        headline=summary.headline(run, evaluation),
        summary=summary.main_keys(run.config),
        origin=summary.origin(run.config),
        config_text=json.dumps(run.config, indent=2, ensure_ascii=False, default=str),
        evaluations=summary.evaluation_rows(run),
        routing=specialisation.numbers(evaluation),
        evaluation=evaluation,
        sections=_sections(run, evaluation),
        sample=summary.sample(evaluation),
    )


def _main_evaluation(run: Run) -> Record:
    """The evaluation whose domains and sample are shown: the newest, valid before others."""
    found = run.evaluations.values()
    return max(found, key=lambda e: (e.get("step", 0), e.get("split") == "valid"), default={})


def _sections(run: Run, evaluation: Record) -> list[page.Section]:
    train = run.metrics.get("train", [])
    held_out = {split: records for split, records in run.metrics.items() if split != "train"}
    before = page.sections(
        (
            "Learning",
            "Training as logged, held-out splits as evaluated during the run.",
            _learning(train, held_out),
        ),
        (
            "Speed",
            "Measured on the training loop; evaluation and checkpoints are not counted.",
            _speed(train),
        ),
        (
            "Load",
            "Which experts the tokens went to. White is the balanced share, 1/E of the choices; "
            "red is more, blue is less.",
            _load(train),
        ),
        (
            "Balance and confidence",
            "Black is the mean over sparse layers; coloured lines are the "
            "layers, dark for the first and light for the last.",
            _routing(train),
        ),
    )
    after = page.sections(
        (
            "How experts specialise",
            "From the newest evaluation, layer by layer, and how routing settled on the way there.",
            specialisation.plots(evaluation, held_out.get("valid", [])),
        ),
    )
    return [*triad.sections(run), *before, *kinds.sections(evaluation), *after]


def _learning(train: Sequence[Record], held_out: Mapping[str, Sequence[Record]]) -> list[page.Plot]:
    splits = {"train": train, **held_out}

    def by_split(key: str) -> dict[str, Any]:
        return {split: series(records, key) for split, records in splits.items()}

    terms: dict[str, Any] = {
        key.removeprefix("loss/"): series(train, key)
        for key in ("loss/balance", "loss/sequence_balance", "loss/z")
    }
    return page.plots(
        (
            "Cross-entropy",
            "Nats a token; a gap that opens between train and valid is overfitting.",
            figures.lines(by_split("loss/cross_entropy"), "nats a token"),
        ),
        (
            "Bits per byte",
            "Compression of the text, comparable between tokenizers; lower is better.",
            figures.lines(by_split("bits_per_byte"), "bits per byte"),
        ),
        (
            "Auxiliary losses",
            "Router losses as logged; the balance loss is least when load is even.",
            figures.lines(terms, "loss"),
        ),
        (
            "Learning rate",
            "The schedule as it was applied.",
            figures.lines({"learning rate": series(train, "learning_rate")}, "learning rate"),
        ),
        (
            "Gradient norm",
            "Before clipping, on a log axis; spikes go before instabilities.",
            figures.lines({"gradient norm": series(train, "grad_norm")}, "norm", log=True),
        ),
        (
            "Accuracy",
            "Fraction of next tokens that were the most likely one.",
            figures.lines(by_split("accuracy"), "fraction"),
        ),
    )


def _speed(train: Sequence[Record]) -> list[page.Plot]:
    def one(name: str, key: str, unit: str) -> Any:
        return figures.lines({name: series(train, f"speed/{key}")}, unit)

    return page.plots(
        (
            "Tokens a second",
            "Training tokens over wall time, all devices together.",
            one("tokens/s", "tokens_per_second", "tokens/s"),
        ),
        ("Step time", "Seconds a step, input included.", one("step", "step_seconds", "seconds")),
        (
            "Model FLOPs utilisation",
            "Useful FLOPs of the model over the devices' peak.",
            one("MFU", "mfu", "fraction"),
        ),
        (
            "Data wait",
            "Seconds a step spent waiting for input; near 0 means the input keeps up.",
            one("wait", "data_wait_seconds", "seconds"),
        ),
    )


def _load(train: Sequence[Record]) -> list[page.Plot]:
    load = series(train, "routing/load", rank=2)
    if load is None:
        return []
    shown = figures.pick(load, figures.load_points(*load.values.shape[1:]))
    return [
        page.Plot(
            "Layer by expert",
            f"Move the slider over {len(shown.steps)} logged steps; a column of one colour is an "
            "expert index, a row is a layer.",
            figures.load_over_layers(shown),
            wide=True,
        ),
        page.Plot(
            "Experts over steps",
            "Choose a layer: a row that stays blue is an expert that never found its tokens, "
            "stripes are oscillation.",
            figures.load_over_steps(shown),
            wide=True,
        ),
    ]


def _routing(train: Sequence[Record]) -> list[page.Plot]:
    return page.plots(
        *(
            (
                title,
                caption,
                figures.layer_lines(
                    series(train, f"routing/{key}"),
                    series(train, f"routing/per_layer/{key}", rank=1),
                    unit,
                ),
            )
            for key, title, unit, caption in ROUTING_PLOTS
        )
    )
