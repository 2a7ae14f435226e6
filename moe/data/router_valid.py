"""A fourth split for routers that learn from held-out text: a part of train that nothing trains on.

What steers a router may be neither the reported validation text nor the test text. The split is
carved from train only where a run asks for it, so that the others stay what they are: valid and
test always, and train in every run that does not ask.
"""

import hashlib
import math

from jaxtyping import Bool, Shaped
import numpy as np

from moe.data.store import Count, TokenSplit, TokenStore
from moe.errors import DataError

ROUTER_VALID = "router_valid"
_SHARE = 0.05  # of the keys of train


def carve(
    store: TokenStore,
    keys: Shaped[np.ndarray, " n"],
    token_bytes: Shaped[np.ndarray, " V"],
) -> TokenStore:
    """Moves the documents of a twentieth of the keys, at least one, from train to `router_valid`.

    Keys go in the order of the hash that has split train off: with percentiles, the range that
    follows those of test and valid.

    Args:
        store: of three splits.
        keys: of the training documents, see `document_keys`.
        token_bytes: bytes that each id stands for.

    Returns:
        The store of four splits that share the tokens on disk; a document's domain is -1 in the
        split that it is not in. Its fingerprint is another.

    Raises:
        DataError: train has a single key.
    """
    known = np.unique(keys)
    if len(known) < 2:
        raise DataError(
            "prior.every > 0 needs a router-validation split, which is made of whole training "
            "documents, and train has only one. Give at least two documents (or 3 files a domain, "
            "which are then not cut into parts), or set prior.every=0."
        )
    order = np.lexsort((known, known % 100))
    held_out = np.isin(keys, known[order[: math.ceil(_SHARE * len(known))]])  # [n]
    train = store.splits["train"]
    splits = {
        **store.splits,
        "train": _only(train, ~held_out),
        ROUTER_VALID: _only(train, held_out),
    }
    counts = dict(store.counts)
    counts[ROUTER_VALID] = _counted(splits[ROUTER_VALID], store.domains, token_bytes)
    counts["train"] = {
        name: Count(*(a - b for a, b in zip(count, counts[ROUTER_VALID][name], strict=True)))
        for name, count in store.counts["train"].items()
    }
    digest = hashlib.sha256(store.fingerprint.encode() + held_out.tobytes())
    return TokenStore(store.domains, splits, counts, digest.hexdigest()[:32])


def _only(tokens: TokenSplit, mask: Bool[np.ndarray, " n"]) -> TokenSplit:
    return tokens._replace(domain=np.where(mask, tokens.domain, np.int32(-1)))


def _counted(
    tokens: TokenSplit, domains: tuple[str, ...], token_bytes: Shaped[np.ndarray, " V"]
) -> dict[str, Count]:
    counts = {}
    for m, name in enumerate(domains):
        own = np.flatnonzero(tokens.domain == m)
        starts, ends = tokens.starts[own], tokens.starts[own + 1]
        sizes = (int(token_bytes[tokens.ids[a:b]].sum()) for a, b in zip(starts, ends, strict=True))
        counts[name] = Count(len(own), int((ends - starts).sum()), sum(sizes))
    return counts
