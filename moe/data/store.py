"""Token files: each split tokenised once, then mapped into memory.

A split is one long array `boundary t1 ... tn boundary t1 ... tm boundary`: every document starts
with the boundary, and the last one is closed by it, so that the target of any position is the next
element. Files are written to a temporary directory and renamed, so that a directory that exists is
whole, whoever else was writing it.
"""

from collections.abc import Iterator
import hashlib
import json
from pathlib import Path
from typing import NamedTuple
import zlib

from jaxtyping import Int, Shaped
import numpy as np

from moe.data.cache import cache_key, check_directory, damaged, directory_in_one_go
from moe.data.checked import CheckedArray, check_indices, check_starts, read_row
from moe.data.sources.types import SPLITS, Document, Source
from moe.data.tokenizers import LEARNED, Tokenizer, from_json, make_tokenizer
from moe.errors import DataError

_CHUNK = 1 << 20  # characters tokenised at once
_META = "meta.json"
_DTYPES = {"uint16": np.dtype(np.uint16), "int32": np.dtype(np.int32)}  # of token files


class TokenSplit(NamedTuple):
    """The tokens of one split. `n` documents; document d is `ids[starts[d]:starts[d + 1]]`."""

    # [T] uint16 or int32; one closing boundary at the end
    ids: CheckedArray | Int[np.ndarray, " T"]
    starts: Int[np.ndarray, " n+1"]  # int64; starts[n] is where the closing boundary lies
    domain: Int[np.ndarray, " n"]  # int32, index into `TokenStore.domains`


class Count(NamedTuple):
    """The size of a domain in a split. `tokens` are targets: one boundary a document included."""

    documents: int
    tokens: int
    bytes: int


class TokenStore(NamedTuple):
    """All tokens of a source. `fingerprint` hashes the tokens themselves and the tokenizer."""

    domains: tuple[str, ...]
    splits: dict[str, TokenSplit]
    counts: dict[str, dict[str, Count]]  # split -> domain
    fingerprint: str


def cached_tokenizer(
    source: Source, directory: Path, kind: str, vocab_size: int | None
) -> Tokenizer:
    """Returns the tokenizer of the config, trained on the train split once for each source."""
    texts = (document.text for document in source.documents("train"))
    if kind not in LEARNED:
        return make_tokenizer(kind, vocab_size, texts)
    key = cache_key(source.identity, LEARNED[kind], vocab_size)
    path = directory / "tokens" / key / "tokenizer.json"
    if not path.is_file():
        tokenizer = make_tokenizer(kind, vocab_size, texts)
        with directory_in_one_go(path.parent) as temporary:
            (temporary / path.name).write_text(tokenizer.to_json(), encoding="utf-8")
    check_directory(path.parent)
    return from_json(path.read_bytes())


def open_tokens(source: Source, directory: Path, tokenizer: Tokenizer) -> TokenStore:
    """Opens the tokens of a source, tokenising it first where that has not been done.

    Args:
        source: the text.
        directory: the data directory; tokens are in `tokens/<key>/` below it.
        tokenizer: from text to ids.

    Raises:
        DataError: a split without text, unreadable text, a directory that cannot be written, or
            token files that are damaged.
    """
    path = directory / "tokens" / cache_key(source.identity, tokenizer.to_json())
    if not path.is_dir():
        with directory_in_one_go(path) as temporary:
            _write(source, tokenizer, temporary)
    return _open(path, check_directory(path))


def document_keys(source: Source, directory: Path) -> Shaped[np.ndarray, " n"]:
    """Returns the CRC-32 of the key of each training document, uint32, in the order of its tokens.

    Read from the source once, then from `tokens/<key>/` below the data directory.

    Raises:
        DataError: the file there is damaged.
    """
    path = directory / "tokens" / cache_key(source.identity, "keys") / "train.key.npy"
    if not path.is_file():
        documents = (document for document in source.documents("train") if document.text)
        keys = [zlib.crc32((d.key or d.text).encode("utf-8", "surrogateescape")) for d in documents]
        with directory_in_one_go(path.parent) as temporary:
            np.save(temporary / path.name, np.array(keys, np.uint32))
    check_directory(path.parent)
    try:
        return read_row(path, np.uint32)
    except (OSError, ValueError, EOFError) as error:
        raise damaged(path.parent, repr(error)) from error


