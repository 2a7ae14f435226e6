"""A small corpus with two domains, and the config section that reads it."""

import json

from ml_collections import ConfigDict
import pytest


def texts(domain: str, n: int) -> list[str]:
    return [f"{domain} {i}: " + f"{i * 7919 % 1000} " * (3 + i % 11) for i in range(n)]


@pytest.fixture
def corpus(tmp_path):
    """Writes 200 documents of `long` and 60 of `short` to one jsonl file and returns its path."""
    path = tmp_path / "corpus.jsonl"
    sizes = {"long": 200, "short": 60}
    lines = [
        json.dumps({"text": text, "domain": domain})
        for domain, n in sizes.items()
        for text in texts(domain, n)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def section(corpus, tmp_path):
    """Returns a function from changes to the `data` section that reads the corpus."""

    def make(**changes) -> ConfigDict:
        values = {
            "name": "files",
            "batch_size": 4,
            "sequence_length": 16,
            "tokenizer": "bytes",
            "vocab_size": None,
            "weights": None,
            "files": str(corpus),
            "text_feature": "text",
            "directory": str(tmp_path / "data"),
        }
        return ConfigDict(values | changes)

    return make
