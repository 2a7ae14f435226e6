"""The table of scores: a new one is a function and a row here.

Each takes an `Evidence` on the host and gives a value with its bootstrap interval.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

from jaxtyping import Bool, Float, Int, Num
import numpy as np

from moe.errors import find_row
from moe.evaluation import retrieval, text_scores
from moe.evaluation.bootstrap import (
    Interval,
    mean_interval,
    percentiles,
    ratio_interval,
    resampled_cells,
)
from moe.evaluation.examples import Examples

CHOICES = 4  # candidates of `choice_accuracy`


class Evidence(NamedTuple):
    """What scores are computed from; rows of `examples` and texts need not be the same ones."""

    examples: Examples
    # Texts of decoded examples, one after another; of a matching task, of every row of `examples`.
    references: Sequence[str] | None = None
    hypotheses: Sequence[str] | None = None
    languages: Sequence[str] | None = None  # of each reference; None: words as in English
    sources: Sequence[Hashable] | None = None  # what each query is; None: all are different
    seed: int = 0  # of distractors
    ranks: dict[bool, Int[np.ndarray, " n"]] | None = None  # by direction, once computed


class Score(NamedTuple):
    """One score."""

    tasks: tuple[str, ...]
    needs: tuple[str, ...]  # fields of `Evidence`, or of its examples, that must be there
    compute: Callable[[Evidence], Interval | None]  # None: too few examples for it
    higher: bool = True  # whether more is better
    text: str = ""


def task_scores(
    task: str,
    examples: Examples,
    references: Sequence[str] | None = None,
    hypotheses: Sequence[str] | None = None,
    *,
    languages: Sequence[str] | None = None,
    sources: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> dict[str, Interval]:
    """Every score of a task that there is evidence for, in the order of the table.

    Args:
        task: `task.name` of the config.
        examples: of the whole split.
        references: right texts. For `match`: what the target of each row of `examples` is.
        hypotheses: texts of the model, as many.
        languages: of the references.
        sources: for `match`, what the source of each row is: text, or a hash of a picture.
        seed: of distractors.
    """
    evidence = Evidence(examples, references, hypotheses, languages, sources, seed, {})
    found = {}
    for name, score in SCORES.items():
        if task in score.tasks and all(_has(evidence, field) for field in score.needs):
            value = score.compute(evidence)
            if value is not None:
                found[name] = value
    return found


def _has(evidence: Evidence, field: str) -> bool:
    holder = evidence if field in Evidence._fields else evidence.examples
    value = getattr(holder, field)
    return value is not None and len(value) > 0


def primary_score(task: str, name: str | None = None) -> str:
    """The score that a task is judged by, or the one that the config names.

    Raises:
        ConfigError: no such score.
    """
    if name is None:
        return PRIMARY[task]
    find_row(SCORES, "evaluation.primary", name, "not a score")
    return name


# --- of predictions, by row


def _bits_per_byte(evidence: Evidence) -> Interval | None:
    e = evidence.examples
    if not np.sum(e.bytes) > 0:
        return None
    return ratio_interval(np.asarray(e.nll) / np.log(2.0), e.bytes)


def _cross_entropy(evidence: Evidence) -> Interval:
    return ratio_interval(evidence.examples.nll, evidence.examples.count)


def _token_accuracy(evidence: Evidence) -> Interval:
    return ratio_interval(evidence.examples.correct, evidence.examples.count)


def _accuracy(evidence: Evidence) -> Interval:
    e = evidence.examples
    hits = np.asarray(e.label) == np.asarray(e.prediction)
    drawn = mean_interval(hits.astype(np.float64))
    from sklearn.metrics import accuracy_score  # a quarter of the time in which a run starts

    return drawn._replace(value=float(accuracy_score(e.label, e.prediction)))


def _macro_f1(evidence: Evidence) -> Interval:
    """Mean of F1 over the classes that occur as a label or as a prediction."""
    e = evidence.examples
    from sklearn.metrics import confusion_matrix, f1_score

    value = f1_score(e.label, e.prediction, average="macro", zero_division=0.0)
    table = confusion_matrix(e.label, e.prediction)  # [C C]
    drawn = resampled_cells(table.ravel()).reshape(-1, *table.shape)
    return percentiles(float(value), macro_f1_of(drawn), int(table.sum()))


def macro_f1_of(tables: Num[np.ndarray, "R C C"]) -> Float[np.ndarray, " R"]:
    """Macro-F1 of confusion matrices, rows by label; of the classes that occur in each."""
    hits = np.einsum("rcc->rc", tables)
    members = tables.sum(axis=1) + tables.sum(axis=2)  # predictions and labels of each class
    f1 = 2.0 * hits / np.maximum(members, 1)
    return f1.sum(axis=1) / np.maximum((members > 0).sum(axis=1), 1)


# --- of embeddings


def _pairs(evidence: Evidence, *, backward: bool) -> retrieval.Pairs:
    embedding, targets = evidence.examples.embedding, evidence.references
    assert embedding is not None
    assert targets is not None
    sources = range(len(targets)) if evidence.sources is None else evidence.sources
    return retrieval.make_pairs(np.asarray(embedding), sources, targets, backward=backward)


def _recall(at: int, *, backward: bool = False) -> Callable[[Evidence], Interval]:
    def compute(evidence: Evidence) -> Interval:
        known = {} if evidence.ranks is None else evidence.ranks
        if backward not in known:
            known[backward] = retrieval.ranks(_pairs(evidence, backward=backward))
        return mean_interval((known[backward] < at).astype(np.float64))

    return compute


def _choice(evidence: Evidence) -> Interval | None:
    hits = retrieval.choices(_pairs(evidence, backward=False), CHOICES, evidence.seed)
    return None if hits is None else mean_interval(hits.astype(np.float64))


# --- of texts


def _of_texts(
    score: Callable[[Sequence[str], Sequence[str]], Interval],
) -> Callable[[Evidence], Interval]:
    def compute(evidence: Evidence) -> Interval:
        assert evidence.references is not None
        assert evidence.hypotheses is not None
        return score(evidence.references, evidence.hypotheses)

    return compute


def _bleu(evidence: Evidence) -> Interval:
    assert evidence.references is not None
    assert evidence.hypotheses is not None
    languages = evidence.languages
    if languages is None:
        languages = [""] * len(evidence.references)
    return text_scores.bleu(evidence.references, evidence.hypotheses, languages)


def ctc_ids(
    path: Int[np.ndarray, " S"], valid: Bool[np.ndarray, " S"] | None, blank: int
) -> Int[np.ndarray, " U"]:
    """Labels of a CTC path: repeats are one, then blanks go (Graves et al. 2006)."""
    path = np.asarray(path)
    if valid is not None:
        path = path[valid]
    first = np.ones(len(path), bool)
    first[1:] = path[1:] != path[:-1]
    return path[first & (path != blank)]


_TOKENS = ("language", "seq2seq")
_TEXTS = ("references", "hypotheses")
_PAIR = ("embedding", "references")
SCORES: dict[str, Score] = {
    "bits_per_byte": Score(
        ("language",), ("bytes",), _bits_per_byte, False, "nats of all targets over their bytes"
    ),
    "loss/cross_entropy": Score(
        (*_TOKENS, "classify"), ("nll",), _cross_entropy, False, "nats a prediction"
    ),
    "token_accuracy": Score(
        _TOKENS, ("correct",), _token_accuracy, text="targets that are the most likely token"
    ),
    "accuracy": Score(("classify",), ("label", "prediction"), _accuracy, text="scikit-learn"),
    "macro_f1": Score(("classify",), ("label", "prediction"), _macro_f1, text="scikit-learn"),
    "bleu": Score(("seq2seq",), _TEXTS, _bleu, text="sacrebleu, 0 to 100"),
    "chrf": Score(("seq2seq",), _TEXTS, _of_texts(text_scores.chrf), text="sacrebleu, 0 to 100"),
    "exact_match": Score(
        ("seq2seq",), _TEXTS, _of_texts(text_scores.exact_match), text="SQuAD's normalisation"
    ),
    "token_f1": Score(
        ("seq2seq",), _TEXTS, _of_texts(text_scores.token_f1), text="SQuAD's normalisation"
    ),
    "character_error_rate": Score(
        ("ctc",), _TEXTS, _of_texts(text_scores.character_error_rate), False, "jiwer"
    ),
    "word_error_rate": Score(
        ("ctc",), _TEXTS, _of_texts(text_scores.word_error_rate), False, "jiwer"
    ),
    **{
        f"recall@{at}": Score(("match",), _PAIR, _recall(at), text="target of a source")
        for at in (1, 5, 10)
    },
    **{
        f"recall_back@{at}": Score(
            ("match",), _PAIR, _recall(at, backward=True), text="source of a target"
        )
        for at in (1, 5, 10)
    },
    "choice_accuracy": Score(
        ("match",), _PAIR, _choice, text=f"own target before {CHOICES - 1} others of the split"
    ),
}

# What each task is judged by where `evaluation.primary` names nothing.
PRIMARY = {
    "language": "bits_per_byte",
    "classify": "accuracy",
    "seq2seq": "chrf",
    "ctc": "character_error_rate",
    "match": "recall@5",
}