def _write(source: Source, tokenizer: Tokenizer, path: Path) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)
    names: dict[str, int] = {}  # domain -> index in the order met
    digest = hashlib.sha256(tokenizer.to_json().encode())
    lengths = {}
    for split in SPLITS:
        starts, domain, sizes = [0], [], []
        with (path / f"{split}.ids").open("wb") as file:
            for document, ids in _tokenised(source.documents(split), tokenizer):
                record = np.concatenate([[tokenizer.boundary], ids]).astype(dtype).tobytes()
                file.write(record)
                digest.update(record)
                starts.append(starts[-1] + len(ids) + 1)
                domain.append(names.setdefault(document.domain, len(names)))
                sizes.append(len(document.text.encode("utf-8")))
            file.write(np.array([tokenizer.boundary], dtype).tobytes())
        if not domain:
            raise DataError(
                f"The {split} split of {source.name!r} has no text. Every split needs at least one "
                "document that is not empty: give more documents, or longer ones."
            )
        np.save(path / f"{split}.starts.npy", np.array(starts, np.int64))
        lengths[split] = (np.array(domain, np.int32), np.diff(starts), np.array(sizes))
    _write_domains(path, names, lengths, digest, dtype)


def _write_domains(path: Path, names: dict[str, int], lengths, digest, dtype: np.dtype) -> None:
    """Numbers the domains by name, and writes counts and the fingerprint."""
    domains = sorted(names)
    renumber = np.array([domains.index(name) for name in names], np.int32)
    counts: dict[str, dict[str, Count]] = {}
    for split, (met, tokens, sizes) in lengths.items():
        domain = renumber[met]
        np.save(path / f"{split}.domain.npy", domain)
        digest.update(domain.tobytes())
        counts[split] = {
            name: Count(int(own.sum()), int(tokens[own].sum()), int(sizes[own].sum()))
            for name, own in ((name, domain == m) for m, name in enumerate(domains))
        }
    digest.update("\n".join(domains).encode())
    meta = {
        "domains": domains,
        "dtype": dtype.name,
        "counts": counts,
        "fingerprint": digest.hexdigest()[:32],
    }
    (path / _META).write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _tokenised(
    documents: Iterator[Document], tokenizer: Tokenizer
) -> Iterator[tuple[Document, np.ndarray]]:
    """Tokenises in chunks, so that a corpus need not fit in memory. Leaves out empty documents."""
    chunk: list[Document] = []
    size = 0
    for document in documents:
        if document.text:
            chunk.append(document)
            size += len(document.text)
        if size >= _CHUNK:
            yield from _encoded(chunk, tokenizer)
            chunk, size = [], 0
    yield from _encoded(chunk, tokenizer)


def _encoded(chunk: list[Document], tokenizer: Tokenizer) -> Iterator[tuple[Document, np.ndarray]]:
    ids = tokenizer.encode_batch([document.text for document in chunk])
    return zip(chunk, ids, strict=True)


def _open(path: Path, sums: dict[str, list[int]]) -> TokenStore:
    try:
        meta = json.loads((path / _META).read_text(encoding="utf-8"))
        dtype = _DTYPES[meta["dtype"]]
        splits = {split: _open_split(path, split, dtype, sums) for split in SPLITS}
        counts = {
            split: {name: Count(*count) for name, count in of_split.items()}
            for split, of_split in meta["counts"].items()
        }
        domains = tuple(meta["domains"])
        for split, tokens in splits.items():
            _check_split(split, tokens, domains, counts[split])
        return TokenStore(domains, splits, counts, meta["fingerprint"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, repr(error)) from error


def _check_split(
    split: str, tokens: TokenSplit, domains: tuple[str, ...], counts: dict[str, Count]
) -> None:
    """Raises ValueError unless files and counts of a split agree; their checksums can be renewed."""
    check_starts(f"{split}.starts.npy", tokens.starts, len(tokens.domain), len(tokens.ids) - 1)
    check_indices(f"{split}.domain.npy", tokens.domain, len(domains))
    if tuple(counts) != domains or len(set(domains)) < len(domains):
        raise ValueError(f"the counts of {split} are not of the domains {domains}")
    lengths = np.diff(tokens.starts)
    for m, count in enumerate(counts.values()):
        own = tokens.domain == m
        if count[:2] != (own.sum(), lengths[own].sum()) or type(count.bytes) is not int:
            raise ValueError(f"the counts of {split} are not those of its documents")


def _open_split(path: Path, split: str, dtype: np.dtype, sums: dict[str, list[int]]) -> TokenSplit:
    return TokenSplit(
        ids=CheckedArray(path / f"{split}.ids", dtype, sums[f"{split}.ids"]),
        starts=read_row(path / f"{split}.starts.npy", np.int64),
        domain=read_row(path / f"{split}.domain.npy", np.int32),
    )
