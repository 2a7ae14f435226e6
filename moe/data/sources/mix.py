"""Several text sources as one: `data.name=mix:novels,stdlib,reviews@4000000`.

`data.weights` then mixes the domains in training. `@BYTES` reads of each domain of that source at
most so many bytes of text in each split, always the same documents.
"""

from collections import Counter
from collections.abc import Callable, Iterator
import json
from typing import NamedTuple

from moe.data.sources.types import Document, Request, Source
from moe.errors import ConfigError

Opener = Callable[[str, Request], Source]


class _Part(NamedTuple):
    name: str  # as in data.name, without the limit
    limit: int | None  # bytes of each domain in each split
    source: Source


def part_names(dataset: str) -> list[tuple[str, int | None]]:
    """Splits `a,b@4000000` into names and limits.

    Raises:
        ConfigError: fewer than two sources, one named twice, a mix in a mix, or a limit that is no
            number of bytes.
    """
    parts = [_parse(part.strip(), dataset) for part in dataset.split(",")]
    names = [name for name, _ in parts]
    if len(parts) < 2 or not all(names):
        raise ConfigError(
            f"data.name=mix:{dataset} must name two sources or more, with commas between them: "
            "mix:novels,stdlib."
        )
    for name, times in Counter(names).items():
        if times > 1 or name.partition(":")[0] == "mix":
            raise ConfigError(
                f"data.name=mix:{dataset}: {name!r} cannot stand in it; every source is named once, "
                "and none is a mix itself."
            )
    return parts


def _parse(part: str, dataset: str) -> tuple[str, int | None]:
    name, at, limit = part.partition("@")
    if at and not (limit.isascii() and limit.isdigit() and int(limit) > 0):
        raise ConfigError(
            f"data.name=mix:{dataset}: {part!r} must end with a number of bytes, as in "
            f"{name}@4000000."
        )
    return name, int(limit) if at else None


def mix_source(request: Request, open_part: Opener) -> Source:
    """Opens the sources that `data.name=mix:...` names.

    Args:
        request: of the mix; its parts get the same directory, and `files` where they read them.
        open_part: opens a source by name.

    Raises:
        ConfigError: as `part_names`; or, once documents are read, a domain that two sources have.
        DataError: a source cannot give its text.
    """
    parts = []
    for name, limit in part_names(request.dataset):
        kind, _, dataset = name.partition(":")
        files = request.files if kind == "files" else None
        source = open_part(kind, request._replace(dataset=dataset, files=files))
        parts.append(_Part(name, limit, source))
    owners: dict[str, str] = {}  # domain -> the source that has it, over all splits read so far

    def documents(split: str) -> Iterator[Document]:
        for part in parts:
            for document in _limited(part.source.documents(split), part.limit):
                owner = owners.setdefault(document.domain, part.name)
                if owner != part.name:
                    raise ConfigError(
                        f"data.name=mix:{request.dataset}: {owner} and {part.name} both have the "
                        f"domain {document.domain!r}. Leave one out, or read it as files with a "
                        "domain of its own: data.files maps domains to globs."
                    )
                # Sources name their documents independently: equal keys mean nothing.
                yield document._replace(key=document.key and f"{part.name}/{document.key}")

    identity = json.dumps([[part.name, part.limit, part.source.identity] for part in parts])
    return Source(f"mix:{request.dataset}", identity, documents)


def _limited(documents: Iterator[Document], limit: int | None) -> Iterator[Document]:
    """Yields the first documents of each domain, as many as fit into `limit` bytes, at least one."""
    taken: Counter[str] = Counter()
    full = set()
    for document in documents:
        size = len(document.text.encode()) if limit else 0
        if limit and taken[document.domain] and taken[document.domain] + size > limit:
            full.add(document.domain)
        if document.domain not in full:
            taken[document.domain] += size
            yield document
