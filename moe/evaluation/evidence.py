"""From an evaluated split to its scores: what was written, what is right, and by domain."""

from collections.abc import Hashable, Sequence
import itertools

import jax
from jaxtyping import Array, Bool, Key
import numpy as np

from moe.data.batches import RowData
from moe.data.example_data import ExampleData
from moe.dispatch.types import Dispatch
from moe.evaluation.bootstrap import Interval
from moe.evaluation.decode import Decoding, decode, prompts_of, until
from moe.evaluation.examples import Examples
from moe.evaluation.scores import ctc_ids, task_scores
from moe.evaluation.text_scores import language_of
from moe.model.transformer import Transformer


def decode_split(
    model: Transformer,
    dispatch: Dispatch,
    data: RowData,
    split: str,
    decoding: Decoding,
    key: Key[Array, ""],
    *,
    batches: int | None = None,
    examples: int | None = None,
) -> dict[int, str]:
    """What a model writes behind the source of every example of a split.

    Every process reads all rows, since prompts of a batch are the same on each.

    Args:
        model: with its numbers.
        dispatch: how tokens reach experts.
        data: of a task with sources and targets.
        split: name.
        decoding: how to choose tokens.
        key: of sampling; batch `i` folds in `i`.
        batches: at most; None is the whole split.
        examples: at most; None is all of those.

    Returns:
        Texts by the number of the example in its split, in the order of reading.
    """
    boundary, found = data.tokenizer.boundary, {}
    for number, batch in enumerate(itertools.islice(data.eval_batches(split), batches)):
        if examples is not None and len(found) >= examples:
            break
        new = decode(
            model,
            dispatch,
            prompts_of(batch),
            decoding,
            jax.random.fold_in(key, number),
            boundary=boundary,
        )
        assert batch.index is not None
        for index, tokens in zip(batch.index, new, strict=True):
            if index >= 0:
                found[int(index)] = data.tokenizer.decode(until(tokens, boundary))
    return dict(itertools.islice(found.items(), examples))


def split_scores(
    task: str,
    data: RowData,
    split: str,
    examples: Examples,
    hypotheses: dict[int, str] | None = None,
) -> dict[str, Interval]:
    """Every score of an evaluated split.

    Args:
        task: `task.name`.
        data: what was evaluated.
        split: name.
        examples: its rows.
        hypotheses: of `decode_split`; None where nothing was written. Scores of texts are over these
            examples, the others over all rows.
    """
    if task == "seq2seq":
        return _written(data, split, examples, hypotheses or {})
    if task == "ctc":
        return task_scores(
            task, examples, _references(data, split, examples), recognised(data, examples)
        )
    if task == "match":
        return task_scores(
            task,
            examples,
            _references(data, split, examples),
            sources=_sources(data, split, examples),
        )
    return task_scores(task, examples)


def domain_scores(
    task: str,
    data: RowData,
    split: str,
    examples: Examples,
    hypotheses: dict[int, str] | None = None,
) -> dict[str, dict[str, Interval]]:
    """As `split_scores`, for the rows of each domain alone; nothing where there is one domain.

    Pairs are matched within their domain.
    """
    found = {}
    members = np.unique(examples.domain)
    for number in members if len(members) > 1 else ():
        own = rows_of(examples, np.asarray(examples.domain) == number)
        texts = None
        if hypotheses is not None:
            indices = {int(i) for i in own.index}
            texts = {i: text for i, text in hypotheses.items() if i in indices}
        found[data.domains[number]] = split_scores(task, data, split, own, texts)
    return found


def rows_of(examples: Examples, which: Bool[np.ndarray, " n"]) -> Examples:
    """Some of the rows."""
    return jax.tree.map(lambda a: np.asarray(a)[which], examples)


def recognised(data: RowData, examples: Examples) -> list[str]:
    """The text of each row's best path."""
    boundary = data.tokenizer.boundary
    paths, valid = np.asarray(examples.prediction), np.asarray(examples.valid, bool)
    return [
        data.tokenizer.decode(ctc_ids(path, inside, boundary))
        for path, inside in zip(paths, valid, strict=True)
    ]


def _written(
    data: RowData, split: str, examples: Examples, hypotheses: dict[int, str]
) -> dict[str, Interval]:
    domain = dict(zip(np.asarray(examples.index).tolist(), examples.domain, strict=True))
    indices = [i for i in hypotheses if i in domain]
    languages = [language_of(data.domains[domain[i]]) for i in indices]
    texts = [hypotheses[i] for i in indices]
    references = _of_examples(data).references(split, indices)
    return task_scores("seq2seq", examples, references, texts, languages=languages)


def _references(data: RowData, split: str, examples: Examples) -> Sequence[str]:
    return _of_examples(data).references(split, np.asarray(examples.index))


def _sources(data: RowData, split: str, examples: Examples) -> Sequence[Hashable]:
    """What each source is made of: equal texts and equal pictures are one."""
    inputs = _of_examples(data).store.splits[split].fields["input"]
    return [inputs[int(i)].tobytes() for i in examples.index]


def _of_examples(data: RowData) -> ExampleData:
    assert isinstance(data, ExampleData)
    return data
