"""From the config's `data` section to a data set that is ready to be read."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from moe.config import ConfigDict, default_config
from moe.data.batches import RowData, Source
from moe.data.example_data import example_data
from moe.data.examples import Records, open_records
from moe.data.pair_records import pair_records
from moe.data.sources import SOURCES
from moe.data.sources.catalogue import CATALOGUE
from moe.data.sources.prepared import find_prepared
from moe.data.text import text_data
from moe.data.tokenizers import Tokenizer
from moe.errors import ConfigError

_OF_TEXT = ("name", "files", "text_feature")
_OF_EXAMPLES = {  # key of the section -> argument of `example_data`
    "input_feature": "input_feature",
    "target_feature": "target_feature",
    "label_feature": "label_feature",
    "patch": "patch",
    "stride": "stride",
    "sample_rate": "sample_rate_wanted",
    "mels": "mels",
    "too_long": "too_long",
    "skip_bad": "skip_bad",
    "corrupt": "corruption",
}


def make_data(
    section: ConfigDict,
    *,
    seed: int,
    task: str = "language",
    prefix: bool = False,
    tokenizer: Tokenizer | None = None,
    router_valid: bool = False,
) -> RowData:
    """Opens what the config's `data` section describes.

    Packed text is read by `language`, and by `classify` where text has domains and no labels; every
    other task reads examples.

    Args:
        section: `config.data`.
        seed: of the order of documents and rows in training.
        task: `config.task.name`.
        prefix: whether the source of `seq2seq` sees all of itself.
        tokenizer: the one saved with a run; None makes the one that the section describes.
        router_valid: whether to carve the split `router_valid` from train; of packed text.

    Raises:
        ConfigError: an unknown name, or numbers that cannot work.
        DataError: data that is missing, unreadable, empty or too small.
    """
    values: dict[str, Any] = {**default_config().data.to_dict(), **section.to_dict()}
    options = {"seed": seed, "task": task, "prefix": prefix, "router_valid": router_valid}
    source = Source(dict(values), options)
    for key in ("batch_size", "sequence_length"):
        if values[key] < 1:
            raise ConfigError(f"data.{key}={values[key]} must be greater than 0.")
    root = data_directory(values.pop("directory"))
    values.pop("workers")
    of_examples = {argument: values.pop(key) for key, argument in _OF_EXAMPLES.items()}
    values |= {"root": root, "seed": seed, "saved_tokenizer": tokenizer}
    name, label = values["name"], str(of_examples["label_feature"])
    records = _records(name, values["files"], task, root, label)
    if records is None:
        if of_examples["corruption"] is not None:
            raise ConfigError(
                "data.corrupt is of examples, and packed text has none: set it to none."
            )
        text = text_data(**values, router_valid=router_valid)
        return dataclasses.replace(text, source=source)
    if router_valid:
        raise ConfigError(
            "prior.every > 0 needs a router-validation split, which is carved from packed text alone: "
            f"set prior.every=0 for task.name={task!r}."
        )
    values = {key: value for key, value in values.items() if key not in _OF_TEXT}
    data = example_data(records, task=task, prefix=prefix, **values, **of_examples)
    return dataclasses.replace(data, source=source)


def _records(name: str, files: Any, task: str, root: Path, label: str) -> Records | None:
    """The examples that a task reads; None where it reads packed text."""
    kind = name.partition(":")[0]
    if task == "language" or (task == "classify" and _is_text(kind)):
        return None
    if name == "pairs":
        return pair_records(files)
    records = open_records(find_prepared(name, root))
    return None if task == "classify" and label not in records.features else records


def _is_text(kind: str) -> bool:
    """Whether a source has domains and no labels."""
    of_catalogue = kind in CATALOGUE and CATALOGUE[kind].kind == "language"
    return of_catalogue or (kind in SOURCES and kind != "tfds")


def data_directory(directory: str | None) -> Path:
    """Returns `data.directory`, or TFDS's default: `TFDS_DATA_DIR` or ~/tensorflow_datasets."""
    default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    return Path(directory or default).expanduser()
