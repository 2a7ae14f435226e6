"""The sums of `routing_analysis` made inside jit, batch by batch, and what they come to.

`routing_sums` runs on devices over the global batch: products and comparisons, exact below 2^24 a
batch. `collect` brings them to the host in float64, where `add` joins batches and `summarize`
divides. Only the vocabulary, `[L V E]` and a scatter, has to be asked for.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Shaped
import numpy as np

from moe.data.types import TEXT, Batch
from moe.evaluation import routing_analysis as analysis
from moe.evaluation import routing_paths
from moe.evaluation.routing_paths import Paths
from moe.routing.types import LayerReport

POSITION_BINS = 8
MODALITIES = 2  # TEXT and FRAMES
SHUFFLE = 0x5F1E  # folded into the key, which routers may draw from too


class Vocabulary(NamedTuple):
    """Who visits whom, by token id."""

    choices: Shaped[Any, "L V E"]
    tokens: Shaped[Any, " V"]  # of each id


class Modalities(NamedTuple):
    """Who visits whom, by modality; `M` is `MODALITIES`."""

    choices: Shaped[Any, "L M E"]
    shuffled: Shaped[Any, "L M E"]  # the modalities permuted over the batch's valid tokens
    tokens: Shaped[Any, " M"]


class RoutingSums(NamedTuple):
    """Sums over valid tokens. `P`: bins of positions, `M`: domains."""

    together: Shaped[Any, "L E E"]  # tokens that visit both experts
    positions: Shaped[Any, "L P E"]  # choices by position in the document
    domain_tokens: Shaped[Any, " M"]
    domain_shuffled: Shaped[Any, "L M E"]  # choices, the domains permuted over the batch's rows
    position_tokens: Shaped[Any, " P"]
    ran: Shaped[Any, " L"]  # tokens that an expert worked on
    paths: Any  # fingerprints uint32 [B S 2] and valid [B S]; `Paths` on the host
    inputs: Vocabulary | None = None  # by the id of the token itself
    predictions: Vocabulary | None = None  # by the id that is predicted after it
    modalities: Modalities | None = None  # of batches that have them


def visits(expert: Int[Array, "L B S K"], num_experts: int) -> Bool[Array, "L B S E"]:
    """Which experts each token visits; -1 is nobody. The twin of `routing_analysis.multi_hot`."""
    return jax.nn.one_hot(expert, num_experts, dtype=bool).any(axis=-2)


def shuffle(key: Key[Array, ""], mask: Bool[Array, " N"]) -> Int[Array, " N"]:
    """A permutation of what the mask holds, the rest in place: `kind[shuffle(key, mask)]`.

    The twin of `routing_analysis.shuffled` with `jax.random.uniform(key, [N])` for the draws.
    """
    draws = jax.random.uniform(key, mask.shape)
    held = jnp.argsort(~mask, stable=True)
    mixed = jnp.argsort(
        jnp.where(mask, draws, 2.0), stable=True
    )  # others after all draws, in order
    return jnp.zeros_like(held).at[held].set(mixed)


def routing_sums(
    report: LayerReport,
    batch: Batch,
    member: Float[Array, "B M"],
    key: Key[Array, ""],
    logits: Float[Array, "B S V"] | None = None,
    vocab_size: int | None = None,
) -> RoutingSums:
    """Sums of one batch.

    Args:
        report: of all sparse layers, leading `L`.
        batch: the tokens that were routed.
        member: which domain each row is of, one-hot.
        key: of the permutations that make the control of chance; another one for every batch.
        logits: of the next token; with them the predicted ids are counted too.
        vocab_size: counts the ids of the tokens themselves. None counts no ids.
    """
    E, S = report.row_requested.shape[-1], batch.tokens.shape[1]
    hot = visits(report.expert, E)
    weight = hot.astype(jnp.float32)
    bins = min(POSITION_BINS, S)
    where = jnp.minimum(batch.positions * bins // S, bins - 1)
    bin_of = jax.nn.one_hot(where, bins) * batch.valid[..., None]  # [B S P]
    of_rows, of_tokens = jax.random.split(jax.random.fold_in(key, SHUFFLE))
    mixed = member[shuffle(of_rows, batch.valid.any(axis=1))]
    sums = RoutingSums(
        together=jnp.einsum("lbse,lbsf->lef", weight, weight),
        positions=jnp.einsum("lbse,bsp->lpe", weight, bin_of),
        domain_tokens=jnp.einsum("bs,bm->m", batch.valid.astype(jnp.float32), member),
        domain_shuffled=jnp.einsum("lbe,bm->lme", report.row_requested, mixed),
        position_tokens=bin_of.sum(axis=(0, 1)),
        ran=hot.any(axis=-1).sum(axis=(1, 2)).astype(jnp.float32),
        paths=(_fingerprints(hot), batch.valid),
        modalities=_modalities(weight, batch, of_tokens),
    )
    if vocab_size is None:
        return sums
    text = batch.valid if batch.modality is None else batch.valid & (batch.modality == TEXT)
    weight = weight * text[None, ..., None]  # the id where frames stand means nothing
    sums = sums._replace(inputs=_vocabulary(weight, batch.tokens, text, vocab_size))
    if logits is None:
        return sums
    predicted = logits.argmax(axis=-1)
    return sums._replace(predictions=_vocabulary(weight, predicted, text, vocab_size))


def _modalities(
    weight: Float[Array, "L B S E"], batch: Batch, key: Key[Array, ""]
) -> Modalities | None:
    if batch.modality is None:
        return None
    valid = batch.valid.reshape(-1)
    of = jax.nn.one_hot(batch.modality.reshape(-1), MODALITIES) * valid[:, None]  # [T M]
    rows = weight.reshape(weight.shape[0], -1, weight.shape[-1])
    return Modalities(
        jnp.einsum("lte,tm->lme", rows, of),
        jnp.einsum("lte,tm->lme", rows, of[shuffle(key, valid)]),
        of.sum(axis=0),
    )


def _fingerprints(hot: Bool[Array, "L B S E"]) -> Shaped[Array, "B S W"]:
    table = routing_paths.fingerprint_table(hot.shape[0], hot.shape[-1])
    zero = jnp.uint32(0)
    halves = [
        jnp.where(hot, jnp.asarray(half)[:, None, None], zero).sum(axis=(0, 3), dtype=jnp.uint32)
        for half in np.moveaxis(table, -1, 0)
    ]
    return jnp.stack(halves, axis=-1)


def _vocabulary(
    weight: Float[Array, "L B S E"],
    ids: Int[Array, "B S"],
    valid: Bool[Array, "B S"],
    vocab_size: int,
) -> Vocabulary:
    L, B, S, E = weight.shape
    rows = jnp.moveaxis(weight, 0, 2).reshape(B * S, L * E)
    flat = ids.reshape(-1)
    found = jnp.zeros((vocab_size, L * E)).at[flat].add(rows)
    tokens = jnp.zeros((vocab_size,)).at[flat].add(valid.reshape(-1).astype(jnp.float32))
    return Vocabulary(jnp.moveaxis(found.reshape(vocab_size, L, E), 0, 1), tokens)


def collect(sums: RoutingSums) -> RoutingSums:
    """Brings the sums of one batch to the host, as float64, its paths counted."""
    halves, valid = (np.asarray(a) for a in jax.device_get(sums.paths))
    counted = jax.tree.map(lambda a: np.asarray(a, np.float64), sums._replace(paths=None))
    return counted._replace(paths=routing_paths.count_fingerprints(halves[valid]))


def add(a: RoutingSums, b: RoutingSums) -> RoutingSums:
    """Joins two batches on the host."""
    sums = jax.tree.map(np.add, a._replace(paths=None), b._replace(paths=None))
    assert isinstance(a.paths, Paths)
    assert isinstance(b.paths, Paths)
    return sums._replace(paths=routing_paths.add(a.paths, b.paths))


def summarize(
    sums: RoutingSums, domain_requested: Shaped[np.ndarray, "L M E"]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Turns host sums into measures of specialisation.

    Returns:
        `routing/<name>` and `routing/per_layer/<name>` as `metrics.summarize` gives them:
        `coactivation` (an expert's strongest partner), `domain_information`, `domain_divergence`
        and `position_information` (nats), `skip_rate` (tokens that no expert worked on),
        `path_entropy` (nats), `unique_paths` (per 1,000 tokens), `vocabulary_inputs` and
        `vocabulary_predictions` where counted. Information on the domain, and on the modality
        where rows have several, comes with its control: `<kind>_information_shuffled` (nats, of the
        kinds permuted), `<kind>_information_excess` (the difference) and
        `<kind>_information_share` (of the kind's entropy). And tables, too large for every line of a
        history: `routing/coactivation [L E E]`, `routing/domains [L M E]`,
        `routing/positions [L P E]` and `routing/modalities [L M E]`, shares of the tokens of a kind,
        and `routing/favourites [L E top]`, lists `[id, choices, lift]`.
    """
    layers = {
        "coactivation": analysis.strongest_partner(sums.together),
        "domain_divergence": analysis.mean_divergence(domain_requested),
        "position_information": analysis.mutual_information(sums.positions),
        "skip_rate": routing_paths.skip_rate(sums.ran, sums.position_tokens.sum()),
    }
    layers |= information("domain", domain_requested, sums.domain_shuffled)
    tables = {
        "routing/coactivation": analysis.coactivation(sums.together),
        "routing/domains": analysis.specialisation(domain_requested, sums.domain_tokens),
        "routing/positions": analysis.specialisation(sums.positions, sums.position_tokens),
    }
    if sums.modalities is not None and np.all(sums.modalities.tokens > 0):
        choices, mixed, tokens = sums.modalities
        layers |= information("modality", choices, mixed)
        tables["routing/modalities"] = analysis.specialisation(choices, tokens)
    for name in ("inputs", "predictions"):
        found: Vocabulary | None = getattr(sums, name)
        if found is not None and found.tokens.any():  # rows of frames alone have no ids
            layers[f"vocabulary_{name}"] = analysis.vocabulary_specialisation(
                found.choices, found.tokens
            )
    values: dict[str, Any] = {f"routing/{n}": float(v.mean()) for n, v in layers.items()}
    values |= {f"routing/per_layer/{n}": v.tolist() for n, v in layers.items()}
    values |= {f"routing/{n}": v for n, v in routing_paths.path_metrics(sums.paths).items()}
    listed: dict[str, Any] = {name: table.round(4).tolist() for name, table in tables.items()}
    if sums.inputs is not None:
        listed["routing/favourites"] = _favourites(sums.inputs)
    return values, listed


