"""Examples in memory, as `moe.data.example_data` would open them from a prepared data set."""

import hashlib

import numpy as np

from moe.data.example_data import ExampleData
from moe.data.example_rows import Layout
from moe.data.examples import ExampleSplit, ExampleStore, Field
from moe.data.features import Fields
from moe.data.tokenizers import byte_tokenizer

TOKENIZER = byte_tokenizer()


def field(parts: list[np.ndarray]) -> Field:
    starts = np.cumsum([0, *map(len, parts)])
    return Field(np.concatenate(parts), starts, None)


def split_of(rows: list[tuple[str, str, int, int]]) -> ExampleSplit:
    """Of (source, target, domain, label)."""
    sources, targets, domains, labels = zip(*rows, strict=True)
    fields = {
        "input": field(TOKENIZER.encode_batch(list(sources))),
        "target": field(TOKENIZER.encode_batch(list(targets))),
        "text": field([np.frombuffer(text.encode(), np.uint8) for text in targets]),
    }
    return ExampleSplit(fields, np.array(domains, np.int32), np.array(labels, np.int32), 0)


def text_examples(
    task: str,
    splits: dict[str, list[tuple[str, str, int, int]]],
    *,
    domains: tuple[str, ...],
    length: int = 16,
    batch_size: int = 4,
    classes: tuple[str, ...] = (),
) -> ExampleData:
    fields = Fields("source", "text", "target", "label" if classes else None, classes, "domain")
    digest = hashlib.sha256(repr(splits).encode()).hexdigest()
    made = {name: split_of(rows) for name, rows in splits.items()}
    store = ExampleStore(fields, domains, made, digest)
    layout = Layout(task, fields, TOKENIZER, length, prefix=task == "seq2seq")
    weights = dict.fromkeys(domains, 1 / len(domains))
    return ExampleData(TOKENIZER, weights, batch_size, length, 0, store, layout)
