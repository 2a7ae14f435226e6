"""Packed text: a corpus, tokenised, its documents laid end to end and cut into rows."""

from collections.abc import Mapping
import dataclasses
from pathlib import Path
from typing import ClassVar

import numpy as np

from moe.data.batches import RowData, mixing_weights
from moe.data.pack import PackedRows
from moe.data.router_valid import carve
from moe.data.sources import open_source
from moe.data.sources.types import Request
from moe.data.store import Count, TokenStore, cached_tokenizer, document_keys, open_tokens
from moe.data.tokenizers import Tokenizer


def text_data(
    *,
    name: str,
    root: Path,
    batch_size: int,
    sequence_length: int,
    seed: int,
    tokenizer: str = "bytes",
    vocab_size: int | None = None,
    weights: Mapping[str, int | float] | None = None,
    files: str | Mapping[str, str] | None = None,
    text_feature: str = "text",
    saved_tokenizer: Tokenizer | None = None,
    router_valid: bool = False,
) -> "TextData":
    """Opens, tokenises and packs a text corpus.

    Args:
        name: of a text source, see `moe.data.sources`.
        root: directory of prepared data and token files.
        batch_size: sequences of the global batch.
        sequence_length: tokens of a row.
        seed: of the order of documents and rows in training.
        tokenizer: `bytes`, `bpe` or `characters`.
        vocab_size: of `bpe` and `characters`; `bytes` has its own.
        weights: domain to weight in training; a domain left out is not trained on. None: by size.
        files: glob, or domain to glob, for `files`.
        text_feature: for `tfds`.
        saved_tokenizer: overrides `tokenizer` and `vocab_size`.
        router_valid: carves the split `router_valid` from train; see `moe.data.router_valid`.

    Raises:
        ConfigError: an unknown name, or numbers that cannot work.
        DataError: data that is missing, unreadable, empty or too small.
    """
    kind, _, dataset = name.partition(":")
    source = open_source(kind, Request(dataset, root, files, text_feature))
    made = saved_tokenizer or cached_tokenizer(source, root, tokenizer, vocab_size)
    store = open_tokens(source, root, made)
    if router_valid:
        store = carve(store, document_keys(source, root), made.token_bytes)
    tokens = {domain: count.tokens for domain, count in store.counts["train"].items()}
    mix = mixing_weights(weights, tokens)
    data = TextData(made, mix, batch_size, sequence_length, seed, store)
    data.check_size(name)
    return data


@dataclasses.dataclass(frozen=True)
class TextData(RowData):
    """A tokenised corpus, ready to be read."""

    kind: ClassVar[str] = "text"

    store: TokenStore = dataclasses.field(repr=False)

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains; `Batch.domain` indexes them."""
        return self.store.domains

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self.store.splits)

    @property
    def fingerprint(self) -> str:
        """Hash of all tokens of all splits and of the tokenizer."""
        return self.store.fingerprint

    @property
    def counts(self) -> dict[str, dict[str, Count]]:
        """Documents, tokens and bytes by split and domain."""
        return self.store.counts

    def token_counts(self) -> np.ndarray:
        """How often each id occurs in train, `[V]`."""
        return np.bincount(self.store.splits["train"].ids[:], minlength=self.tokenizer.vocab_size)

    def rows(self, split: str) -> list[PackedRows]:
        """The rows of each domain: in training only those with a weight, shuffled."""
        self.check_split(split)
        train = split == "train"
        tokens = self.store.splits[split]
        return [
            PackedRows(tokens, m, self.sequence_length, self.seed if train else None)
            for m, name in enumerate(self.domains)
            if name in self.weights or not train
        ]