def information(
    kind: str, choices: Shaped[np.ndarray, "L M E"], mixed: Shaped[np.ndarray, "L M E"]
) -> dict[str, Float[np.ndarray, " L"]]:
    """Mutual information of kind and expert, layer by layer, beside that of shuffled kinds.

    The control is of the same tokens and the same choices, so what few samples add to the one they
    add to the other. A shuffled row may draw its own kind, which makes the control of a router that
    tells kinds apart a little too large in small batches, and the excess too small.
    """
    found, control = analysis.mutual_information(choices), analysis.mutual_information(mixed)
    return {
        f"{kind}_information": found,
        f"{kind}_information_shuffled": control,
        f"{kind}_information_excess": found - control,
        f"{kind}_information_share": analysis.information_share(choices),
    }


def _favourites(inputs: Vocabulary) -> list[list[list[Any]]]:
    """`[L][E]` lists of `[id, choices, lift]`, as many as an expert has."""
    found = analysis.favourites(inputs.choices)
    L, E, _ = found.ids.shape
    return [
        [
            [
                [int(token), int(count), round(float(lift), 3)]
                for token, count, lift in zip(*(row[layer, e] for row in found), strict=True)
                if token >= 0
            ]
            for e in range(E)
        ]
        for layer in range(L)
    ]
